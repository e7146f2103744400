# SPDX-License-Identifier: Apache-2.0
"""Predictors of a latency: from a super-network, from a phone, from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_subnet import Latency, Measure, SubnetSearch
from lightning_subnet.costs import LatencyPredictor, network_measure
from lightning_subnet.costs.device import describe_device
from lightning_subnet.errors import MeasurementError, ObjectiveError, StorageError, SubnetError
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.costs.tables.test_latency_table import Raw
from tests.networks import ElasticMlp
from tests.problems import assert_clear

IMAGE = torch.zeros(1, 1, 8, 8)


@network_measure("weight_ms", unit="ms")
def weight(net: Any, example_input: Any) -> tuple[float, float]:
    """A cost with a known answer: a thousandth of the parameters."""
    return sum(p.numel() for p in net.parameters()) / 1000, 0.25


def tiny(**changes: Any) -> ElasticMobileNetV3:
    return ElasticMobileNetV3.tiny(n_classes=10, **changes)


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, LatencyPredictor]:
    net = tiny()
    return net, LatencyPredictor.fit(net, weight, n=40, example_input=IMAGE, predictor="ridge")


def test_it_predicts_what_was_not_measured(fitted: tuple[Any, LatencyPredictor]) -> None:
    net, predictor = fitted
    space = net.search_space()
    assert len(predictor.subnets) == 40
    assert predictor.subnets[:2] == [space.largest, space.smallest]
    assert set(predictor.errors) == {0.25}
    others = [s for s in space.sample(60, rng=9) if s not in predictor.subnets]
    mean, std = predictor.predict(others, return_std=True)
    params = next(m for m in net.exact_measures() if m.name == "params")
    exact = params.evaluate(space, space.indices(others))[0] / 1000
    assert np.abs(mean / exact - 1).mean() < 0.05
    assert (std > 0).all()
    assert predictor.report.n == 40
    assert predictor.report.tau > 0.8
    assert str(predictor.report) in repr(predictor)


def test_it_is_an_exact_measure_of_this_network(fitted: tuple[Any, LatencyPredictor]) -> None:
    net, predictor = fitted
    measure = predictor.bind(net)
    assert isinstance(measure, Measure)
    assert (measure.name, measure.unit) == ("weight_ms", "ms")
    assert (measure.exact, measure.vectorised) == (True, True)
    search = SubnetSearch(
        space=net.search_space(), objectives={"error": "min", "weight_ms": "min"},
        measures=[measure], constraints={"weight_ms": "<= 60%"}, budget=4, strategy="random",
        storage=None,
    )  # fmt: skip
    for subnet in search.ask(4):
        assert search.tell(subnet, error=1.0).values["weight_ms"] > 0
    with pytest.raises(MeasurementError) as caught:
        predictor.bind(tiny(head=(64, 128)))
    assert_clear(caught.value, "another network", "Fit one")
    with pytest.raises(MeasurementError) as caught:
        predictor.bind(tiny(kernels=(3, 5, 7)))
    assert_clear(caught.value, "another space", "ks.0")


def test_a_file_gives_the_same_predictor(
    fitted: tuple[Any, LatencyPredictor], tmp_path: Path
) -> None:
    net, predictor = fitted
    path = tmp_path / "p.json"
    predictor.save(path)
    with pytest.raises(MeasurementError, match="measured on unknown"):
        _ = LatencyPredictor.load(path).measure  # this measure names no device
    loaded = LatencyPredictor.load(path, device="any")
    some = net.search_space().sample(30, rng=3)
    for one, two in zip(loaded.predict(some, return_std=True),
                        predictor.predict(some, return_std=True), strict=True):  # fmt: skip
        assert one.tolist() == two.tolist()
    assert loaded.report == predictor.report
    assert loaded.bind(net).fingerprint == predictor.measure.fingerprint


def test_a_latency_knows_its_device(tmp_path: Path) -> None:
    net = ElasticMlp()
    quick = Latency(repeats=15, seconds=0.0)
    predictor = LatencyPredictor.fit(net, quick, n=8, example_input=torch.zeros(1, 64))
    assert predictor.device == describe_device("cpu")
    assert predictor.conditions["threads"] == 1
    assert predictor.bind(net).exact
    predictor.save(tmp_path / "p.json")
    assert LatencyPredictor.load(tmp_path / "p.json").bind(net).exact
    with pytest.raises(MeasurementError) as caught:
        LatencyPredictor.load(tmp_path / "p.json", device="Pixel 9")
    assert_clear(caught.value, "'Pixel 9' was asked", describe_device("cpu"))


def test_values_from_a_phone() -> None:
    space = tiny().search_space()
    subnets = space.sample(30, rng=0)
    X = space.indices(subnets)
    predictor = LatencyPredictor(space, [s.to_json() for s in subnets], X.sum(axis=1) + 5.0,
                                 device="Pixel 9", predictor="ridge")  # fmt: skip
    assert predictor.measure.vectorised, "what was given by hand is meant"
    assert predictor.predict(subnets) == pytest.approx(X.sum(axis=1) + 5.0, rel=0.15)


def test_subnets_that_fail_are_left_out() -> None:
    calls = []

    @network_measure("ms")
    def shaky(net: Any, example_input: Any) -> float:
        calls.append(1)
        if len(calls) % 4 == 0:
            raise OSError("no cable")
        return float("nan") if len(calls) % 7 == 0 else 1.0 + len(calls)

    predictor = LatencyPredictor.fit(tiny(), shaky, n=20, example_input=IMAGE, predictor="ridge")
    assert len(calls) == 20
    assert predictor.failed == 7
    assert len(predictor.subnets) == 13

    @network_measure("ms")
    def broken(net: Any, example_input: Any) -> float:
        return float("nan")

    with pytest.raises(MeasurementError, match="Only 0 of 20 subnets could be measured"):
        LatencyPredictor.fit(tiny(), broken, n=20, example_input=IMAGE)


SPACE = tiny().search_space()
TEN = SPACE.sample(10, rng=0)
BAD: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    (lambda: LatencyPredictor.fit(tiny(), Latency, example_input=IMAGE), ("not a measure",)),  # type: ignore[arg-type] # the point
    (lambda: LatencyPredictor.fit(tiny(), weight, n=3, example_input=IMAGE), ("n=3", "8")),
    (lambda: LatencyPredictor.fit(tiny(), weight, predictor="rigde"), ("'ridge'",)),
    (lambda: LatencyPredictor.fit(torch.nn.Linear(1, 1), weight), ("no elastic part",)),
    (lambda: LatencyPredictor(SPACE, TEN[:7], np.ones(7)), ("7 subnets are too few",)),
    (lambda: LatencyPredictor(SPACE, TEN, np.ones(9)), ("shape (9,)", "(10,)")),
    (lambda: LatencyPredictor(SPACE, TEN, -np.ones(10)), ("values[0] is -1.0",)),
    (lambda: LatencyPredictor(SPACE, TEN, [1.0] * 9 + [np.nan]), ("values[9] is nan",)),
    (lambda: LatencyPredictor(SPACE, [*TEN, TEN[0]], np.ones(11)), ("listed twice",)),
    (lambda: LatencyPredictor(SPACE, TEN, np.ones(10), predictor="x"), ("'ridge'",)),
]


@pytest.mark.parametrize(("call", "parts"), BAD)
def test_bad_input(call: Callable[[], Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(SubnetError) as caught:
        call()
    assert_clear(caught.value, *parts)
    with pytest.raises(ObjectiveError, match="must be a name"):
        LatencyPredictor(SPACE, TEN, np.ones(10), predictor=object())  # type: ignore[arg-type] # the point


def test_a_file_that_is_no_predictor(fitted: tuple[Any, LatencyPredictor], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    fitted[1].save(path)
    data = json.loads(path.read_text())
    for change in ({"format": "x"}, {"values": [1.0]}, {"subnets": 3}):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(StorageError) as caught:
            LatencyPredictor.load(path)
        assert_clear(caught.value, "holds no LatencyPredictor")


def test_a_module_that_prepares_its_input_is_measured_on_what_the_network_gets() -> None:
    shapes = []

    @network_measure("weight_ms")
    def weight_of_images(net: Any, example_input: Any) -> float:
        shapes.append([tuple(x.shape) for x in example_input])
        return sum(p.numel() for p in net.parameters()) / 1000

    predictor = LatencyPredictor.fit(Raw(tiny()), weight_of_images, n=8, predictor="ridge")
    assert shapes == [[(1, 1, 8, 8)]] * 8
    assert predictor.conditions["input"] == "(1, 1, 8, 8) torch.float32"
