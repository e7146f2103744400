# SPDX-License-Identifier: Apache-2.0
"""Parts of the published baselines: models on their features, the cost, one draw per study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.predictors import _sklearn
from lightning_subnet.predictors.base import Predictor, spaced_rows
from lightning_subnet.predictors.kernel_regression import Scale, squared_distances
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

    SciPy's `RBFInterpolator` refuses rows with a column that is constant so far.

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
        return np.asarray(squared_distances(F, self._F) ** 1.5)


def model_of(model: Any, random_state: int) -> Any:
    """Return an unfitted model: a published one by name, or a copy of an estimator."""
    if not isinstance(model, str):
        return _sklearn.copy_with_seed(model, random_state)
    return CubicRBF() if model == "rbf" else _sklearn.published_model(model, random_state)


def fit(model: Any, F: Floats, z: Floats) -> Any:
    """Fit a model on F (n, d) and z (n,), or on evenly spaced rows of many, and return it.

    The time of kernels grows with the cube of the rows, and a Gaussian process is fitted many times
    over to settle its kernel.
    """
    at_most = len(z)
    if isinstance(model, CubicRBF):
        at_most = _RBF_ROWS
    elif _sklearn.is_process(model):
        at_most = _PROCESS_ROWS
    rows = spaced_rows(len(z), at_most)
    return _sklearn.fit(model, F[rows], z[rows])


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
    def name(self) -> str:  # type: ignore[override] # the model's name, which the object alone has
        """The name of the model."""
        return self.model if isinstance(self.model, str) else type(self.model).__name__

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        self._scale = Scale(y)
        self._model = fit(model_of(self.model, self.random_state), F, self._scale.z)
        return np.full(len(y), np.nan), np.ones(len(y))  # no row was left out

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        mean = np.asarray(self._model.predict(_sklearn.inputs_of(self._model, F)), dtype=float)
        return self._scale.back(mean.reshape(len(F)), np.ones(len(F)))


class PositionSurrogates(Surrogates):
    """Surrogates on the features that the baselines were published with."""

    def encoded(self, X: Indices) -> Floats:
        """Return the positions of values (n, d), or one-hot columns; see `positions`."""
        return positions(self.problem.space, X)


def surrogates(
    problem: Problem,
    history: History,
    predictor: Any,
    published: Sequence[str],
    rng: np.random.Generator,
) -> Surrogates:
    """Return predictors of a history: a published one on its own features, or any other.

    Args:
        problem: The problem of the search; exact measures that are vectorised are computed.
        history: The evaluations.
        predictor: The strategy's predictor.
        published: The names of those that the strategy was published with.
        rng: The source of the seed.
    """
    seed = int(rng.integers(2**31))
    if isinstance(predictor, str) and predictor in published:
        return PositionSurrogates(problem, history, Bare(predictor, random_state=seed))
    if not isinstance(predictor, (str, Predictor)):
        predictor = Bare(predictor, random_state=seed)
    return Surrogates(problem, history, predictor)


def cost_of(problem: Problem) -> int:
    """Return the number of the objective that is the cost: the first exact one, else the last."""
    exact = [i for i, o in enumerate(problem.objectives) if o.name in problem.exact]
    return exact[0] if exact else len(problem.objectives) - 1


def study_rng(history: History) -> np.random.Generator:
    """Return a generator that is the same in all generations of a study, and in no other.

    A strategy has no state and `rng` is new in each generation, so the first subnets are the seed.
    Two of them, as the first may be the largest one, which every search measures.
    """
    return np.random.default_rng([int(history[i].subnet.key, 16) for i in range(2)])
