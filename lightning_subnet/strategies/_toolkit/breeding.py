# SPDX-License-Identifier: Apache-2.0
"""The order of NSGA-II, and an evolution on predictions in few, large generations."""

from __future__ import annotations

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.space.members import distinct_rows
from lightning_subnet.strategies._toolkit.sampling import by_choice
from lightning_subnet.strategies._toolkit.surrogates import Surrogates
from lightning_subnet.study import pareto
from lightning_subnet.study.problem import Problem

_HALF = 0.5
_MATES = 0.05  # of the parents, in the order of an objective: how far apart two are that mate


def best_first(F: Floats, missed: Floats) -> Indices:
    """Return rows by violation, then by front, then by crowding distance; (n,).

    Args:
        F: Objectives to be minimised (n, m).
        missed: Violations (n,), 0 where feasible.

    References:
        Deb et al., NSGA-II, IEEE TEC 6(2), 2002, section III-B.

    Example:
        >>> F = np.array([[3.0, 3.0], [1.0, 2.0], [0.0, 0.0], [2.0, 1.0]])
        >>> best_first(F, np.array([0.0, 0.0, 9.0, 0.0])).tolist()
        [1, 3, 0, 2]
    """
    ranks, missed = ranked(F, missed)
    if F.shape[1] == 1:
        return np.lexsort((F[:, 0], missed))
    from lightning_subnet.strategies._toolkit._pymoo import crowding

    room = np.zeros(len(F))
    feasible = missed <= 0
    for rank in np.unique(ranks[feasible]):
        at = np.flatnonzero(feasible & (ranks == rank))
        room[at] = crowding(F[at])
    return np.lexsort((-room, ranks, missed))


def ranked(F: Floats, missed: Floats) -> tuple[Indices, Floats]:
    """Return the front of each feasible row (n,), and violations, infinite where F has a NaN."""
    missed = np.where(np.isnan(F).any(axis=1), np.inf, missed)
    ranks = np.zeros(len(F), dtype=np.int64)
    if (feasible := missed <= 0).any():
        ranks[feasible] = pareto.nondominated_ranks(F[feasible])
    return ranks, missed


def breed(  # noqa: PLR0913 - the settings of an evolution
    problem: Problem,
    score: Surrogates,
    start: Indices,
    *,
    parents: int,
    children: int,
    generations: int,
    keep: int,
    rng: np.random.Generator,
) -> Indices:
    """Evolve on predictions with few, large generations: predictions are cheapest by the thousand.

    All rows that were scored compete. Parents are the best of them by constraint violation, front
    and crowding; mates are near each other in one objective, each in its turn; a child takes each
    choice from one of the two, and in the mean one new value.

    Args:
        problem: What is searched.
        score: Gives objectives and violations of rows.
        start: The first rows (n, n_choices).
        parents: How many breed.
        children: How many are bred a generation.
        generations: How many.
        keep: How many rows stay.
        rng: The only source of randomness.

    Returns:
        The best rows that were scored, best first, `keep` or fewer.

    References:
        Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE TEC 6 (2002),
        for the order; Ishibuchi, Shibata, Mating Scheme for Controlling the Diversity-Convergence
        Balance for Multiobjective Optimization, GECCO 2004, for mates that are alike.
    """
    space, drawn = problem.space, by_choice(problem)
    X = start[distinct_rows(start)]
    F, missed = score(X)
    for generation in range(generations):
        order = best_first(F, missed)[:keep]
        X, F, missed = X[order], F[order], missed[order]
        # Parents far apart on the front have little to give each other.
        row = np.argsort(F[:parents, generation % F.shape[1]], kind="stable")
        at = rng.integers(len(row), size=children)
        away = 1 + np.abs(np.rint(rng.normal(0, _MATES * len(row), children))).astype(int)
        away *= rng.choice([-1, 1], children)
        one, two = X[row[at]], X[row[np.clip(at + away, 0, len(row) - 1)]]
        bred = np.where(rng.random(one.shape) < _HALF, one, two)
        fresh = drawn(children, rng)
        fresh = fresh[np.arange(children) % len(fresh)]
        bred = space.canonical(np.where(rng.random(one.shape) < 1 / one.shape[1], fresh, bred))
        both = np.concatenate([X, bred])
        new = distinct_rows(both)
        new = new[new >= len(X)]
        more, further = score(both[new])
        X = np.concatenate([X, both[new]])
        F, missed = np.concatenate([F, more]), np.concatenate([missed, further])
    return X[best_first(F, missed)[:keep]]
