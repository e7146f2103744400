# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from lightning_subnet import (
    Evaluation,
    FunctionEvaluator,
    History,
    NoFeasibleSubnet,
    SearchResult,
    SearchSpace,
    Subnet,
)
from lightning_subnet.errors import ObjectiveError, StorageError
from tests.problems import (
    Counting,
    NasBench201,
    assert_clear,
    conditional,
    cost,
    grid,
    record,
    search_of,
)

mpl.use("Agg")

# acc up, ms down; 1 and 4 are exact ties, 2 is dominated, 5 failed.
TABLE = {0: (0.9, 9.0), 1: (0.8, 4.0), 2: (0.7, 5.0), 3: (0.5, 1.0), 4: (0.8, 4.0)}


def result_of(constraints: Any = None, table: Any = TABLE, **more: Any) -> SearchResult:
    search = search_of(
        space=SearchSpace(n=range(10)),
        objectives={"acc": "max", "ms": "min"},
        constraints=constraints,
        **more,
    )
    for n, (acc, ms) in table.items():
        search.tell({"n": n}, acc=acc, ms=ms)
    if table is TABLE:
        search.fail({"n": 5}, "out of memory")
    return search.result()


def numbers(history: Any) -> list[int]:
    return [evaluation.number for evaluation in history]


# The front


def test_the_front_is_ordered_best_first_and_keeps_ties() -> None:
    assert numbers(result_of().front) == [0, 1, 4, 3]


def test_the_front_is_feasible() -> None:
    assert numbers(result_of({"ms": "<= 8"}).front) == [1, 4, 3]
    assert numbers(result_of({"acc": ">= 0.75"}).front) == [0, 1, 4]
    assert numbers(result_of({"ms": "<= 0.5"}).front) == []


def test_a_failed_evaluation_hides_nothing() -> None:
    # The defect of a peer: one NaN row knocked good points off the front.
    table = {0: (float("nan"), 2.0), 1: (-1.0, 2.0), 2: (-2.0, 1.0)}
    assert numbers(result_of(table=table).front) == [1, 2]


def test_an_empty_result_has_an_empty_front() -> None:
    result = search_of().result()
    assert len(result.front) == 0
    assert isinstance(result.front, History)
    assert result.minimised().shape == (0, 2)
    assert result.hypervolume({"f0": 1, "f1": 1}) == 0
    assert "0 evaluations" in str(result)
    with pytest.raises(NoFeasibleSubnet) as caught:
        _ = result.knee
    assert_clear(caught.value, "Nothing was measured yet")
    with pytest.raises(NoFeasibleSubnet) as caught:
        result.best("f0")
    assert caught.value.nearest is None


def test_directions_flip_in_one_place() -> None:
    F = result_of({"ms": "<= 8"}).minimised()
    np.testing.assert_array_equal(F[1], [-0.8, 4.0])
    assert np.isnan(F[0]).all(), "infeasible"
    assert np.isnan(F[5]).all(), "failed"


def test_hypervolume_in_the_units_of_the_objectives() -> None:
    # Above (0, 10): 0.5 * 9 below acc 0.5, 0.3 * 6 up to 0.8, 0.1 * 1 up to 0.9.
    assert result_of().hypervolume({"acc": 0, "ms": 10}) == pytest.approx(4.5 + 1.8 + 0.1)
    with pytest.raises(ObjectiveError) as caught:
        result_of().hypervolume({"acc": 0})
    assert_clear(caught.value, "no 'ms'", "'acc', 'ms'")


def test_the_knee_is_on_the_front() -> None:
    assert result_of().knee.number == 1
    with pytest.raises(NoFeasibleSubnet):
        _ = result_of({"ms": "<= 0.5"}).knee


# best


def test_best_of_an_objective_and_of_any_measure() -> None:
    result = result_of()
    assert result.best("acc").number == 0
    assert result.best("ms").number == 3
    assert result.best("acc", where={"ms": "<= 8"}).number == 1, "the first of equal ones"
    assert result.best("ms", where={"acc": [">= 0.6", "<= 0.75"]}).number == 2
    assert result_of({"ms": "<= 8"}).best("acc").number == 1, "constraints hold for best too"
    search = search_of(measures=[cost], space=conditional())
    result = search.run(Counting(), progress=False)
    assert result.best("cost").values["cost"] == result.history.column("cost").min()


def test_best_under_a_bound_relative_to_the_largest_subnet() -> None:
    table = {**TABLE, 9: (0.95, 10.0)}
    result = result_of(table=table)
    assert result.best("acc", where={"ms": "<= 50%"}).number == 1
    with pytest.raises(ObjectiveError) as caught:
        result_of().best("acc", where={"ms": "<= 50%"})
    assert_clear(caught.value, "ms <= 50%", "largest subnet", "absolute")


def test_nothing_feasible_names_the_nearest() -> None:
    result = result_of({"acc": ">= 0.6"})
    with pytest.raises(NoFeasibleSubnet) as caught:
        result.best("acc", where={"ms": "<= 2"})
    assert_clear(caught.value, "None of 6 evaluations", "acc >= 0.6 and ms <= 2", "nearest", "n=3")
    assert caught.value.nearest is result.history[3]


def test_all_failed_says_why() -> None:
    def broken(subnet: Subnet) -> dict[str, float]:
        msg = "no kernel image"
        raise RuntimeError(msg)

    result = search_of().run(FunctionEvaluator(broken), progress=False)
    assert len(result.front) == 0
    for ask in (lambda: result.best("f0"), lambda: result.knee):
        with pytest.raises(NoFeasibleSubnet) as caught:
            ask()
        assert_clear(caught.value, "All 6 evaluations failed", "RuntimeError: no kernel image")
    assert "6 failed" in str(result)


def test_best_of_what_was_not_recorded_names_what_was() -> None:
    for ask in (
        lambda: result_of().best("accuracy"),
        lambda: result_of().best("acc", where={"accuracy": ">= 1"}),
    ):
        with pytest.raises(ObjectiveError) as caught:
            ask()
        assert_clear(caught.value, "'accuracy' was not recorded", "'acc'", "'ms'")


# Tables and pictures


def test_data_frame_marks_the_front() -> None:
    frame = result_of().to_dataframe()
    assert frame["front"].tolist() == [True, True, False, True, True, False]
    assert frame["acc"].tolist()[:5] == [0.9, 0.8, 0.7, 0.5, 0.8]
    assert frame.loc[5, "status"] == "failed"


def test_text_shows_the_front() -> None:
    text = str(result_of())
    assert "6 evaluations, 1 failed, 4 on the front of 10 subnets" in text
    assert len(text.splitlines()) == 1 + 1 + 4
    assert "n=3" in text
    assert "4 on the front" in repr(result_of())


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_plot_returns_figure_and_axes(m: int) -> None:
    import matplotlib.pyplot as plt

    result = search_of(objectives={f"f{k}": "min" for k in range(m)}, budget=12).run(
        Counting(m), progress=False
    )
    figure, ax = result.plot()
    assert ax.figure is figure
    assert ax.get_ylabel().startswith("f0")
    own_figure, own = plt.subplots()
    assert result.plot(ax=own) == (own_figure, own)
    if m >= 3:
        assert result.plot(x="f2", y="f1")[1].get_xlabel().startswith("f2")
    plt.close("all")


def test_plotting_an_unknown_measure_names_those_there_are() -> None:
    with pytest.raises(ObjectiveError) as caught:
        result_of().plot(x="mss")
    assert_clear(caught.value, "'mss' was not recorded", "Did you mean 'ms'?")


def test_a_result_without_measurements_cannot_be_drawn() -> None:
    failed = search_of()
    failed.fail(failed.ask()[0], "broken")
    for result in (search_of().result(), failed.result()):
        with pytest.raises(ObjectiveError) as caught:
            result.plot()
        assert_clear(caught.value, "not recorded", "Recorded: nothing")


# Save and load


@pytest.mark.parametrize("constraints", [None, {"cost": "<= 50%"}, {"f0": "<= 70%", "f1": ">= 0"}])
def test_a_saved_result_is_the_same_result(tmp_path: Path, constraints: Any) -> None:
    search = search_of(
        space=conditional(),
        objectives={"f0": "min", "f1": "max", "cost": "min"},
        measures=[cost],
        constraints=constraints,
        strategy="nsga2",
        budget=40,
        name="ünïcode",
    )
    result = search.run(Counting(), progress=False)
    result.save(tmp_path / "result.json")
    loaded = SearchResult.load(tmp_path / "result.json")
    assert record(loaded.history) == record(result.history)
    assert loaded.name == "ünïcode"
    assert loaded.objectives == result.objectives
    assert record(loaded.front) == record(result.front)
    assert len(result.front)
    assert loaded.best("f0") == result.best("f0")
    assert loaded.history.space == result.history.space
    np.testing.assert_array_equal(loaded.minimised(), result.minimised())
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "result.json").read_text()


def test_a_saved_result_is_strict_json(tmp_path: Path) -> None:
    result = result_of()
    result.save(tmp_path / "r.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert len(data["evaluations"]) == 6


def test_a_pool_is_saved_with_its_result(tmp_path: Path) -> None:
    pool = grid().restricted_to(grid().sample(9, rng=0))
    search_of(space=pool, budget=99).run(Counting(), progress=False).save(tmp_path / "r.json")
    loaded = SearchResult.load(str(tmp_path / "r.json"))
    assert loaded.history.space.size == len(loaded.history) == 9


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "not json", '"x"', "null"])
def test_what_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(StorageError) as caught:
        SearchResult.load(path)
    assert_clear(caught.value, str(path), "no SearchResult", "SearchResult.save(path)")


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        SearchResult.load(tmp_path / "none.json")
    assert_clear(caught.value, "none.json", "SearchResult.save(path)")


def test_the_result_of_a_resumed_study_is_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/s.db", "name": "a"}
    first = search_of(**settings).run(Counting(), progress=False)
    again = search_of(**settings).result()
    assert record(again.front) == record(first.front)
    assert str(again) == str(first)


def test_the_front_of_all_measured_cells_is_the_published_one() -> None:
    nb201 = NasBench201()
    pair = (
        "cifar100/fpga"  # 15,625 evaluations through history and problem, not only through arrays
    )
    top1, latency = nb201.table(pair)
    search = search_of(space=nb201.space, objectives={"top1": "max", "latency_ms": "min"})
    problem = search.result().problem
    subnets = nb201.space.from_indices(nb201.X)
    history = History(
        nb201.space,
        (
            Evaluation(i, s, {"top1": float(top1[i]), "latency_ms": float(latency[i])})
            for i, s in enumerate(subnets)
        ),
    )
    front = SearchResult(problem, history).front
    published = nb201.fronts[pair]
    assert set(published) <= set(numbers(front)), "exact ties all stay"
    points = {(e.values["top1"], e.values["latency_ms"]) for e in front}
    assert points == {(top1[i], latency[i]) for i in published}
    best_first = [e.values["top1"] for e in front]
    assert best_first == sorted(best_first, reverse=True)
