# SPDX-License-Identifier: Apache-2.0
"""The decision diagram: exact counts, a numbering that is a bijection, uniform draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from scipy.stats import chisquare

from lightning_subnet import Choice, SearchSpace
from lightning_subnet.errors import SpaceError
from lightning_subnet.space import _diagram
from lightning_subnet.space._diagram import Diagram
from lightning_subnet.space.choices import Choices
from tests.spaces import (
    brute_force,
    by_depth,
    error_of,
    nested,
    ofa_mobilenet_v3,
    ofa_resnet50_stem,
    property_test,
    spaces,
    text,
)

ENOUGH = 0.001  # seeds are fixed, so a p-value below this is a defect, not bad luck


def contents(choices: Choices, X: np.ndarray) -> list[str]:
    """Return each row as text, read by hand: no row may hold a value that does not exist."""
    np.testing.assert_array_equal(choices.canonical(X), X)
    mask = choices.active(X)
    return [
        text(
            {name: choices.values[j][row[j]] for j, name in enumerate(choices.names) if mask[i, j]}
        )
        for i, row in enumerate(X)
    ]


@property_test
@given(spaces())
def test_unrank_numbers_every_subnet_once(space: SearchSpace) -> None:
    choices = Choices(space.choices)
    diagram = Diagram(choices)
    oracle = brute_force(space)
    assert diagram.size == len(oracle)
    assert diagram.is_numbered
    numbered = contents(choices, diagram.unrank(np.arange(diagram.size)))
    assert len(set(numbered)) == len(numbered)
    assert set(numbered) == set(oracle)


@property_test
@given(spaces())
def test_unrank_takes_ranks_in_any_order_and_repeated(space: SearchSpace) -> None:
    diagram = Diagram(Choices(space.choices))
    ranks = np.random.default_rng(0).integers(diagram.size, size=40)
    every = diagram.unrank(np.arange(diagram.size))
    np.testing.assert_array_equal(diagram.unrank(ranks), every[ranks])


@property_test
@given(spaces())
def test_draws_are_subnets(space: SearchSpace) -> None:
    choices = Choices(space.choices)
    draws = contents(choices, Diagram(choices).draw(50, np.random.default_rng(0)))
    assert set(draws) <= set(brute_force(space))


@pytest.mark.parametrize("space", [by_depth(), nested()])
def test_draws_are_uniform_over_distinct_subnets(space: SearchSpace) -> None:
    choices = Choices(space.choices)
    draws = contents(choices, Diagram(choices).draw(200 * space.size, np.random.default_rng(0)))
    counts = np.unique(draws, return_counts=True)[1]
    assert len(counts) == space.size
    assert chisquare(counts).pvalue > ENOUGH


@property_test
@given(spaces())
def test_parents_are_placed_before_children(space: SearchSpace) -> None:
    order = Diagram(Choices(space.choices)).order
    assert sorted(order) == list(range(len(space.choices)))
    names = [list(space.choices)[j] for j in order]
    for name, choice in space.choices.items():
        assert all(names.index(parent) < names.index(name) for parent in choice.when)


# Counts with a source


def test_ofa_mobilenet_v3_has_7371_to_the_5() -> None:
    diagram = Diagram(Choices(ofa_mobilenet_v3().choices))
    assert diagram.size == 7371**5 == (9**2 + 9**3 + 9**4) ** 5
    assert not diagram.is_numbered


def test_equal_values_count_once() -> None:
    assert Diagram(Choices(ofa_resnet50_stem().choices)).size == 2 * 9 * (9 + 27 + 81)


def test_skippable_blocks_are_powers_of_two() -> None:  # ResNet-56: 2^24, shared/data/README.md
    space = SearchSpace({f"skip.{i}": [False, True] for i in range(24)})
    assert Diagram(Choices(space.choices)).size == 2**24


def test_counts_stay_exact_past_64_bits() -> None:
    layers = {
        f"k.{i}": Choice([3, 5, 7], when={"depth": list(range(i + 1, 101))}) for i in range(100)
    }
    choices = Choices({"depth": Choice(range(1, 101)), **layers})
    assert Diagram(choices).size == sum(3**depth for depth in range(1, 101))


def test_ofa_has_few_states_in_every_layer() -> None:
    diagram = Diagram(Choices(ofa_mobilenet_v3().choices))
    assert max(len(layer) for layer in diagram.transitions) <= 3


def test_numbering_works_up_to_its_bound() -> None:
    below = Diagram(Choices({f"b.{i}": Choice([0, 1]) for i in range(61)}))
    assert below.size == 2**61
    assert below.is_numbered
    np.testing.assert_array_equal(below.unrank(np.array([0, 2**61 - 1])), [[0] * 61, [1] * 61])
    assert not Diagram(Choices({f"b.{i}": Choice([0, 1]) for i in range(62)})).is_numbered


def test_draws_from_ofa_have_the_exact_share_of_depths() -> None:
    choices = Choices(ofa_mobilenet_v3().choices)
    X = Diagram(choices).draw(20_000, np.random.default_rng(0))
    np.testing.assert_array_equal(choices.canonical(X), X)
    expected = 20_000 * np.array([9**2, 9**3, 9**4]) / 7371
    for stage in range(5):
        assert chisquare(np.bincount(X[:, stage], minlength=3), expected).pvalue > ENOUGH
    deep = X[X[:, 0] == 2]
    for column in (choices.position["ks.3"], choices.position["e.0"]):
        assert chisquare(np.bincount(deep[:, column], minlength=3)).pvalue > ENOUGH


def test_entangled_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_diagram, "_MAX_STATES", 100)  # at the real limit this takes seconds
    gates = {f"gate.{i}": Choice([0, 1]) for i in range(10)}
    pairs = {
        f"x{i}{j}": Choice([1, 2], when={f"gate.{i}": [1], f"gate.{j}": [1]})
        for i in range(10)
        for j in range(i)
    }
    message = error_of(SpaceError, lambda: Diagram(Choices({**gates, **pairs})))
    assert "too entangled" in message
    assert "depend on fewer" in message
