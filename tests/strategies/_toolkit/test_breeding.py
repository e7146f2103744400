# SPDX-License-Identifier: Apache-2.0
"""The inner evolution against enumeration, and its order against that of pymoo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pymoo.core.population import Population
from pymoo.core.problem import Problem as PymooProblem
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

from lightning_subnet import SearchSpace
from lightning_subnet.strategies._toolkit.breeding import breed
from lightning_subnet.strategies._toolkit.ranking import best_first, front_ranks
from lightning_subnet.study import Problem, pareto
from tests.problems import conditional, grid, mixed, problem_of
from tests.spaces import nested


class Scores:
    """Knows the values, notes what it was asked, and refuses to be asked twice."""

    def __init__(self, problem: Problem, m: int = 2, most: float = np.inf) -> None:
        self.problem, self.m, self.most = problem, m, most
        self.seen: list[np.ndarray] = []

    def values(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        missed = np.maximum(X.sum(axis=1) - self.most, 0.0)
        pull = np.random.default_rng(0).uniform(1, 2, size=(3, X.shape[1]))  # no two rows are equal
        corners = np.array([0.0, 3.0, 1.4])[:, None]
        F = (pull * (X[:, None] - corners) ** 2).sum(axis=2)
        return F[:, : self.m], missed

    def __call__(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        np.testing.assert_array_equal(X, self.problem.space.canonical(X))
        self.seen.append(X)
        everything = np.concatenate(self.seen)
        if self.problem.space.size < 2000:
            assert len(np.unique(everything, axis=0)) == len(everything), "scored twice"
        return self.values(X)


def evolved(space: SearchSpace, score: Any = None, **settings: Any) -> tuple[np.ndarray, Any]:
    problem = problem_of(space)
    score = score or Scores(problem)
    start = space.sample_indices(min(20, space.size), 0)
    default = {"parents": 20, "children": 100, "generations": 12, "keep": 10_000}
    given = default | settings
    found = breed(problem, score, start, **given, rng=np.random.default_rng(1))
    return found, score


def front_of(space: SearchSpace, score: Scores) -> set[tuple[int, ...]]:
    """Return the rows of the exact front, by enumeration."""
    X = space.indices(list(space))
    F, missed = score.values(X)
    X, F = X[missed <= 0], F[missed <= 0]
    return rows(X[pareto.nondominated(F)])


def rows(X: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(row) for row in X.tolist()}


# The order


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_that_of_pymoo(m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    F = rng.random((60, m))
    missed = np.where(rng.random(60) < 0.3, rng.random(60), 0.0)
    order = best_first(F, missed)
    assert sorted(order) == list(range(60))
    problem = PymooProblem(n_var=1, n_obj=m, n_ieq_constr=1)

    def kept(n: int) -> Population:
        population = Population.new(X=np.arange(60.0)[:, None], F=F, G=missed[:, None])
        return RankAndCrowding().do(problem, population, n_survive=n, random_state=rng)

    key = {}
    for one in kept(60):  # the ends of a front are equal, and in any order
        infeasible = one.get("rank") is None or one.CV[0] > 0
        key[int(one.X[0])] = (
            (one.CV[0],) if infeasible else (0, one.get("rank"), -one.get("crowding"))
        )
    assert len(set(key.values())) > 40
    for n in (5, 13, 30, 45, 55):
        theirs = sorted(key[int(one.X[0])] for one in kept(n))
        assert sorted(key[i] for i in order[:n]) == theirs


def test_ends_of_a_front_come_first_and_then_what_has_room() -> None:
    F = np.array([[0, 10], [1, 9], [2, 8], [6, 4], [10, 0], [11, 11.0]])
    # Room by hand: (2 + 2) / 10, (5 + 5) / 10, (8 + 8) / 10; the ends without bound.
    assert best_first(F, np.zeros(6)).tolist() == [0, 4, 3, 2, 1, 5]


def test_one_objective_is_in_its_own_order() -> None:
    F = np.array([[3.0], [np.nan], [1.0], [2.0], [0.0]])
    assert best_first(F, np.array([0, 0, 0, 0, 0.5])).tolist() == [2, 3, 0, 4, 1]


def test_violations_come_last_least_first_and_numbers_that_are_none_after_all() -> None:
    F = np.array([[np.nan, 0.0], [5, 5], [0, 0], [1, 1], [9, 9]])
    missed = np.array([0.0, 0.0, 2.0, 1.0, 0.0])
    assert best_first(F, missed).tolist() == [1, 4, 3, 2, 0]
    ranks, violations = front_ranks(F, missed)
    assert ranks.tolist() == [0, 0, 0, 0, 1]
    assert violations.tolist() == [np.inf, 0, 2, 1, 0]
    assert best_first(F[[2, 3]], missed[[2, 3]]).tolist() == [1, 0]  # none is feasible


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("m", [1, 2, 3])
def test_ties_keep_their_order(m: int) -> None:
    assert best_first(np.ones((5, m)), np.zeros(5)).tolist() == [0, 1, 2, 3, 4]
    assert best_first(np.ones((0, m)), np.zeros(0)).tolist() == []
    assert best_first(np.ones((5, m)), np.full(5, 3.0)).tolist() == [0, 1, 2, 3, 4]


# The evolution


@pytest.mark.parametrize("m", [1, 2, 3])
def test_it_finds_the_exact_front(m: int) -> None:
    for space in (grid(7, 4), conditional(), mixed(), nested()):
        score = Scores(problem_of(space), m)
        found, score = evolved(space, score, parents=100, children=400, generations=50)
        front = front_of(space, score)
        if m < 3 or space.size < 200:
            assert rows(found[: len(front)]) == front
        else:
            assert len(rows(found) & front) > 0.97 * len(front)
        assert sum(map(len, score.seen)) < 0.5 * space.size or space.size < 200


def test_it_finds_what_random_draws_do_not() -> None:
    space = grid(15, 4)
    found, score = evolved(space, children=200, generations=15)
    n = sum(map(len, score.seen))
    reference = [150.0, 150.0]
    drawn = space.sample_indices(n, 5)
    ours, theirs = (pareto.hypervolume(score.values(X)[0], reference) for X in (found, drawn))
    # Each choice by itself is best for a weighted sum: the exact convex part of the front.
    pull = np.random.default_rng(0).uniform(1, 2, size=(3, 15))[:2]
    best = []
    for share in np.linspace(0, 1, 200):
        costs = share * pull[0] * np.arange(4.0)[:, None] ** 2
        costs += (1 - share) * pull[1] * (np.arange(4.0)[:, None] - 3) ** 2
        best.append(costs.argmin(axis=0))
    exact = pareto.hypervolume(score.values(np.array(best))[0], reference)
    assert ours > 0.99 * exact
    assert theirs < 0.85 * exact


def test_all_that_was_scored_competes_and_the_best_are_first() -> None:
    space = grid(6, 4)
    found, score = evolved(space, generations=3)
    everything = np.concatenate(score.seen)
    assert rows(found) == rows(everything)
    assert len(found) == len(everything)
    F, missed = score.values(found)
    ranks = pareto.nondominated_ranks(F)
    assert (missed == 0).all()
    assert (np.diff(ranks) >= 0).all()


@pytest.mark.parametrize("keep", [1, 7, 50])
@pytest.mark.parametrize("generations", [1, 6])
def test_so_many_stay(keep: int, generations: int) -> None:
    found, score = evolved(grid(6, 4), keep=keep, generations=generations)
    assert len(found) == len(rows(found)) == keep
    asked = [len(X) for X in score.seen]
    assert len(asked) == 1 + generations
    assert max(asked) <= 100


def test_feasible_rows_come_first_and_then_what_misses_least() -> None:
    space = grid(6, 4)
    bound = Scores(problem_of(space), most=3)
    found, score = evolved(space, bound)
    _, missed = score.values(found)
    feasible = int((missed <= 0).sum())
    assert (missed[:feasible] == 0).all()
    assert (np.diff(missed[feasible:]) >= 0).all()
    front = front_of(space, score)
    assert rows(found[: len(front)]) == front
    never, score = evolved(space, Scores(problem_of(space), most=-1))  # the smallest misses by 1
    assert never[0].tolist() == [0] * 6


def test_a_pool_whose_members_are_fewer_than_the_children() -> None:
    whole = grid(4, 4)
    pool = whole.restricted_to(whole.sample(30, rng=1))
    found, _ = evolved(pool, children=100)
    assert rows(pool.indices(list(pool))) & rows(found)
    assert len(found) > 30  # children of members may be no members: `fill` brings them in


def test_repeated_rows_of_the_start_are_scored_once() -> None:
    space = grid(4, 4)
    problem = problem_of(space)
    start = np.repeat(space.sample_indices(5, 0), 4, axis=0)
    score = Scores(problem)
    given = {"parents": 5, "children": 20, "generations": 1, "keep": 50}
    one = breed(problem, score, start, **given, rng=np.random.default_rng(0))
    assert len(score.seen[0]) == 5
    np.testing.assert_array_equal(start, np.repeat(space.sample_indices(5, 0), 4, axis=0))
    again = breed(problem, Scores(problem), start, **given, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(one, again)
    other = breed(problem, Scores(problem), start, **given, rng=np.random.default_rng(1))
    assert rows(one) != rows(other)


def test_a_child_takes_from_two_parents_and_in_the_mean_one_new_value() -> None:
    space = grid(20, 5)
    problem = problem_of(space)
    score = Scores(problem)
    start = np.stack([np.full(20, 1), np.full(20, 3)])
    given = {"parents": 2, "children": 400, "generations": 1, "keep": 1000}
    breed(problem, score, start, **given, rng=np.random.default_rng(0))
    bred = score.seen[1]
    mixed_ = ((bred == 1).sum(axis=1) > 4) & ((bred == 3).sum(axis=1) > 4)
    # Half have two parents; the copies of one without a new value are dropped.
    assert 0.4 < mixed_.mean() < 0.8
    bred = bred[mixed_]
    assert (bred == 1).mean() == pytest.approx(0.485, abs=0.03)
    new = ~np.isin(bred, [1, 3])
    assert new.sum(axis=1).mean() == pytest.approx(3 / 5, abs=0.15)  # three values of five are new
