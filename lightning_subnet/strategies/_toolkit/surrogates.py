# SPDX-License-Identifier: Apache-2.0
"""Surrogates: predictions of all measures of a problem at once, as objectives and violations."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make
from lightning_subnet.study.history import History
from lightning_subnet.study.objectives import minimised, violation
from lightning_subnet.study.problem import Problem


class Surrogates:
    """One predictor per measure of a problem, fitted on the successes of a history.

    Args:
        problem: The problem of the search.
        history: The evaluations.
        predictor: A name or an estimator; see `predictors.make`.
        exact: Compute exact measures that are vectorised, instead of predicting them.
    """

    def __init__(
        self, problem: Problem, history: History, predictor: Any, *, exact: bool = True
    ) -> None:
        self.problem = problem
        self._bounds = problem.bounds(history)
        self._exact = [n for n in problem.names if exact and is_vectorised(problem, n)]
        rows = history.indices[history.ok]
        F = self.encoded(rows)
        self._models = {}
        for name in problem.names:
            if name not in self._exact:
                y = history.column(name)[history.ok]
                finite = np.isfinite(y)
                self._models[name] = make(predictor, space=problem.space).fit(F[finite], y[finite])

    def __call__(self, X: Indices) -> tuple[Floats, Floats]:
        """Return objectives to be minimised (n, m) and violations (n,) of canonical rows.

        Args:
            X: Value indices (n, n_choices).
        """
        F = self._features(X)
        columns = {name: model.predict(F) for name, model in self._models.items()}
        return self._scores(X, columns)

    def with_std(self, X: Indices) -> tuple[Floats, Floats, Floats]:
        """Return the same with standard deviations (n, m) between them, 0 where exact."""
        F = self._features(X)
        pairs = {name: model.predict(F, return_std=True) for name, model in self._models.items()}
        objectives, violations = self._scores(X, {name: mean for name, (mean, _) in pairs.items()})
        zeros = np.zeros(len(X))
        std = [pairs[o.name][1] if o.name in pairs else zeros for o in self.problem.objectives]
        return objectives, np.stack(std, axis=1), violations

    def encoded(self, X: Indices) -> Floats:
        """Return the features (n, d) of canonical rows that predictors are fitted on."""
        return features(self.problem.space, X)

    def _features(self, X: Indices) -> Floats:
        return self.encoded(X) if self._models else np.zeros((len(X), 0))

    def _scores(self, X: Indices, predictions: dict[str, Floats]) -> tuple[Floats, Floats]:
        exact = {name: self.problem.exact_values(name, X) for name in self._exact}
        columns = predictions | exact
        return minimised(self.problem.objectives, columns), violation(self._bounds, columns, len(X))


def is_vectorised(problem: Problem, name: str) -> bool:
    """Return whether a measure is exact and computed for many rows at once: it is not predicted."""
    return name in problem.exact and problem.exact[name].vectorised
