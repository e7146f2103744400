# SPDX-License-Identifier: Apache-2.0
"""Designs against counts by hand: conditions, equal values, pools, narrowed spaces, warm starts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lightning_subnet import Choice, History, SearchSpace
from lightning_subnet.strategies._toolkit.sampling import balanced_rows, by_choice, first_batch
from lightning_subnet.strategies.base import uniform_draws
from tests.problems import conditional, grid, history_of, mixed, problem_of
from tests.space.test_narrowed import narrowed
from tests.spaces import ofa_mobilenet_v3, property_test, spaces


def counts(space: SearchSpace, X: np.ndarray) -> dict[str, list[int]]:
    """Return by choice how often each value occurs that differs from others and that it takes."""
    found = {}
    subnets = space.from_indices(X)
    for name, choice in space.choices.items():
        firsts = [choice.values[choice.representative(i)] for i in range(len(choice.values))]
        taken = [firsts[choice.values.index(value)] for value in space.values[name]]
        seen = [s.active[name] for s in subnets if name in s.active]
        assert set(seen) <= set(taken)
        found[name] = [seen.count(value) for value in dict.fromkeys(taken)]
    return found


def none(space: SearchSpace) -> np.ndarray:
    return np.zeros((0, len(space.names)), dtype=int)


def assert_balanced(space: SearchSpace, X: np.ndarray) -> None:
    for name, seen in counts(space, X).items():
        assert max(seen) - min(seen) <= 1, (name, seen)


# The design


@property_test
@given(st.lists(st.integers(1, 6), min_size=2, max_size=8), st.integers(1, 40), st.integers(0, 99))
def test_values_are_as_often_after_every_row(sizes: list[int], n: int, seed: int) -> None:
    space = SearchSpace({f"x.{i}": range(size) for i, size in enumerate([*sizes, 2])})
    X = balanced_rows(space, none(space), n, np.random.default_rng(seed))
    assert X.shape == (n, len(sizes) + 1)
    for k in range(1, n + 1):
        for column, size in zip(X[:k].T, [*sizes, 2], strict=True):
            seen = np.bincount(column, minlength=size)
            assert len(seen) == size
            assert np.ptp(seen) <= 1


@property_test
@given(spaces(), st.integers(0, 30), st.integers(0, 99))
def test_values_are_as_often_where_their_choice_exists(
    space: SearchSpace, n: int, seed: int
) -> None:
    X = balanced_rows(space, none(space), n, np.random.default_rng(seed))
    np.testing.assert_array_equal(X, space.canonical(X))
    assert_balanced(space, X)


@property_test
@given(narrowed(), st.integers(0, 99))
def test_a_narrowed_space_has_its_own_values_as_often(made: tuple, seed: int) -> None:
    whole, _, space, _ = made
    if space.is_pool:
        return
    X = balanced_rows(space, none(space), 20, np.random.default_rng(seed))
    assert all(subnet in space for subnet in space.from_indices(X))
    assert all(subnet in whole for subnet in space.from_indices(X))
    assert_balanced(space, X)


def test_values_that_mean_the_same_count_as_one() -> None:
    space = mixed()
    X = balanced_rows(space, none(space), 24, np.random.default_rng(0))
    assert counts(space, X)["stem"] == [12, 12]
    drawn = by_choice(problem_of(space))(3000, np.random.default_rng(0))
    assert np.bincount(drawn[:, 1], minlength=3) / 3000 == pytest.approx([0.5, 0, 0.5], abs=0.04)


def test_what_is_there_is_counted_and_caught_up_with() -> None:
    space = SearchSpace(a=[1, 2, 3], b=["x", "y"])
    there = space.indices([space.subnet(a=1, b=b) for b in ("x", "y")] * 2)
    X = balanced_rows(space, there, 8, np.random.default_rng(0))
    assert 0 not in X[:, 0]
    assert np.bincount(X[:, 0]).tolist() == [0, 4, 4]
    assert np.bincount(X[:, 1]).tolist() == [4, 4]
    assert sorted(
        balanced_rows(space, np.vstack([there, X]), 3, np.random.default_rng(1))[:, 0]
    ) == [
        0,
        1,
        2,
    ]
    # Under conditions: of ks.3 only those count that exist.
    deep = conditional()
    there = deep.indices([deep.subnet(depth=2, ks=[3, 3, 3, 3])] * 9)
    X = balanced_rows(deep, there, 18, np.random.default_rng(0))
    assert counts(deep, X)["depth"] == [0, 9, 9]
    assert counts(deep, X)["ks.3"] == [3, 3, 3]
    assert counts(deep, X)["ks.0"] == [0, 9, 9]


def test_a_design_is_the_same_again_and_another_under_another_seed() -> None:
    space = ofa_mobilenet_v3()
    one, same, other = (
        balanced_rows(space, none(space), 30, np.random.default_rng(s)) for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any(axis=1).all()
    assert len(np.unique(one, axis=0)) == 30


# The batch


def test_a_batch_counts_the_history_and_what_is_pending() -> None:
    space = grid(10, 4)
    problem = problem_of(space)
    rng = np.random.default_rng(0)
    warm = [space.subnet(dict.fromkeys(space.names, 0))]  # a warm start
    pending = first_batch(problem, history_of(problem, warm), 6, rng, ())
    batch = first_batch(problem, history_of(problem, warm), 9, rng, pending)
    assert len(batch) == 9
    together = space.indices([*warm, *pending, *batch])
    assert len(np.unique(together, axis=0)) == 16
    assert (np.apply_along_axis(np.bincount, 0, together) == 4).all()
    failed = history_of(problem, warm, failed=lambda number: True)
    again = space.indices([*warm, *first_batch(problem, failed, 3, rng, ())])
    assert (np.apply_along_axis(np.bincount, 0, again) == 1).all()


def test_a_batch_of_a_pool_is_of_members_and_spread() -> None:
    whole = grid(5, 4)
    pool = whole.restricted_to(whole.sample(300, rng=1))
    problem = problem_of(pool)
    far = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        batch = first_batch(problem, History(pool), 16, rng, ())
        assert len(set(batch)) == 16
        assert all(subnet in pool for subnet in batch)
        drawn = pool.sample(16, rng)
        for subnets in (batch, drawn):
            seen = np.apply_along_axis(np.bincount, 0, pool.indices(subnets), minlength=4)
            far.append(np.abs(seen - 4).mean())
    assert np.mean(far[::2]) < 0.8 * np.mean(far[1::2])  # nearer to 4 of each than random members


@pytest.mark.parametrize("space", [conditional(), mixed(), grid(2, 5)], ids=repr)
def test_a_batch_takes_a_space_to_its_end(space: SearchSpace) -> None:
    problem = problem_of(space)
    batch = first_batch(problem, History(space), space.size + 5, np.random.default_rng(0), ())
    assert set(batch) == set(space)


def test_what_breaks_an_exact_constraint_waits() -> None:
    space = conditional()
    problem = problem_of(space, constraints={"cost": "<= 5"})
    batch = first_batch(problem, History(space), 15, np.random.default_rng(0), ())
    assert len(set(batch)) == 15
    assert (problem.exact_violation(space.indices(batch)) <= 0).all()


# Draws


@pytest.mark.parametrize(
    "space",
    [grid(4, 4), grid(4, 4).restricted_to(grid(4, 4).sample(60, rng=1))],
    ids=["all", "pool"],
)
def test_draws_without_conditions_are_uniform(space: SearchSpace) -> None:
    problem = problem_of(space)
    one = by_choice(problem)(50, np.random.default_rng(3))
    np.testing.assert_array_equal(one, uniform_draws(problem)(50, np.random.default_rng(3)))


def test_a_pool_under_conditions_is_drawn_uniformly() -> None:
    pool = conditional().restricted_to(conditional().sample(40, rng=1))
    drawn = by_choice(problem_of(pool))(30, np.random.default_rng(0))
    assert len(np.unique(drawn, axis=0)) == 30
    assert all(subnet in pool for subnet in pool.from_indices(drawn))


def test_draws_have_equal_depths_where_uniform_ones_are_deep() -> None:
    space = ofa_mobilenet_v3()
    problem = problem_of(space)
    X = by_choice(problem)(3000, np.random.default_rng(0))
    np.testing.assert_array_equal(X, space.canonical(X))
    for seen in counts(space, X).values():  # of 3,000 or fewer: within four standard deviations
        share = np.array(seen) / sum(seen)
        assert np.abs(share - 1 / len(seen)).max() < 4 * np.sqrt(2 / 9 / sum(seen))
    deepest = uniform_draws(problem)(1000, np.random.default_rng(0))[:, :5] == 2
    assert deepest.mean() == pytest.approx(6561 / 7371, abs=0.02)  # 9^4 of 9^2 + 9^3 + 9^4


def test_draws_of_a_narrowed_space_are_of_the_values_that_stayed() -> None:
    space = SearchSpace(
        {
            "depth": [1, 2, 3],
            "op": Choice(["a", "b", "c"], ordered=False),
            "ks": Choice([3, 5, 7], when={"depth": [2, 3]}),
        }
    ).narrowed_to({"depth": [1, 3], "ks": [5, 7], "op": ["c"]})
    X = by_choice(problem_of(space))(2000, np.random.default_rng(0))
    seen = counts(space, X)
    assert seen["op"] == [2000]
    assert seen["depth"] == pytest.approx([1000, 1000], abs=90)
    assert seen["ks"] == pytest.approx([500, 500], abs=90)
