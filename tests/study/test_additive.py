# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lightning_subnet import Choice, SearchSpace, Subnet
from lightning_subnet.errors import SpaceError
from lightning_subnet.study.additive import Term, additive_measure
from tests.problems import assert_clear

SPACE = SearchSpace(
    {
        "depth": [1, 2, 3],
        "width.0": [8, 16],
        "width.1": Choice([8, 16, 32], when={"depth": [2, 3]}),
        "kernel.1": Choice([3, 5], when={"depth": [2, 3]}),
        "width.2": Choice([8, 16], when={"depth": [3]}),
    }
)


def price(subnet: Subnet) -> float:
    """What a subnet costs, written as one would write it for one subnet."""
    total = 100.0 + 1.5 * subnet["width.0"]
    if subnet["depth"] >= 2:
        total += subnet["width.1"] * subnet["kernel.1"] ** 2
    if subnet["depth"] >= 3:
        total += 7 * subnet["width.2"] + subnet["width.0"] * subnet["width.2"]
    return total


TERMS = [
    Term(("width.0",), 1.5 * np.array([8.0, 16.0])),
    Term(("width.1", "kernel.1"), np.outer([8.0, 16.0, 32.0], [9.0, 25.0])),
    Term(("width.2",), 7 * np.array([8.0, 16.0])),
    Term(("width.0", "width.2"), np.outer([8.0, 16.0], [8.0, 16.0])),
]


def test_every_subnet_costs_the_sum_of_its_blocks() -> None:
    measure = additive_measure("cost", SPACE, TERMS, constant=100, unit="EUR")
    assert (measure.name, measure.unit, measure.exact, measure.vectorised) == (
        "cost", "EUR", True, True,
    )  # fmt: skip
    subnets = list(SPACE)
    assert len(subnets) == SPACE.size == 2 + 12 + 24
    values, errors = measure.evaluate(SPACE, SPACE.indices(subnets))
    assert values.tolist() == [price(subnet) for subnet in subnets]
    assert not errors.any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_blocks_that_do_not_exist_add_nothing_whatever_their_indices(seed: int) -> None:
    measure = additive_measure("cost", SPACE, TERMS, constant=100)
    rng = np.random.default_rng(seed)
    raw = np.stack([rng.integers(0, len(c.values), 20) for c in SPACE.choices.values()], 1)
    expected = [price(subnet) for subnet in SPACE.from_indices(raw)]
    assert np.asarray(measure(raw)).tolist() == expected


def test_order_of_axes_is_that_of_the_named_choices() -> None:
    table = np.arange(6.0).reshape(2, 3)
    measure = additive_measure("cost", SPACE, [Term(("kernel.1", "width.1"), table)])
    subnet = SPACE.subnet(
        {"depth": 2, "width.0": 8, "width.1": 32, "kernel.1": 3}
    )  # fmt: skip
    assert measure.evaluate(SPACE, SPACE.indices([subnet]))[0].tolist() == [table[0, 2]]


def test_no_terms_is_a_constant() -> None:
    X = SPACE.indices(SPACE.sample(4, 0))
    assert additive_measure("one", SPACE, [], constant=2)(X).tolist() == [2.0] * 4
    assert additive_measure("none", SPACE, [])(X[:0]).shape == (0,)


def test_an_unknown_choice_and_a_table_of_another_shape() -> None:
    with pytest.raises(SpaceError) as caught:
        additive_measure("cost", SPACE, [TERMS[0], Term(("widht.1",), np.zeros(3))])
    assert_clear(caught.value, "'widht.1' is not a choice of the space", "'width.1'")
    for table in (np.zeros((2, 3)), np.zeros(6), np.zeros((3, 2, 1))):
        with pytest.raises(SpaceError) as caught:
            additive_measure("cost", SPACE, [Term(("width.1", "kernel.1"), table)])
        assert_clear(caught.value, "width.1", str(table.shape), "it needs (3, 2)")
