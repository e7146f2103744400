# SPDX-License-Identifier: Apache-2.0
"""What the published baselines share: plain models, their features, ranks, one draw per study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.predictors import _sklearn
from lightning_subnet.predictors._sklearn import Scale
from lightning_subnet.predictors.base import Predictor, spaced
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.strategies._toolkit.surrogates import Surrogates
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem

_RBF_ROWS, _PROCESS_ROWS = 2000, 500
_NUGGET = 1e-6  # of the RBF interpolant: equal rows may have different values


def positions(space: SearchSpace, X: Indices) -> Floats:
    """Return one column per choice, its value's position; one-hot where a choice has no order."""
    ordered = all(choice.ordered for choice in space.choices.values())
    return space.encode(X, kind="ordinal" if ordered else "onehot")


class CubicRBF:
    """Interpolation by cubic radial basis functions with a linear tail.

    References:
        Gutmann, A radial basis function method for global optimization, J. Global Optim. 19, 2001.
    """

    def fit(self, F: Floats, z: Floats) -> CubicRBF:
        """Solve for the weights of F (n, d) and z (n,)."""
        self._F = F
        tail = np.column_stack([np.ones(len(F)), F])
        n, d = tail.shape
        system = np.zeros((n + d, n + d))
        system[:n, :n] = self._basis(F)
        system[:n, n:], system[n:, :n] = tail, tail.T
        # The tail's own nugget: columns that are constant so far leave it undetermined.
        system[np.diag_indices(n + d)] += np.where(np.arange(n + d) < n, _NUGGET, -_NUGGET)
        self._weights = np.linalg.solve(system, np.concatenate([z, np.zeros(d)]))
        return self

    def predict(self, F: Floats) -> Floats:
        """Return the values (n,) at F (n, d)."""
        terms = np.column_stack([self._basis(F), np.ones(len(F)), F])
        return np.asarray(terms @ self._weights)

    def _basis(self, F: Floats) -> Floats:
        return np.asarray(_sklearn.squared_distances(F, self._F) ** 1.5)


def model_of(given: Any, random_state: int) -> Any:
    """Return an unfitted model: a published one by name, or a copy of an estimator."""
    if not isinstance(given, str):
        return _sklearn.seeded(given, random_state)
    return CubicRBF() if given == "rbf" else _sklearn.published_model(given, random_state)


def fitted(model: Any, F: Floats, z: Floats) -> Any:
    """Return the model, fitted on F (n, d) and z (n,); on evenly spaced rows where they are many.

    The time of kernels grows with the cube of the rows, and a Gaussian process is fitted many times
    over to settle its kernel.
    """
    at_most = len(z)
    if isinstance(model, CubicRBF):
        at_most = _RBF_ROWS
    elif _sklearn.is_process(model):
        at_most = _PROCESS_ROWS
    few = spaced(len(z), at_most)
    return _sklearn.fitted(model, F[few], z[few])


class Bare(Predictor):
    """A regressor as it is, fitted once on all rows: ranks need no folds and no uncertainty.

    Args:
        model: A name for `model_of`, or an object with fit and predict.
        random_state: The seed of trees and weights.
    """

    minimum = 2

    def __init__(self, model: Any, *, random_state: int = 0) -> None:
        super().__init__(random_state=random_state)
        self.model = model

    @property
    def name(self) -> str:  # type: ignore[override] # the model's name, known to the object alone
        """The name of the model."""
        return self.model if isinstance(self.model, str) else type(self.model).__name__

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        self._scale = Scale(y)
        self._fitted = fitted(model_of(self.model, self.random_state), F, self._scale.z)
        return np.full(len(y), np.nan), np.ones(len(y))  # no row was left out

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        mean = np.asarray(self._fitted.predict(_sklearn.single(self._fitted, F)), dtype=float)
        return self._scale.back(mean.reshape(len(F)), np.ones(len(F)))


class PositionSurrogates(Surrogates):
    """Surrogates on the features that the baselines were published with."""

    def encoded(self, X: Indices) -> Floats:
        """Return the positions of values (n, d), or one-hot columns; see `positions`."""
        return positions(self.problem.space, X)


def surrogates(
    problem: Problem,
    history: History,
    given: Any,
    published: Sequence[str],
    rng: np.random.Generator,
) -> Surrogates:
    """Return predictors of a history: a published one on its own features, or any other.

    Args:
        problem: What is searched; exact measures that are vectorised are computed.
        history: What was measured.
        given: The strategy's predictor.
        published: The names of those it was published with.
        rng: The seed's source.
    """
    seed = int(rng.integers(2**31))
    if isinstance(given, str) and given in published:
        return PositionSurrogates(problem, history, Bare(given, random_state=seed))
    plain = not isinstance(given, (str, Predictor))
    return Surrogates(problem, history, Bare(given, random_state=seed) if plain else given)


def cost_of(problem: Problem) -> int:
    """Return which objective is the cost: the first exact one, else the last."""
    exact = [i for i, o in enumerate(problem.objectives) if o.name in problem.exact]
    return exact[0] if exact else len(problem.objectives) - 1


def study_rng(history: History) -> np.random.Generator:
    """Return a generator that is the same in all generations of a study, and in no other.

    A strategy has no state and `rng` is new in each generation, so the seed is in what was measured
    first. Two subnets, as the first may be the largest one, which every search measures.
    """
    return np.random.default_rng([int(history[i].subnet.key, 16) for i in range(2)])
