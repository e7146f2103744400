# SPDX-License-Identifier: Apache-2.0
"""Objectives and constraints: parsing, relative bounds, violations, and the flip of directions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lightning_subnet import Constraint, Objective
from lightning_subnet.errors import ObjectiveError
from lightning_subnet.study.objectives import (
    check_consistent,
    minimised,
    parse_constraints,
    parse_objectives,
    violation,
)
from tests.spaces import error_of, property_test

INF, NAN = math.inf, math.nan


# Objectives


def test_objectives_keep_their_order() -> None:
    assert parse_objectives({"b": "max", "a": "min"}) == (
        Objective("b", "max"),
        Objective("a", "min"),
    )


@pytest.mark.parametrize(
    ("given_objectives", "parts"),
    [
        ({}, ["objectives={}", 'objectives={"val_acc": "max", "macs": "min"}']),
        (None, ["objectives=None"]),
        (["val_acc"], ["objectives=['val_acc']"]),
        ("val_acc", ["objectives='val_acc'"]),
        ({"acc": "maxi"}, ["'acc'", "'min' or 'max'", "'maxi'", "Did you mean 'max'?"]),
        ({"acc": "up"}, ["'acc'", "'min' or 'max'", "'up'"]),
        ({"acc": True}, ["'acc'", "True"]),
        ({"acc": ["max"]}, ["'acc'", "['max']"]),
    ],
)
def test_bad_objectives(given_objectives: Any, parts: list[str]) -> None:
    message = error_of(ObjectiveError, lambda: parse_objectives(given_objectives))
    for part in parts:
        assert part in message


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_directions_flip(m: int) -> None:
    columns = {f"o{i}": np.random.default_rng(i).random(5) for i in range(m)}
    objectives = [Objective(f"o{i}", "max" if i % 2 else "min") for i in range(m)]
    F = minimised(objectives, columns)
    assert F.shape == (5, m)
    for i in range(m):
        np.testing.assert_array_equal(F[:, i], -columns[f"o{i}"] if i % 2 else columns[f"o{i}"])


def test_columns_follow_the_objectives_and_are_left_alone() -> None:
    columns = {"a": np.array([1.0, NAN]), "b": np.array([INF, -2.0]), "unused": np.zeros(2)}
    F = minimised([Objective("b", "max"), Objective("a", "min")], columns)
    np.testing.assert_array_equal(F, [[-INF, 1.0], [2.0, NAN]])
    np.testing.assert_array_equal(columns["b"], [INF, -2.0])


# Parsing bounds


@pytest.mark.parametrize(
    ("written", "upper", "bound", "relative"),
    [
        ("<= 3e8", True, 3e8, False),
        (">= 0.7", False, 0.7, False),
        ("<=12", True, 12.0, False),
        ("  <=   12  ", True, 12.0, False),
        (">= -5", False, -5.0, False),
        ("<= +5", True, 5.0, False),
        ("<= .5", True, 0.5, False),
        ("<= 3_000_000", True, 3e6, False),
        (">= 0", False, 0.0, False),
        ("<= 60%", True, 0.6, True),
        ("<= 60 %", True, 0.6, True),
        (">=99.5%", False, 0.995, True),
        (">= 110% ", False, 1.1, True),
    ],
)
def test_bounds_are_parsed(written: str, upper: bool, bound: float, relative: bool) -> None:
    parsed = Constraint.parse("m", written)
    assert (parsed.name, parsed.upper, parsed.relative) == ("m", upper, relative)
    assert parsed.bound == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize(
    "written",
    [
        "", "12", "<=", "< 12", "> 12", "== 3", "=< 3", "<= twelve", "<= 1 2", "<= 3 ms", "<= %",
        "<= 60%%", "<= %60", "<= nan", "<= inf", ">= -inf", "<= 1e999", "<= 3e8 <= 4e8", "<= 0x10",
        "≤ 3", 12, 3e8, None, True, ("<=", 3),
    ],
)  # fmt: skip
def test_what_is_no_bound_is_refused(written: Any) -> None:
    message = error_of(ObjectiveError, lambda: Constraint.parse("latency_ms", written))
    assert "'latency_ms'" in message
    assert repr(written) in message
    assert "'<= 3e8'" in message
    assert "'<= 60%'" in message


@property_test
@given(
    st.booleans(),
    st.floats(-1e12, 1e12, allow_nan=False).map(lambda x: float(f"{x:g}")),
    st.booleans(),
)
def test_what_is_printed_parses_back(upper: bool, bound: float, relative: bool) -> None:
    constraint = Constraint("m", upper, bound, relative)
    again = Constraint.parse("m", str(constraint).removeprefix("m "))
    assert (again.upper, again.relative) == (upper, relative)
    assert again.bound == pytest.approx(bound, rel=1e-5)


def test_several_bounds_on_one_measure() -> None:
    parsed = parse_constraints({"acc": [">= 0.7", "<= 0.9"], "macs": "<= 60%"})
    assert [str(c) for c in parsed] == ["acc >= 0.7", "acc <= 0.9", "macs <= 60%"]
    assert parse_constraints(None) == parse_constraints({}) == ()


@pytest.mark.parametrize(
    ("constraints", "parts"),
    [
        ({"acc": [">= 0.9", "<= 0.7"]}, ["acc >= 0.9", "acc <= 0.7", "contradict", "Loosen"]),
        ({"acc": ["<= 0.7", ">= 0.9"]}, ["contradict"]),
        ({"acc": ["<= 50%", ">= 60%"]}, ["acc >= 60%", "acc <= 50%", "contradict"]),
        ({"acc": ["<= 3", ">= 1", ">= 4"]}, ["acc >= 4", "acc <= 3"]),
        ({"macs": 3e8}, ["'macs'", "300000000.0", "'<= 3e8'"]),
        ({"macs": ["<= 3", None]}, ["'macs'", "None"]),
        (["macs <= 3e8"], ["['macs <= 3e8']", 'constraints={"macs": "<= 3e8"}']),
        ("macs <= 3e8", ["'macs <= 3e8'", 'constraints={"macs": "<= 3e8"}']),
    ],
)
def test_bad_constraints(constraints: Any, parts: list[str]) -> None:
    message = error_of(ObjectiveError, lambda: parse_constraints(constraints))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "constraints",
    [
        {"a": [">= 3", "<= 3"]},
        {"a": ">= 4", "b": "<= 3"},
        {"a": [">= 4", "<= 60%"]},  # known only when the largest subnet is measured
        {"a": [">= 1", ">= 5", "<= 9", "<= 7"]},
    ],
)
def test_bounds_that_some_number_satisfies_pass(constraints: Any) -> None:
    assert parse_constraints(constraints)


def test_a_contradiction_that_the_reference_brings_is_found() -> None:
    low, high = parse_constraints({"a": [">= 4", "<= 60%"]})
    check_consistent([low.absolute(10.0), high.absolute(10.0)])
    with pytest.raises(ObjectiveError, match="a >= 4 and a <= 3 contradict"):
        check_consistent([low.absolute(5.0), high.absolute(5.0)])


# Relative to absolute


def test_a_relative_bound_is_a_share_of_the_largest() -> None:
    constraint = Constraint.parse("params", "<= 60%").absolute(5e6)
    assert constraint == Constraint("params", True, 3e6)
    assert Constraint.parse("acc", ">= 99%").absolute(0.8).bound == pytest.approx(0.792)


def test_an_absolute_bound_needs_no_reference() -> None:
    constraint = Constraint.parse("params", "<= 3")
    assert constraint.absolute(NAN) is constraint


@pytest.mark.parametrize("reference", [0.0, -1.0, NAN, INF])
def test_a_relative_bound_needs_a_positive_reference(reference: float) -> None:
    constraint = Constraint.parse("loss", "<= 60%")
    message = error_of(ObjectiveError, lambda: constraint.absolute(reference))
    for part in ("loss <= 60%", f"is {reference}", "positive reference", "give an absolute one"):
        assert part in message


# Violations


@pytest.mark.parametrize(
    ("written", "values", "expected"),
    [
        ("<= 10", [9, 10, 11, 20, -50], [0, 0, 0.1, 1, 0]),
        (">= 10", [9, 10, 11, 0, -10], [0.1, 0, 0, 1, 2]),
        ("<= -10", [-10, -9, 0, -11], [0, 0.1, 1, 0]),
        ("<= 0", [0, -1, 2], [0, 0, 2]),
        ("<= 10", [NAN, INF, -INF], [INF, INF, 0]),
        (">= 10", [NAN, INF, -INF], [INF, 0, INF]),
    ],
)
def test_violation(written: str, values: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(Constraint.parse("m", written).violation(values), expected)


@property_test
@given(
    st.booleans(),
    st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-100),
    st.lists(st.floats(-1e100, 1e100), max_size=8),
)
def test_violation_is_zero_exactly_where_the_bound_holds(
    upper: bool, bound: float, values: list[float]
) -> None:
    missed = Constraint("m", upper, bound).violation(values)
    holds = [v <= bound if upper else v >= bound for v in values]
    assert (missed == 0).tolist() == holds
    assert (missed >= 0).all()


def test_violations_add_up_over_constraints() -> None:
    constraints = parse_constraints({"a": "<= 10", "b": ">= 4"})
    columns = {"a": np.array([10.0, 11.0, 20.0, NAN]), "b": np.array([4.0, 2.0, 9.0, 9.0])}
    np.testing.assert_allclose(violation(constraints, columns, 4), [0, 0.1 + 0.5, 1.0, INF])
    np.testing.assert_array_equal(violation((), {}, 3), np.zeros(3))
