# SPDX-License-Identifier: Apache-2.0
"""Searching on predictions: what strategies with predictors share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet.choices import Indices
from lightning_subnet.history import History
from lightning_subnet.members import row_codes
from lightning_subnet.objectives import minimised, violation
from lightning_subnet.predictors import features, make
from lightning_subnet.problem import Problem

Floats = npt.NDArray[np.float64]


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
        F = features(problem.space, rows)
        self._models = {}
        for name in problem.names:
            if name not in self._exact:
                y = history.column(name)[history.ok]
                known = np.isfinite(y)
                self._models[name] = make(predictor).fit(F[known], y[known])

    def __call__(self, X: Indices, *, deviations: float | Floats = 0.0) -> tuple[Floats, Floats]:
        """Return objectives to be minimised (n, m) and violations (n,) of canonical rows.

        Args:
            X: Value indices (n, n_choices).
            deviations: How many standard deviations to add to each predicted objective: a number
                (negative is optimistic), or one per row and objective (n, m).
        """
        columns: dict[str, Floats] = {}
        spread: dict[str, Floats] = {}
        F = features(self.problem.space, X) if self._models else np.zeros((len(X), 0))
        for name in self._exact:
            columns[name] = self.problem.exact_values(name, X)
        wanted = bool(np.any(np.asarray(deviations) != 0))
        for name, model in self._models.items():
            if wanted:
                columns[name], spread[name] = model.predict(F, return_std=True)
            else:
                columns[name] = model.predict(F)
        objectives = minimised(self.problem.objectives, columns)
        if wanted:
            still = np.zeros(len(X))
            std = np.stack([spread.get(o.name, still) for o in self.problem.objectives], axis=1)
            objectives = objectives + deviations * std
        return objectives, violation(self._bounds, columns, len(X))


def _computed(problem: Problem, name: str) -> bool:
    return name in problem.exact and problem.exact[name].vectorised


def distinct(X: Indices) -> Indices:
    """Return the distinct rows, the first of each, in their order."""
    first: dict[bytes, int] = {}
    for i, code in enumerate(row_codes(X)):
        first.setdefault(code, i)
    return X[list(first.values())]
