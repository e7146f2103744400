# SPDX-License-Identifier: Apache-2.0
"""Files of an earlier version are read, and its studies go on with the proposals it would make.

tests/data/previous was written by commit 6ab0839 (see make_previous.py there), and expected.json
is what that version said of its files. Proposals of model-based strategies may depend on the
arithmetic of the processor; see test_recorded_proposals.py.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_subnet import (
    FunctionEvaluator,
    Measure,
    SearchResult,
    SearchSpace,
    Subnet,
    SubnetError,
    SubnetSearch,
)
from tests import previous
from tests.previous import LatencyPredictor, LatencyTable, load_exported

EXPECTED: dict[str, Any] = json.loads((previous.PREVIOUS / "expected.json").read_text("utf-8"))
FILES = EXPECTED["exported"]

# A newer version says so when it resumes a study.
pytestmark = pytest.mark.filterwarnings("ignore:.*was made with other versions")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copy(previous.PREVIOUS / "studies.sqlite", tmp_path / "studies.db"))


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def result() -> SearchResult:
    return SearchResult.load(previous.PREVIOUS / "result.json")


def front_of(told: Any, space: SearchSpace) -> list[Subnet]:
    """Return the subnets of a recorded front."""
    return [space.subnet(entry["subnet"]) for entry in told["front"]]


def started_from(space: SearchSpace, warm_start: Any, storage: str | None = None) -> list[Subnet]:
    """Return what a new search measures in its generation 0."""
    search = SubnetSearch(
        space=space, objectives={"sum": "min"}, strategy="random", budget=60, storage=storage,
        name="new", warm_start=warm_start,
    )  # fmt: skip
    evaluator = FunctionEvaluator(lambda s: {"sum": float(s.indices.sum())})
    history = search.run(evaluator, progress=False).history
    return [e.subnet for e in history if e.generation == 0]


# A result


def test_a_result_says_what_it_did(result: SearchResult) -> None:
    assert previous.told_by(result) == EXPECTED["result"]
    assert previous.as_json(result.verified) == EXPECTED["verified"]
    text = str(result)
    assert "noisy" in text
    for evaluation in result.front:
        assert f"{evaluation.values['val_loss']:.6g}" in text
    assert "noisy" in repr(result)


def test_a_result_is_written_as_it_was(result: SearchResult, tmp_path: Path) -> None:
    result.save(tmp_path / "again.json")
    before = json.loads((previous.PREVIOUS / "result.json").read_text("utf-8"))
    assert json.loads((tmp_path / "again.json").read_text("utf-8")) == before


def test_a_result_is_a_warm_start(result: SearchResult) -> None:
    space = result.history.space
    assert started_from(space, result) == front_of(EXPECTED["result"], space)
    part = space.narrowed_to({"d.0": [2]})
    assert all(subnet in part for subnet in started_from(part, result))


def test_a_result_is_measured_again(result: SearchResult) -> None:
    again = result.remeasure(lambda s: float(s.indices.sum()) + 1, name="latency_ms")
    assert len(again.history) == len(result.front)
    assert all("latency_ms_before" in e.values for e in again.history)


# Studies


def test_all_studies_are_there(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM subnet_study")}
    assert names == {*previous.STUDIES, "fit", "noisy"} == {*EXPECTED["studies"], "fit", "noisy"}


@pytest.mark.parametrize("name", previous.STUDIES)
def test_a_study_says_what_it_did(name: str, url: str) -> None:
    result = previous.study(name, url).result()
    assert previous.told_by(result) == EXPECTED["studies"][name]["result"]


@pytest.mark.parametrize("name", previous.STUDIES)
def test_a_study_goes_on_with_the_proposals_that_it_would_have_had(name: str, url: str) -> None:
    assert previous.goes_on(name, url) == EXPECTED["studies"][name]["goes on"]


def test_what_was_asked_and_never_told_comes_first(path: Path, url: str) -> None:
    with sqlite3.connect(path) as connection:
        query = "SELECT {} JOIN subnet_study s ON s.id = x.study WHERE s.name = 'ask' ORDER BY 1"
        rows = connection.execute(
            query.format("x.number, x.subnets FROM subnet_generation x")
        ).fetchall()
        keys = {
            row[1]
            for row in connection.execute(query.format("x.number, x.key FROM subnet_evaluation x"))
        }
    space = previous.conditional()
    proposed = [space.subnet(data) for _, text in rows for data in json.loads(text)]
    untold = [subnet for subnet in proposed if subnet.key not in keys]
    assert 0 < len(untold) < len(json.loads(rows[-1][1])), "the last generation is open"
    search = previous.study("ask", url, more=True)
    assert search.ask(len(untold)) == untold


def test_a_study_of_other_settings_is_refused(url: str) -> None:
    with pytest.raises(SubnetError, match=r"made with other settings.*seed"):
        previous.study("pool", url, seed=9)
    other = previous.strategies.NSGA2(population=6, crossover=0.5)
    with pytest.raises(SubnetError, match=r"made with other settings.*crossover"):
        previous.study("pool", url, strategy=other)


@pytest.mark.parametrize("name", ["ask", "pool", "of hybrid"])
def test_a_study_is_a_warm_start(name: str, url: str) -> None:
    told = EXPECTED["studies"][name]["result"]
    settings, *_ = previous.STUDIES[name]()
    space = settings["space"]
    expected = front_of(told, space)
    assert len(expected) <= 12, "a fifth of the budget"
    assert started_from(space, name, url) == expected
    assert started_from(space, (url, name)) == expected


@pytest.mark.parametrize(("name", "key"), [("fit", "fit"), ("noisy", "result")])
def test_a_study_of_a_network_is_a_warm_start(name: str, key: str, url: str) -> None:
    space = previous.Net().search_space()
    assert space.fingerprint == EXPECTED[key]["space"]["fingerprint"]
    assert started_from(space, name, url) == front_of(EXPECTED[key], space)


def test_values_of_a_fingerprint_are_reused(url: str) -> None:
    settings = previous.PROBLEMS["mixed"]()
    measured = [e.subnet for e in previous.study("run", url).history if e.ok]
    assert len(measured) > 10

    def never(subnet: Subnet) -> dict[str, float]:
        msg = f"{subnet} was measured before"
        raise AssertionError(msg)

    search = SubnetSearch(
        **settings, strategy="random", budget=len(measured), storage=url, name="again",
        warm_start=measured,
    )  # fmt: skip
    evaluator = FunctionEvaluator(never, fingerprint=previous.SHARED)
    history = search.run(evaluator, progress=False).history
    assert {e.subnet for e in history} == set(measured)
    assert all(e.reused == ("error",) for e in history)
    for evaluation in history:
        assert (
            evaluation.values["error"] == previous.values_of(evaluation.subnet, ["error"])["error"]
        )


# Costs


def test_a_latency_table_says_what_it_did() -> None:
    told = EXPECTED["costs"]["latency_table"]
    table = LatencyTable.load(previous.PREVIOUS / "latency_table.json", device="any")
    asked = [table.space.subnet(data) for data in EXPECTED["costs"]["subnets"]]
    assert table.predict(asked) == pytest.approx(told["values"], rel=1e-9)
    assert (len(table.blocks), table.device, str(table.report)) == (
        told["blocks"],
        told["device"],
        told["report"],
    )
    assert table.measure.fingerprint == told["fingerprint"]


@pytest.mark.parametrize("name", ["latency_predictor", "latency_predictor_fitted"])
def test_a_latency_predictor_says_what_it_did(name: str) -> None:
    told = EXPECTED["costs"][name]
    predictor = LatencyPredictor.load(previous.PREVIOUS / f"{name}.json", device="any")
    asked = [predictor.space.subnet(data) for data in EXPECTED["costs"]["subnets"]]
    mean, std = predictor.predict(asked, return_std=True)
    assert mean == pytest.approx(told["mean"], rel=1e-6)
    assert std == pytest.approx(told["std"], rel=1e-6)
    assert predictor.device == told["device"]
    assert predictor.measure.fingerprint == told["fingerprint"]


@pytest.mark.parametrize(
    ("cls", "name"),
    [(LatencyTable, "latency_table"), (LatencyPredictor, "latency_predictor_fitted")],
)
def test_kept_costs_are_measures_of_the_network(cls: Any, name: str, tmp_path: Path) -> None:
    before = previous.PREVIOUS / f"{name}.json"
    kept = cls.load(before, device="any")
    measure = kept.bind(previous.Net(), torch.zeros(1, 1, 8, 8))
    assert isinstance(measure, Measure)
    space = kept.space
    values, _ = measure.evaluate(space, space.indices([space.smallest, space.largest]))
    assert 0 < values[0] < values[1]
    kept.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text("utf-8")) == json.loads(
        before.read_text("utf-8")
    )


# Exported files


@pytest.mark.parametrize("name", FILES)
def test_an_exported_file_gives_the_same_outputs(name: str) -> None:
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
    net = load_exported(previous.PREVIOUS / "exported" / name)
    assert net.subnet is not None
    assert net.subnet.to_json() == FILES[name]["subnet"]
    assert net.values == FILES[name]["values"]
    assert net.inputs == ("x",)
    expected = torch.tensor(FILES[name]["outputs"])
    torch.testing.assert_close(net(previous.images(5)), expected, rtol=1e-4, atol=1e-5)


def test_the_exported_folder_is_whole() -> None:
    folder = previous.PREVIOUS / "exported"
    names = {path.name for path in folder.iterdir()}
    assert names == {*FILES, *(f"{name}.json" for name in FILES), "README.md", "front.png"}
    text = (folder / "README.md").read_text("utf-8")
    assert all(name in text for name in FILES)
    paths = [line for line in text.splitlines() if "/work" in line or "/tmp" in line]
    assert not paths
