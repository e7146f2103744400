# SPDX-License-Identifier: Apache-2.0
"""Measures: the decorator, the forms of a result, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lightning_subnet import Measure, SearchSpace, Subnet, measure
from lightning_subnet.errors import ObjectiveError
from lightning_subnet.study.measures import by_name
from tests.spaces import by_depth, error_of, flat


@measure("weights", unit="1", exact=True)
def weights(subnets: list[Subnet]) -> list[float]:
    """Count weights."""
    return [s["depth"] * s["width"] ** 2 for s in subnets]


@measure("weights_in_bulk", exact=True, takes="indices", fingerprint="v1")
def weights_in_bulk(X: np.ndarray) -> np.ndarray:
    return (X[:, 0] + 1) * np.array([8, 16])[X[:, 1]] ** 2


def test_the_decorator_keeps_what_it_is_told() -> None:
    assert isinstance(weights, Measure)
    assert (weights.name, weights.unit, weights.exact) == ("weights", "1", True)
    assert (weights.takes, weights.vectorised, weights.fingerprint) == ("subnets", False, None)
    assert (weights_in_bulk.takes, weights_in_bulk.vectorised) == ("indices", True)
    assert weights_in_bulk.fingerprint == "v1"
    assert measure("m")(len).exact is False


def test_a_measure_is_called_like_its_function() -> None:
    assert weights([flat().largest, flat().smallest]) == [768, 64]


def test_both_forms_give_the_same_values() -> None:
    space = flat()
    X = space.indices(list(space))
    values, errors = weights.evaluate(space, X)
    np.testing.assert_array_equal(values, weights_in_bulk.evaluate(space, X)[0])
    assert values.dtype == float
    np.testing.assert_array_equal(errors, np.zeros(space.size))


def test_subnets_arrive_as_a_list_in_order_with_every_choice_readable() -> None:
    space = by_depth()
    seen: list[Any] = []

    def record(subnets: list[Subnet]) -> list[int]:
        seen.append(subnets)
        return [s["ks.3"] for s in subnets]

    draws = space.sample(5, rng=0)
    measure("m")(record).evaluate(space, space.indices(draws))
    assert seen == [draws]
    assert isinstance(seen[0], list)


@pytest.mark.parametrize(
    ("returned", "values", "errors"),
    [
        ([1, 2, 3], [1, 2, 3], [0, 0, 0]),
        (np.array([1, 2, 3], dtype=np.int32), [1, 2, 3], [0, 0, 0]),
        ([True, False, True], [1, 0, 1], [0, 0, 0]),
        ([(1, 0.1), (2, 0.2), (3, 0.3)], [1, 2, 3], [0.1, 0.2, 0.3]),
        (np.array([[1, 0.1], [2, 0.2], [3, 0.3]]), [1, 2, 3], [0.1, 0.2, 0.3]),
        ([1.0, None, float("inf")], [1, np.nan, np.inf], [0, 0, 0]),
    ],
)
def test_numbers_and_pairs_are_read(returned: Any, values: list, errors: list) -> None:
    space = flat()
    got = measure("m")(lambda _: returned).evaluate(space, space.sample_indices(3, 0))
    np.testing.assert_array_equal(got, [values, errors])


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (1.5, "1.5"),
        (None, "None"),
        ([1, 2], "shape (2,)"),
        ([[1, 2, 3]] * 3, "shape (3, 3)"),
        ([[1, 2, 3], [4, 5, 6]], "shape (2, 3)"),
        (["a", "b", "c"], "['a', 'b', 'c']"),
        ([[1], [2, 3], [4]], "[[1], [2, 3], [4]]"),
        ({"a": 1}, "{'a': 1}"),
    ],
)
def test_another_result_is_refused(returned: Any, shown: str) -> None:
    space = flat()
    made = measure("speed")(lambda _: returned)
    message = error_of(ObjectiveError, lambda: made.evaluate(space, space.sample_indices(3, 0)))
    assert "'speed'" in message
    assert "asked for 3 subnets" in message
    assert shown in message
    assert "one number, or one pair (value, standard error), for each" in message


def test_an_error_of_the_function_is_not_hidden() -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        measure("m")(broken).evaluate(flat(), flat().sample_indices(3, 0))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: measure("")(len), ["''", '@measure("latency_ms"']),
        (lambda: measure("  ")(len), ["'  '"]),
        (lambda: measure(len)(len), ["built-in function len", '@measure("latency_ms"']),
        (
            lambda: measure("m", takes="index")(len),
            ["'m'", "'index'", "'subnets' or 'indices'"],
        ),
        (lambda: by_name([weights, len]), ["built-in function len", "@measure(name)"]),
        (lambda: by_name([weights, weights]), ["two measures", "'weights'"]),
    ],
)
def test_bad_measures(make: Callable[[], object], parts: list[str]) -> None:
    message = error_of(ObjectiveError, make)
    for part in parts:
        assert part in message


def test_measures_by_name_keep_their_order() -> None:
    assert list(by_name([weights_in_bulk, weights])) == ["weights_in_bulk", "weights"]
    assert by_name([]) == {}


@pytest.mark.parametrize("comparing", [True, False])
def test_each_subnet_fails_by_itself(comparing: bool) -> None:
    space, asked = SearchSpace(depth=range(4)), []

    def ms(subnets: list[Subnet]) -> list[tuple[float, float]]:
        asked.append(len(subnets))
        if any(s["depth"] == 2 and broken for s in subnets):
            raise OSError("no cable")
        return [(float(s["depth"]), 0.5) for s in subnets]

    measure, X = Measure("ms", ms, comparing=comparing), space.indices(list(space))
    broken = False
    values, errors, failures = measure.evaluate_each(space, X)
    assert (values.tolist(), errors.tolist(), failures) == ([0, 1, 2, 3], [0.5] * 4, {})
    assert asked == ([4] if comparing else [1, 1, 1, 1])
    broken = True
    values, _, failures = measure.evaluate_each(space, X)
    assert np.isnan(values).tolist() == [False, False, True, False]
    assert {i: str(why) for i, why in failures.items()} == {2: "no cable"}
