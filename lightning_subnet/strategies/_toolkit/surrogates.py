# SPDX-License-Identifier: Apache-2.0
"""Searching on predictions: what strategies with predictors share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_subnet._messages import did_you_mean
from lightning_subnet._types import Floats, Indices
from lightning_subnet.errors import StrategyError
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make, names
from lightning_subnet.space.members import distinct_rows
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.study.history import History
from lightning_subnet.study.objectives import minimised, violation
from lightning_subnet.study.problem import Problem

if TYPE_CHECKING:
    from lightning_subnet.strategies._toolkit._pymoo import Breeder


class PredictingStrategy(Strategy):
    """A strategy with a predictor among its settings, by name or as an estimator.

    Args:
        predictor: A name or an estimator; see `predictors.make`.
        published: The names of models that a baseline was published with, which it takes too.

    Raises:
        PredictorError: An unknown name, or no predictor at all: before anything is measured.
        StrategyError: An unknown name, for a baseline.
    """

    def __init__(self, predictor: Any, published: Sequence[str] | None = None) -> None:
        if published is None or not isinstance(predictor, str):
            make(predictor)
        elif predictor not in (known := list(dict.fromkeys([*published, *names()]))):
            msg = (
                f"predictor={predictor!r} of the strategy is unknown."
                f"{did_you_mean(predictor, known)} Give one of {', '.join(map(repr, known))}, "
                "or an object with fit(F, y) and predict(F)."
            )
            raise StrategyError(msg)
        self._predictor = predictor

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON-able data; an estimator is told by its repr."""
        given = self._predictor
        told = given if isinstance(given, str) else " ".join(repr(given).split())
        return super().settings() | {"predictor": told}


class Surrogates:
    """One predictor per measure of a problem, fitted on the successes of a history.

    Args:
        problem: What is searched.
        history: What was measured.
        predictor: A name or an estimator; see `predictors.make`.
        exact: Compute exact measures that are vectorised, instead of predicting them.
    """

    def __init__(
        self, problem: Problem, history: History, predictor: Any, *, exact: bool = True
    ) -> None:
        self.problem = problem
        self._bounds = problem.bounds(history)
        self._exact = [n for n in problem.names if exact and _computed(problem, n)]
        rows = history.indices[history.ok]
        F = self.encoded(rows)
        self._models = {}
        for name in problem.names:
            if name not in self._exact:
                y = history.column(name)[history.ok]
                known = np.isfinite(y)
                self._models[name] = make(predictor, space=problem.space).fit(F[known], y[known])

    def __call__(self, X: Indices) -> tuple[Floats, Floats]:
        """Return objectives to be minimised (n, m) and violations (n,) of canonical rows.

        Args:
            X: Value indices (n, n_choices).
        """
        F = self._features(X)
        columns = {name: model.predict(F) for name, model in self._models.items()}
        return self._scores(X, columns)

    def with_std(self, X: Indices) -> tuple[Floats, Floats, Floats]:
        """Return the same, and between them the standard deviations (n, m), 0 where exact."""
        F = self._features(X)
        pairs = {name: model.predict(F, return_std=True) for name, model in self._models.items()}
        objectives, missed = self._scores(X, {name: mean for name, (mean, _) in pairs.items()})
        sure = np.zeros(len(X))
        std = [pairs[o.name][1] if o.name in pairs else sure for o in self.problem.objectives]
        return objectives, np.stack(std, axis=1), missed

    def encoded(self, X: Indices) -> Floats:
        """Return the features (n, d) of canonical rows that predictors are fitted on."""
        return features(self.problem.space, X)

    def _features(self, X: Indices) -> Floats:
        return self.encoded(X) if self._models else np.zeros((len(X), 0))

    def _scores(self, X: Indices, predicted: dict[str, Floats]) -> tuple[Floats, Floats]:
        exact = {name: self.problem.exact_values(name, X) for name in self._exact}
        columns = predicted | exact
        return minimised(self.problem.objectives, columns), violation(self._bounds, columns, len(X))


def _computed(problem: Problem, name: str) -> bool:
    return name in problem.exact and problem.exact[name].vectorised


def evolve(  # noqa: PLR0913 - the settings of an evolution
    problem: Problem,
    score: Surrogates,
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
        problem: What is searched.
        score: Gives objectives and violations of rows.
        start: The first rows (n, n_choices).
        population: How many survive, and how many are bred a generation.
        generations: How many.
        crossover: Probability that two parents are mixed.
        mutation: Probability per choice of a new random value; None is 1 / number of choices.
        rng: The only source of randomness.

    Returns:
        The breeder at its end, and all distinct rows that were scored.
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
    seen = [start]
    breeder.select(start, *score(start))
    for _ in range(generations):
        children = problem.space.canonical(breeder.offspring(population))
        seen.append(children)
        breeder.select_with(children, *score(children))
    rows = np.concatenate(seen)
    return breeder, rows[distinct_rows(rows)]
