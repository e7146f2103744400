# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_subnet import (
    FunctionEvaluator,
    Latency,
    SearchResult,
    SearchSpace,
    Subnet,
    SubnetSearch,
    measure,
)
from lightning_subnet.errors import PredictorError, SearchError
from lightning_subnet.results import elasticity_report
from lightning_subnet.supernets import ElasticMobileNetV3, ElasticViT
from tests.networks import ElasticMlp, LitMlp
from tests.problems import assert_clear

space = SearchSpace({"depth": [1, 2, 3], "ks.0": [3, 5, 7], "ks.1": [3, 5, 7], "w": [8, 16, 32]})


@measure("cost", unit="MAC", exact=True, takes="indices")
def cost(X: np.ndarray) -> np.ndarray:
    return 100 + 40.0 * X[:, 0] + 10.0 * X[:, 1] + 10.0 * X[:, 2]


def searched(budget: int = 60) -> SearchResult:
    search = SubnetSearch(
        space=space, measures=[cost], objectives={"acc": "max", "cost": "min"},
        strategy="random", budget=budget, storage=None, seed=0,
    )  # fmt: skip
    return search.run(
        FunctionEvaluator(lambda s: {"acc": 0.5 + 0.1 * s["depth"] + 0.001 * s["w"]}),
        progress=False,
    )


def test_a_search_reports_on_its_costs_and_on_its_metric() -> None:
    report = searched().elasticity()
    frame = report.to_dataframe()
    assert list(frame.columns) == [
        *("dimension", "choices", "measure", "unit", "change", "change_error", "change_percent"),
        *("share", "share_error"),
    ]
    row = frame.set_index(["dimension", "measure"])
    assert set(row.index) == {(d, m) for d in ("depth", "ks.*", "w") for m in ("cost", "acc")}
    assert row.loc[("ks.*", "cost"), ["choices", "change", "unit"]].tolist() == [2, -40, "MAC"]
    assert row.loc[("ks.*", "cost"), "change_percent"] == pytest.approx(-100 * 40 / 220)
    shares = row.xs("cost", level="measure").share
    assert shares.to_dict() == pytest.approx({"depth": 16 / 18, "ks.*": 2 / 18, "w": 0})
    # Known: 0.1 per step of the depth; 8, 16, 32 in thousandths.
    of_depth, of_width = 0.01 * 2 / 3, np.var([0.008, 0.016, 0.032])
    expected = of_depth / (of_depth + of_width)
    accuracy = row.loc[("depth", "acc")]
    assert accuracy.share == pytest.approx(expected, abs=0.02)
    assert accuracy.change == pytest.approx(-0.2, abs=0.01)
    choices = report.to_dataframe(by="choice")
    assert sorted(choices.dimension.unique()) == ["depth", "ks.0", "ks.1", "w"]
    assert frame.dimension.tolist()[0] == "depth"  # what matters most comes first


def test_all_of_a_small_space_is_exact(tmp_path: Path) -> None:
    result = searched(budget=81)
    report = result.elasticity(metrics=["acc"], measures=[])
    assert [m.measure for m in report.measures] == ["acc"]
    assert report.measures[0].basis == "all 81 subnets, measured"
    assert report.measures[0].rest == pytest.approx(0, abs=1e-9)
    result.save(tmp_path / "r.json")
    loaded = SearchResult.load(tmp_path / "r.json").elasticity()
    assert {m.measure for m in loaded.measures} == {"acc", "cost"}  # recorded, both
    by_name = {m.measure: m.share for m in loaded.measures}
    assert by_name["acc"].tolist() == report.measures[0].share.tolist()
    history = elasticity_report(space, [], metrics=["acc"], result=result.history)
    assert history.measures[0].share.tolist() == report.measures[0].share.tolist()


def test_text_and_picture() -> None:
    report = searched().elasticity()
    text = str(report)
    assert "81 subnets" in text
    for part in ("dimension", "depth", "ks.*", "88.9 %", "-18.2 %", "from 220 MAC", "together"):
        assert part in text, part
    assert "acc: 60 evaluations, predicted by" in text
    assert "cost: all 81 subnets" in text
    assert all(len(line) <= 100 for line in text.splitlines()[:-2])
    assert "ks.1" in report.table(by="choice", width=120)
    figure, ax = report.plot()
    assert len(ax.patches) == 3 * 2
    assert [label.get_text() for label in ax.get_yticklabels()] == ["depth", "ks.*", "w"]
    assert "%" in ax.get_xlabel()
    widths = sorted(patch.get_width() for patch in ax.patches)
    assert widths[-1] == pytest.approx(100 * max(m.share.max() for m in report.measures))
    other, same = report.plot(by="choice", ax=figure.add_subplot())
    assert other is figure
    assert same is not ax


def test_the_exact_costs_of_a_network() -> None:
    report = elasticity_report(ElasticMobileNetV3.tiny())
    assert [m.measure for m in report.measures] == ["macs", "params"]
    frame = report.to_dataframe()
    assert set(frame.dimension) == {"d.*", "ks.*", "e.*"}
    assert (frame.change < 0).all()
    for sensitivity in report.measures:
        shares = sensitivity.share[: len(report.space.names)]
        assert 0.8 < shares.sum() < 1
        assert shares.sum() + sensitivity.rest == pytest.approx(1)
        assert sensitivity.basis == "all 66,564 subnets"


def test_a_network_and_its_latency() -> None:
    net = ElasticMlp()
    report = elasticity_report(
        net, [Latency(seconds=0.0), "macs"], example_input=torch.zeros(1, 64), n_samples=20
    )
    timed, counted = report.measures
    assert (timed.measure, timed.unit, counted.measure) == ("latency_ms", "ms", "macs")
    assert timed.largest > 0
    assert np.isfinite(timed.share).all()
    assert (timed.change_error > 0).all()
    assert timed.basis == "all 12 subnets, measured"
    assert counted.change.tolist() == [-74 * 28, 0]


def test_measures_stand_in_the_order_of_the_list() -> None:
    @measure("units", exact=True)
    def units(subnets: list[Subnet]) -> list[float]:
        return [subnet["width"] for subnet in subnets]

    report = elasticity_report(ElasticMlp(), ["size_mb", units, "params"])
    assert [m.measure for m in report.measures] == ["size_mb", "units", "params"]


def test_a_lightning_module_is_traced() -> None:
    model = LitMlp()
    model.example_input_array = torch.zeros(1, 64)
    report = elasticity_report(model, ["macs"])
    sensitivity = report.measures[0]
    assert sensitivity.basis == "all 12 subnets, measured"
    assert sensitivity.share.tolist() == pytest.approx([1, 0])
    # 74 a hidden unit; the smallest has 4 of 32
    assert (sensitivity.largest, sensitivity.change.tolist()) == (74 * 32, [-74 * 28, 0])
    with pytest.raises(SearchError, match="'macs' of ElasticMlp needs one sample"):
        elasticity_report(LitMlp(), ["macs"])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"measures": ["mac"]}, ["'mac' is not a measure of ElasticViT", "Did you mean 'macs'"]),
        ({"measures": []}, ["nothing to report on", "measures=['macs']"]),
        ({"n_samples": 5}, ["n_samples=5", "a whole number from 20"]),
        ({"model": torch.zeros(1)}, ["got a Tensor", "Pass a super-network"]),
        ({"model": torch.nn.Linear(1, 1)}, ["Linear has no elastic part"]),
        ({"model": space}, ["'macs' measures networks", "Pass the super-network"]),
    ],
)
def test_what_cannot_be_reported(arguments: dict[str, Any], parts: list[str]) -> None:
    settings = {"model": ElasticViT.tiny(), "measures": ["macs"], **arguments}
    with pytest.raises(SearchError) as caught:
        elasticity_report(settings.pop("model"), **settings)
    assert_clear(caught.value, *parts)


def test_a_result_that_does_not_fit() -> None:
    result = searched()
    with pytest.raises(SearchError, match=r"'ac' was not recorded\. Did you mean 'acc'\?"):
        result.elasticity(metrics=["ac"])
    with pytest.raises(SearchError, match="does not fit the model's own space"):
        elasticity_report(ElasticViT.tiny(), ["macs"], result=result)
    with pytest.raises(SearchError, match="measured on 10 of 81 subnets"):
        searched(10).elasticity()
    with pytest.raises(PredictorError, match="Did you mean 'ridge'"):
        result.elasticity(predictor="rigde")
    with pytest.raises(SearchError, match="must be 'group' or 'choice'"):
        result.elasticity().to_dataframe(by="stage")
