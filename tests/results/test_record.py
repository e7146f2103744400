# SPDX-License-Identifier: Apache-2.0
"""Fronts, knees, bests and hypervolumes of what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_subnet import (
    Evaluation,
    FunctionEvaluator,
    History,
    Measure,
    NoFeasibleSubnet,
    SearchResult,
    SearchSpace,
    Subnet,
)
from lightning_subnet.errors import ObjectiveError
from lightning_subnet.results import SearchRecord
from lightning_subnet.results.record import unit_and_conditions
from tests.problems import (
    Counting,
    NasBench201,
    assert_clear,
    conditional,
    cost,
    search_of,
)

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


def test_a_record_needs_no_search_and_second_values_decide_its_front() -> None:
    before = result_of()
    second = {before.history[1].subnet.key: {"ms": (12.0, 0.5)}}
    record = SearchRecord(before.problem, before.history, name="a", verified=second)
    assert numbers(before.front) == [0, 1, 4, 3]
    assert numbers(record.front) == [0, 4, 3]
    assert record.final[1].values["ms"] == 12.0
    assert record.history[1].values["ms"] == 4.0
    assert repr(record) == "<SearchRecord 'a': 6 evaluations, 3 on the front>"


def test_units_of_measures_and_the_conditions_of_noisy_ones() -> None:
    def fn(subnets: list[Subnet]) -> list[float]:
        return [1.0] * len(subnets)

    text = "ms: CPU, 4 threads, 0123456789abcdef"
    noisy = Measure("ms", fn, unit="ms", fingerprint=text)
    assert unit_and_conditions(noisy) == {"unit": "ms", "conditions": "CPU, 4 threads"}
    exact = Measure("macs", fn, unit="MAC", exact=True, fingerprint=text)
    assert unit_and_conditions(exact) == {"unit": "MAC"}
    assert unit_and_conditions(Measure("x", fn)) == {"unit": ""}
