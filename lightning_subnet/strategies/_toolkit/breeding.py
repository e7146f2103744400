# SPDX-License-Identifier: Apache-2.0
"""Evolutions on predictions: that of the published searches, and one in few, large generations.

They are two, as either in the other's place would change what a search of a seed proposes. `evolve`
is the one that LINAS, the full search and NSGANetV2 were published with: a population and as many
children a generation, hundreds of generations long, by pymoo. `breed` is that of "hybrid": parents
come from all rows that were scored and mate with those that are like them, neither of which pymoo's
NSGA-II does, and predictions are made by the thousand, where they are cheapest. A third one,
`space.minimise.least`, has a single score and stands below strategies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.space.members import distinct_rows
from lightning_subnet.strategies._toolkit.ranking import best_first
from lightning_subnet.strategies._toolkit.sampling import by_choice
from lightning_subnet.study.problem import Problem

if TYPE_CHECKING:
    from lightning_subnet.strategies._toolkit._pymoo import Breeder

Score = Callable[[Indices], tuple[Floats, Floats]]
"""Objectives to be minimised (n, m) and violations (n,) of canonical rows (n, n_choices)."""

_HALF = 0.5
_MATES = 0.05  # of the parents, in the order of an objective: how far apart two are that mate


def evolve(  # noqa: PLR0913 - the settings of an evolution
    problem: Problem,
    score: Score,
    start: Indices,
    *,
    population: int,
    generations: int,
    crossover: float = 0.9,
    mutation: float | None = None,
    rng: np.random.Generator,
) -> tuple[Breeder, Indices]:
    """Run NSGA-II on predictions.

    Args:
        problem: The problem of the search.
        score: The predictions.
        start: The first rows (n, n_choices).
        population: The number of survivors, and of children a generation.
        generations: The number of generations.
        crossover: Probability that two parents are mixed.
        mutation: Probability per choice of a new random value; None is 1 / number of choices.
        rng: The only source of randomness.

    Returns:
        The breeder at its end, and all distinct rows that were scored (n, n_choices).
    """
    from lightning_subnet.strategies._toolkit._pymoo import Breeder

    breeder = Breeder(
        "nsga2",
        n_values=[len(choice.values) for choice in problem.space.choices.values()],
        population=population,
        crossover=crossover,
        mutation=mutation,
        rng=rng,
    )
    blocks = [start]
    breeder.select(start, *score(start))
    for _ in range(generations):
        children = problem.space.canonical(breeder.offspring(population))
        blocks.append(children)
        breeder.select_with(children, *score(children))
    rows = np.concatenate(blocks)
    return breeder, rows[distinct_rows(rows)]


def breed(  # noqa: PLR0913 - the settings of an evolution
    problem: Problem,
    score: Score,
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
        problem: The problem of the search.
        score: The predictions.
        start: The first rows (n, n_choices).
        parents: The number of rows that breed.
        children: The number of children a generation.
        generations: The number of generations.
        keep: The number of rows that stay.
        rng: The only source of randomness.

    Returns:
        The best rows that were scored, best first, `keep` or fewer.

    References:
        Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE TEC 6 (2002),
        for the order; Ishibuchi, Shibata, Mating Scheme for Controlling the Diversity-Convergence
        Balance for Multiobjective Optimization, GECCO 2004, for mates that are alike.
    """
    space, draw = problem.space, by_choice(problem)
    X = start[distinct_rows(start)]
    F, violations = score(X)
    for generation in range(generations):
        order = best_first(F, violations)[:keep]
        X, F, violations = X[order], F[order], violations[order]
        # Parents far apart on the front have little to give each other.
        row = np.argsort(F[:parents, generation % F.shape[1]], kind="stable")
        at = rng.integers(len(row), size=children)
        away = 1 + np.abs(np.rint(rng.normal(0, _MATES * len(row), children))).astype(int)
        away *= rng.choice([-1, 1], children)
        one, two = X[row[at]], X[row[np.clip(at + away, 0, len(row) - 1)]]
        mixed = np.where(rng.random(one.shape) < _HALF, one, two)
        others = draw(children, rng)
        others = others[np.arange(children) % len(others)]
        mutate = rng.random(one.shape) < 1 / one.shape[1]
        both = np.concatenate([X, space.canonical(np.where(mutate, others, mixed))])
        new = distinct_rows(both)
        new = new[new >= len(X)]
        scores = score(both[new])
        X = np.concatenate([X, both[new]])
        F = np.concatenate([F, scores[0]])
        violations = np.concatenate([violations, scores[1]])
    return X[best_first(F, violations)[:keep]]
