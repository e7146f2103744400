# SPDX-License-Identifier: Apache-2.0
"""Wrapped: regressors of scikit-learn as predictors."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_subnet._types import Floats
from lightning_subnet.predictors import _sklearn
from lightning_subnet.predictors.base import Predictor, fold_of
from lightning_subnet.predictors.kernel_regression import Scale


class Wrapped(Predictor):
    """A regressor with scikit-learn's `fit` and `predict`, and an uncertainty of its predictions.

    That of a forest is the spread of its trees, that of a Gaussian process its standard deviation;
    that of any other model comes from its errors on left-out folds. All are stretched to cover such
    errors.

    Args:
        estimator: `"forest"`, `"extra-trees"`, `"boosting"`, or an object with fit and predict.
        random_state: The seed of folds and trees.
    """

    minimum = 10

    def __init__(self, estimator: Any, *, random_state: int = 0) -> None:
        super().__init__(random_state=random_state)
        self.estimator = estimator

    @property
    def name(self) -> str:  # type: ignore[override] # a property
        """The name of the model."""
        by_name = isinstance(self.estimator, str)
        return self.estimator if by_name else type(self.estimator).__name__

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        self._scale, self._noise = Scale(y), 0.0
        z = self._scale.z
        self._model = self._unfitted().fit(F, z)
        if _sklearn.is_forest(self._model):
            mean, std = _sklearn.out_of_bag(self._model, F)
        else:
            folds = fold_of(len(y), self.random_state)
            mean, std = np.zeros(len(y)), np.zeros(len(y))
            for out in (folds == k for k in range(int(folds.max()) + 1)):
                model = self._unfitted().fit(F[~out], z[~out])
                mean[out], std[out] = self._moments(model, F[out])
        # Where all trees agree they can all be wrong.
        error = (z - mean)[np.isfinite(mean)]
        self._noise = 0.3 * float(np.sqrt((error**2).sum() / max(len(error), 1)))
        return self._scale.back(mean, np.hypot(std, self._noise))

    def _unfitted(self) -> Any:
        if isinstance(self.estimator, str):
            return _sklearn.tree_model(self.estimator, self.random_state)
        return _sklearn.unfitted_copy(self.estimator)

    def _moments(self, model: Any, F: Floats) -> tuple[Floats, Floats]:
        """Return mean and standard deviation (n,) by a fitted model, 0 where it has none."""
        if _sklearn.is_forest(model):
            return _sklearn.spread_of_trees(model, F)
        if _sklearn.has_own_std(model):
            mean, std = model.predict(F, return_std=True)
        else:
            mean, std = model.predict(F), np.zeros(len(F))
        return np.asarray(mean, dtype=float).reshape(len(F)), np.asarray(std, dtype=float)

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        mean, std = self._moments(self._model, F)
        return self._scale.back(mean, np.hypot(std, self._noise))


def forest(*, random_state: int = 0) -> Wrapped:
    """Return the predictor `"forest"`."""
    return Wrapped("forest", random_state=random_state)


def extra_trees(*, random_state: int = 0) -> Wrapped:
    """Return the predictor `"extra-trees"`."""
    return Wrapped("extra-trees", random_state=random_state)


def boosting(*, random_state: int = 0) -> Wrapped:
    """Return the predictor `"boosting"`."""
    return Wrapped("boosting", random_state=random_state)
