# SPDX-License-Identifier: Apache-2.0
"""Problem: bounds, scores and fronts of a history, by hand; spaces that are not the model's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lightning_subnet import Choice, Evaluation, History, Measure, SearchSpace
from lightning_subnet.errors import MeasurementError, ObjectiveError, SearchError
from lightning_subnet.study.objectives import parse_constraints, parse_objectives
from lightning_subnet.study.problem import Problem, check_part
from tests.problems import assert_clear

SPACE = SearchSpace(depth=[1, 2, 3, 4], width=[8, 16])
OBJECTIVES = parse_objectives({"error": "min", "macs": "min"})


def macs(X: np.ndarray) -> np.ndarray:
    return (X[:, 0] + 1.0) * (X[:, 1] + 1.0)


MACS = Measure("macs", macs, exact=True, takes="indices")


def history(*errors: float | str) -> History:
    """Return evaluations of the first subnets by error; a text is why one failed."""
    evaluations = History(SPACE)
    for number, (subnet, error) in enumerate(zip(SPACE, errors, strict=False)):
        cost = float(macs(subnet.indices[None])[0])
        if isinstance(error, str):
            failed = Evaluation(number, subnet, {"macs": cost}, status="failed", reason=error)
            evaluations.add(failed)
        else:
            evaluations.add(Evaluation(number, subnet, {"error": error, "macs": cost}))
    return evaluations


def problem(constraints: Any = None, *measures: Measure) -> Problem:
    return Problem.of(SPACE, OBJECTIVES, parse_constraints(constraints), measures)


def test_names_are_those_of_objectives_and_constraints_once_each() -> None:
    assert problem({"macs": "<= 4", "ms": ["<= 3", ">= 1"]}).names == ("error", "macs", "ms")


def test_scores_of_failures_are_nan_and_infinitely_bad() -> None:
    F, violations = problem({"macs": "<= 2"}).scores(history(0.5, "broke", 0.2))
    np.testing.assert_array_equal(F[[0, 2]], [[0.5, 1], [0.2, 2]])
    assert np.isnan(F[1, 0])
    assert violations.tolist() == [0, math.inf, 0]
    assert problem({"macs": "<= 1"}).feasible(history(0.5, 0.1, "broke")).tolist() == [
        True, False, False,
    ]  # fmt: skip


def test_a_front_is_feasible_ordered_and_keeps_exact_ties() -> None:
    # Rows of the space: macs 1, 2, 2, 4, 3, 6, 4, 8.
    evaluations = history(0.5, 0.4, 0.4, 0.1, 0.45, "broke", 0.1, 0.05)
    front = problem().front(evaluations)
    assert [e.number for e in front] == [7, 3, 6, 1, 2, 0]
    assert [e.number for e in problem({"macs": "<= 3"}).front(evaluations)] == [1, 2, 0]
    assert problem().front(History(SPACE)) == []


def test_relative_bounds_of_exact_measures_need_no_evaluation() -> None:
    (bound,) = problem({"macs": "<= 50%"}, MACS).exact_constraints
    assert (bound.bound, bound.relative) == (4.0, False)
    assert problem({"macs": "<= 50%"}, MACS).needs_reference == ()
    rows = SPACE.indices(list(SPACE))
    violations = problem({"macs": "<= 50%"}, MACS).exact_violation(rows)
    assert (violations == 0).tolist() == (macs(rows) <= 4).tolist()


def test_relative_bounds_of_others_need_the_largest_subnet() -> None:
    relative = problem({"error": "<= 200%"})
    assert relative.needs_reference == ("error",)
    with pytest.raises(ObjectiveError) as caught:
        relative.bounds(history(0.5))
    assert_clear(caught.value, "'error'", "largest subnet", "Measure and tell space.largest first")
    whole = history(0.5, 0.4, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1)
    (bound,) = relative.bounds(whole)
    assert (bound.bound, bound.relative) == (0.2, False)
    assert [e.number for e in relative.front(whole)] == [6, 4]
    failed = history(0.5, 0.4, 0.3, 0.2, 0.2, 0.1, 0.1, "no memory")
    with pytest.raises(ObjectiveError) as caught:
        relative.bounds(failed)
    assert_clear(caught.value, "failed (no memory)", "absolute bound under another name=")


def test_what_contradicts_itself_or_has_two_meanings_is_refused() -> None:
    with pytest.raises(ObjectiveError) as caught:
        problem({"macs": ["<= 3", ">= 50%"]}, MACS)
    assert_clear(caught.value, "contradict")
    with pytest.raises(ObjectiveError) as caught:
        Problem.of(SPACE, parse_objectives({"depth": "min"}), (), [])
    assert_clear(caught.value, "'depth' is a choice of the space and a measure")


def test_an_exact_measure_that_fails_for_a_subnet_is_nan_there() -> None:
    def picky(subnets: Any) -> list[float]:
        if any(subnet["depth"] == 2 for subnet in subnets):
            msg = "no depth of two"
            raise ValueError(msg)
        return [float(subnet["depth"]) for subnet in subnets]

    rows = SPACE.indices(list(SPACE))
    values = problem(None, Measure("macs", picky, exact=True)).exact_values("macs", rows)
    np.testing.assert_array_equal(values, [1, 1, np.nan, np.nan, 3, 3, 4, 4])


@pytest.mark.parametrize("error", [ValueError, MeasurementError, ObjectiveError])
def test_an_exact_measure_that_always_fails_is_an_error(error: type[Exception]) -> None:
    def broken(_: Any) -> list[float]:
        msg = "never"
        raise error(msg)

    with pytest.raises(error, match="never"):
        problem(None, Measure("macs", broken, exact=True)).exact_values(
            "macs", SPACE.indices(SPACE)
        )


# Spaces of a model


def test_a_part_of_the_model_s_space_passes() -> None:
    for part in (
        SPACE,
        SPACE.narrowed_to({"depth": [2, 3]}),
        SPACE.restricted_to(SPACE.sample(3, rng=0)),
    ):
        check_part(part, SPACE, [MACS])


def test_a_space_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SearchError) as caught:
        check_part(SearchSpace(depth=[1, 9], width=[8, 16]), SPACE)
    assert_clear(caught.value, "space= does not fit", "9", "restricted_to")


def test_other_indices_are_refused_where_a_measure_reads_them() -> None:
    other = SearchSpace({"depth": Choice([2, 3]), "width": [8, 16]})
    check_part(other, SPACE, [Measure("ms", len)])
    with pytest.raises(SearchError) as caught:
        check_part(other, SPACE, [MACS])
    assert_clear(caught.value, "'macs' would read its value indices", "narrowed_to")
