# SPDX-License-Identifier: Apache-2.0
"""Fronts against pymoo, moocore and brute force: NaN, infinities, ties and duplicates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import moocore
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from lightning_subnet.errors import ObjectiveError
from lightning_subnet.study.pareto import (
    attainment,
    hypervolume,
    hypervolumes,
    knee,
    nondominated,
    nondominated_ranks,
)
from tests.spaces import error_of, property_test

INF, NAN = float("inf"), float("nan")


def brute_ranks(points: np.ndarray) -> np.ndarray:
    """Peel fronts off by pairwise comparison; rows with a NaN come last, together."""
    left = [i for i in range(len(points)) if not np.isnan(points[i]).any()]
    ranks = np.full(len(points), -1)
    rank = 0
    while left:
        front = [
            i
            for i in left
            if not any(
                (points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in left
            )
        ]
        ranks[front] = rank
        left = [i for i in left if i not in front]
        rank += 1
    ranks[ranks < 0] = rank
    return ranks


def clouds(values: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(0, 14), st.integers(1, 4))
    return shapes.flatmap(lambda shape: arrays(float, shape, elements=values))


any_value = st.sampled_from([NAN, INF, -INF, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0])


# Non-dominated points


def test_a_nan_takes_no_good_point_away() -> None:
    assert nondominated([[NAN, 2], [1, 2], [2, 1]]).tolist() == [False, True, True]
    assert nondominated_ranks([[NAN, 2], [1, 2], [2, 1]]).tolist() == [1, 0, 0]
    assert nondominated([[NAN, -9], [1, 2], [2, 1]]).tolist() == [False, True, True]


def test_exact_ties_stay_and_weakly_dominated_points_go() -> None:
    assert nondominated([[1, 2], [1, 2], [1, 3], [0, 9]]).tolist() == [True, True, False, True]
    assert nondominated_ranks([[1, 2], [1, 2], [1, 3], [0, 9]]).tolist() == [0, 0, 1, 0]


@property_test
@given(clouds(any_value))
def test_fronts_against_brute_force(points: np.ndarray) -> None:
    before = points.copy()
    good = ~np.isnan(points).any(axis=1)
    expected = brute_ranks(points)
    assert nondominated_ranks(points).tolist() == expected.tolist()
    assert nondominated(points).tolist() == (good & (expected == 0)).tolist()
    np.testing.assert_array_equal(points, before)


@property_test
@given(clouds(any_value), st.lists(st.booleans(), min_size=4, max_size=4))
def test_maximising_is_minimising_the_negative(points: np.ndarray, flips: list[bool]) -> None:
    maximise = flips[: points.shape[1]]
    negative = np.where(maximise, -points, points)
    np.testing.assert_array_equal(nondominated(points, maximise=maximise), nondominated(negative))
    np.testing.assert_array_equal(
        nondominated_ranks(points, maximise=maximise), nondominated_ranks(negative)
    )
    np.testing.assert_array_equal(nondominated(points, maximise=True), nondominated(-points))


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [4, 10**6])  # with ties and duplicates, and without
def test_ranks_against_pymoo_and_moocore(m: int, levels: int) -> None:
    points = np.random.default_rng(m).integers(levels, size=(200, m)).astype(float)
    expected = np.empty(len(points), dtype=int)
    for rank, front in enumerate(NonDominatedSorting().do(points)):
        expected[front] = rank
    np.testing.assert_array_equal(nondominated_ranks(points), expected)
    np.testing.assert_array_equal(nondominated_ranks(points), moocore.pareto_rank(points))
    np.testing.assert_array_equal(nondominated(points), expected == 0)


def test_one_objective() -> None:
    assert nondominated([[3], [1], [1], [NAN]]).tolist() == [False, True, True, False]
    assert nondominated_ranks([[3], [1], [1], [NAN]]).tolist() == [1, 0, 0, 2]
    for maximise, expected in [(True, [0, 1]), ([True], [0, 1]), ([False], [1, 0])]:
        assert nondominated_ranks([[3], [1]], maximise=maximise).tolist() == expected
        assert nondominated([[3], [1]], maximise=maximise).tolist() == [r == 0 for r in expected]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_no_points_and_nothing_but_nan(m: int) -> None:
    assert nondominated(np.empty((0, m))).shape == (0,)
    assert nondominated_ranks(np.empty((0, m))).shape == (0,)
    assert hypervolume(np.empty((0, m)), np.ones(m)) == 0
    assert nondominated(np.full((3, m), NAN)).tolist() == [False] * 3
    assert nondominated_ranks(np.full((3, m), NAN)).tolist() == [0] * 3
    assert hypervolume(np.full((3, m), NAN), np.ones(m)) == 0


# Hypervolume


def test_hypervolume_by_hand() -> None:
    # Three boxes up to (4, 4): (1, 3) 3 x 1, (2, 2) adds 2 x 1, (3, 1) adds 1 x 1.
    assert hypervolume([[1, 3], [2, 2], [3, 1]], [4, 4]) == 6
    assert hypervolume([[1, 3], [2, 2], [3, 1], [3, 3], [2, 2]], [4, 4]) == 6
    assert hypervolume([[1, 1, 1], [0, 2, 2]], [3, 3, 3]) == 8 + 3 - 2
    assert hypervolume([[0.25], [0.75]], [1]) == 0.75


def test_hypervolume_with_directions() -> None:
    # Accuracy up from 0.5, cost down from 10: 0.4 x 5, and 0.2 x 3 on top.
    points = [[0.9, 5], [0.7, 2]]
    assert hypervolume(points, [0.5, 10], maximise=[True, False]) == pytest.approx(2.0 + 0.6)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_hypervolume_against_moocore(m: int) -> None:
    points = np.random.default_rng(m).random((60, m)) * 1.3  # some beyond the reference
    reference = np.ones(m)
    expected = 1 - points.min() if m == 1 else moocore.hypervolume(points, ref=reference)
    assert hypervolume(points, reference) == pytest.approx(expected, rel=1e-12)
    assert hypervolume(-points, -reference, maximise=True) == pytest.approx(expected, rel=1e-12)


@property_test
@given(clouds(st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, NAN, INF])))
def test_hypervolume_counts_unit_cells(points: np.ndarray) -> None:
    m = points.shape[1]
    cells = np.array(list(itertools.product(range(3), repeat=m))) + 0.5
    finite = points[~np.isnan(points).any(axis=1)]
    covered = (finite[:, None, :] <= cells[None]).all(axis=2).any(axis=0).sum()
    assert hypervolume(points, np.full(m, 3.0)) == pytest.approx(covered)


def test_what_does_not_beat_the_reference_adds_nothing() -> None:
    assert hypervolume([[3, 0], [0, 3], [4, 4], [NAN, 0]], [3, 3]) == 0
    assert hypervolume([[3, 0], [2, 2], [INF, -INF]], [3, 3]) == 1


def test_an_infinitely_good_point_has_infinite_volume() -> None:
    assert hypervolume([[-INF, 0], [1, 1]], [3, 3]) == INF
    assert hypervolume([[INF, 4], [1, 4]], [0, 3], maximise=True) == INF
    assert hypervolume([[-INF, 3]], [3, 3]) == 0


# Knee


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("maximise", [False, True])
def test_a_curve_is_the_hypervolume_of_every_prefix(m: int, maximise: bool) -> None:
    rng = np.random.default_rng(m)
    points = rng.uniform(-0.1, 1.2, (60, m))
    points[5], points[20], points[30], points[50] = np.nan, points[7], np.inf, -np.inf
    points = -points if maximise else points
    reference = np.full(m, -1.0 if maximise else 1.0)
    prefixes = [points[: k + 1] for k in range(len(points))]
    expected = [hypervolume(prefix, reference, maximise=maximise) for prefix in prefixes]
    assert np.isinf(expected[50:]).all()
    curve = hypervolumes(points, reference, maximise=maximise)
    np.testing.assert_allclose(curve, expected, rtol=1e-12)
    assert hypervolumes(points[:0], reference).shape == (0,)


def test_knee_by_hand() -> None:
    assert knee([[0, 10], [1, 2], [4, 1], [10, 0]]) == 1
    assert knee([[11, 11], [10, 0], [4, 1], [1, 2], [0, 10]]) == 3
    assert knee([[0, 100], [1, 20], [4, 10], [10, 0]]) == 1  # units do not matter
    assert knee([[0.9, 10], [0.8, 2], [0.1, 0]], maximise=[True, False]) == 1
    assert knee([[0, 5, 5], [5, 0, 5], [5, 5, 0], [1, 1, 1]]) == 3


def test_knee_is_on_the_front_and_finite() -> None:
    # (1, 1) would be the knee, but is dominated; the infinite and NaN rows do not stretch the box.
    assert knee([[1, 1], [0, 1], [1, 0.9], [NAN, 0], [-INF, 99], [0.5, INF]]) == 1
    assert knee([[0, 10], [1, 2], [10, 0], [1000, 10.5]]) == 1  # nor do dominated ones
    assert knee([[NAN, 1], [2, 2]]) == 1
    assert knee([[3], [1], [2]]) == 1
    assert knee([[1, 2], [1, 2]]) == 0


@property_test
@given(clouds(any_value))
def test_knee_is_a_finite_point_of_the_front(points: np.ndarray) -> None:
    finite = nondominated(points) & np.isfinite(points).all(axis=1)
    if finite.any():
        assert finite[knee(points)]
    else:
        with pytest.raises(ObjectiveError, match="at least one finite point"):
            knee(points)


@pytest.mark.parametrize("seed", range(5))
def test_knee_is_farthest_from_the_line_through_the_ends(seed: int) -> None:
    x = np.sort(np.random.default_rng(seed).random(20))
    front = np.stack([x * 30, (1 - x) ** 3 * 7], axis=1)
    span = front[-1] - front[0]
    lengths = np.abs(span[0] * (front - front[0])[:, 1] - span[1] * (front - front[0])[:, 0])
    assert knee(front) == np.argmax(lengths)


# Bad input


@pytest.mark.parametrize("fn", [nondominated, nondominated_ranks, knee, None])
@pytest.mark.parametrize(
    ("points", "maximise", "parts"),
    [
        ([], False, ["(n, m)", "(0,)"]),
        ([1, 2], False, ["(n, m)", "(2,)"]),
        (np.empty((3, 0)), False, ["(n, m)", "(3, 0)"]),
        (np.zeros((2, 2, 2)), False, ["(n, m)", "(2, 2, 2)"]),
        ([["a", "b"]], False, ["numbers", "[['a', 'b']]"]),
        ([[1, 2], [3]], False, ["numbers", "[[1, 2], [3]]"]),
        ([[1, 2]], [True], ["maximise=[True]", "each of 2 objectives"]),
        ([[1, 2]], [True, False, True], ["maximise=[True, False, True]", "2 objectives"]),
    ],
)
def test_bad_points(fn: Callable[..., Any] | None, points: Any, maximise: Any, parts: list) -> None:
    def call() -> None:
        if fn is None:
            hypervolume(points, [1, 1], maximise=maximise)
        else:
            fn(points, maximise=maximise)

    message = error_of(ObjectiveError, call)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("reference", [3, [3], [3, 3, 3], [3, INF], [NAN, 3], "ab", None])
@pytest.mark.parametrize("fn", [hypervolume, hypervolumes])
def test_bad_references(fn: Callable[..., Any], reference: Any) -> None:
    message = error_of(ObjectiveError, lambda: fn([[1, 2]], reference))
    assert "2 finite numbers" in message
    assert repr(reference) in message


# Attainment


def attained_by(runs: list[np.ndarray], at: np.ndarray) -> int:
    """Return how many runs have a point that equals or dominates this one, by definition."""
    return sum(bool((run <= at).all(axis=1).any()) for run in runs)


@property_test
@given(
    st.lists(
        st.integers(0, 5).flatmap(
            lambda n: arrays(float, (n, 2), elements=st.sampled_from([NAN, -INF, -1, -0.0, 0, 2]))
        ),
        min_size=1,
        max_size=6,
    ),
    st.tuples(st.booleans(), st.booleans()),
)
def test_attainment_is_what_so_many_runs_attain(runs: list[np.ndarray], maximise: Any) -> None:
    sign = np.where(maximise, -1.0, 1.0)
    levels = [0.01, 0.25, 1 / 3, 0.5, 0.75, 1.0]
    surfaces = attainment([run * sign for run in runs], levels, maximise=maximise)
    for level, drawn in zip(levels, surfaces, strict=True):
        surface = drawn * sign
        assert nondominated(surface).all()
        assert len(np.unique(surface, axis=0)) == len(surface)
        assert (np.diff(surface[:, 0]) > 0).all(), "best first column first"
        for at in itertools.product([-INF, -1, 0, 1, 2], repeat=2):
            enough = attained_by(runs, np.array(at)) >= level * len(runs) - 1e-9
            assert bool((surface <= at).all(axis=1).any()) == enough


@pytest.mark.parametrize("n", [2, 3, 7, 10, 25, 49, 100])
def test_a_level_needs_no_run_more_than_its_share(n: int) -> None:
    runs = [[[float(i), float(i)]] for i in range(n)]  # run i attains what is >= (i, i)
    surfaces = attainment(runs, [k / n for k in range(1, n + 1)])
    assert [surface.tolist() for surface in surfaces] == [[[k, k]] for k in range(n)]


def test_attainment_of_nothing() -> None:
    assert [s.shape for s in attainment([[[NAN, 1.0]], np.zeros((0, 2))], [0.5, 1])] == [(0, 2)] * 2


@pytest.mark.parametrize(
    ("runs", "levels", "part"),
    [
        ([], [0.5], "no runs"),
        ([[[1, 2, 3]]], [0.5], "not of 3"),
        ([[[1, 2]], [[1]]], [0.5], "two objectives, not of 1"),
        ([[[1, 2]]], [0], "not 0"),
        ([[[1, 2]]], [50], "not 50"),
        ([[[1, 2]]], [NAN], "not nan"),
    ],
)
def test_bad_attainment_is_refused(runs: Any, levels: Any, part: str) -> None:
    assert part in error_of(ObjectiveError, lambda: attainment(runs, levels))
