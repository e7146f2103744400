# SPDX-License-Identifier: Apache-2.0
"""The only file that imports scikit-learn, inside its functions, and the models beneath predictors.

The kernel regression is NumPy in closed form: it needs leave-one-out errors for a whole grid of
settings at once. Trees, support vectors and estimators of the user are scikit-learn's.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Floats

_ALPHAS = np.logspace(-4, 1.5, 12)
_TINY = 1e-9


class Scale:
    """Brings values to mean 0 and variance 1, after a logarithm if asked, and back."""

    def __init__(self, y: Floats, *, log: bool = False) -> None:
        self.log = log
        t = np.log(y) if log else y
        self.mean, self.std = float(t.mean()), float(t.std()) or 1.0
        self.z = (t - self.mean) / self.std

    def back(self, mean: Floats, std: Floats) -> tuple[Floats, Floats]:
        """Return mean and standard deviation (n,) in the units of y."""
        if not self.log:
            return mean * self.std + self.mean, std * self.std
        level = np.exp(np.clip(mean, -20, 20) * self.std + self.mean)
        return level, level * std * self.std


@dataclass(frozen=True)
class Setting:
    """What leave-one-out chooses for a kernel regression.

    Args:
        log: Whether the target is the logarithm.
        share: The share of the kernel's variance that indicator columns have.
        power: Of each other column's correlation with the target; the result is its weight.
        mix: The share of the RBF kernel; the rest is linear.
        rate: Of the RBF kernel, `exp(-rate * squared distance)`.
        alpha: The penalty.
        plain: Use the columns as they are.
    """

    log: bool = False
    share: float = 0.15
    power: float = 0.5
    mix: float = 0.0
    rate: float = 1.0
    alpha: float = 1.0
    plain: bool = False


def weights(F: Floats, z: Floats, setting: Setting) -> Floats:
    """Return a weight for each column (d,): those that matter get more of the variance."""
    if setting.plain:
        return np.ones(F.shape[1])
    centred = F - F.mean(axis=0)
    std = np.sqrt((centred**2).mean(axis=0))
    varies = std > _TINY
    safe = np.where(varies, std, 1.0)
    relevance = np.abs((z - z.mean()) @ centred) / (len(z) * safe * (z.std() or 1.0))
    indicator = ((F == 0) | (F == 1)).all(axis=0)
    weight = np.where(indicator, 1.0, relevance**setting.power / safe) * varies
    blocks = [(indicator & varies, setting.share), (~indicator & varies, 1 - setting.share)]
    total = [float(((weight * std)[at] ** 2).sum()) for at, _ in blocks]
    if min(total) <= _TINY:
        return np.asarray(weight / np.sqrt(max(sum(total), _TINY)))
    for (at, share), variance in zip(blocks, total, strict=True):
        weight[at] *= np.sqrt(share / variance)
    return np.asarray(weight)


def squared_distances(a: Floats, b: Floats, products: Floats | None = None) -> Floats:
    """Return the squared distances (n, k) between rows (n, d) and (k, d).

    Args:
        a: Rows (n, d).
        b: Rows (k, d).
        products: `a @ b.T`, where that is known.
    """
    twice = (2 * a) @ b.T if products is None else 2 * products
    far = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - twice
    return np.asarray(np.maximum(far, 0.0))  # rounding may leave less than nothing


class KernelRegression:
    """Ridge regression on a linear plus RBF kernel of weighted columns, in dual form.

    Args:
        F: Features (n, d).
        z: Targets (n,), of variance about 1.
        setting: Kernel and penalty.

    References:
        Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), sections 2.2, 5.4.2.
    """

    def __init__(self, F: Floats, z: Floats, setting: Setting) -> None:
        self.setting = setting
        self.centre, self.weight = F.mean(axis=0), weights(F, z, setting)
        self.A = (F - self.centre) * self.weight
        gram = self._kernel(self.A)
        self.column, self.level = gram.mean(axis=0), float(gram.mean())
        self.H = gram - self.column - self.column[:, None] + self.level
        self.offset = float(z.mean())
        self.z = z - self.offset

    def _kernel(self, rows: Floats) -> Floats:
        s, linear = self.setting, rows @ self.A.T
        if not s.mix:
            return np.asarray(linear)
        far = squared_distances(rows, self.A, linear)
        return np.asarray((1 - s.mix) * linear + s.mix * np.exp(-s.rate * far))

    def leave_one_out(self) -> tuple[float, float, Floats]:
        """Return the least mean squared leave-one-out error, its penalty, and its predictions."""
        values, vectors = np.linalg.eigh(self.H)
        lam = np.maximum(values, 0.0)[:, None]
        shrunk = lam / (lam + _ALPHAS)
        leverage = (vectors**2) @ shrunk + 1 / len(self.z)
        fitted = vectors @ (shrunk * (vectors.T @ self.z)[:, None])
        rest = (self.z[:, None] - fitted) / np.maximum(1 - leverage, 1e-4)
        error = (rest**2).mean(axis=0)
        best = int(np.argmin(error))
        return float(error[best]), float(_ALPHAS[best]), self.z - rest[:, best] + self.offset

    def solve(self, *, support_vectors: bool = False) -> KernelRegression:
        """Solve for the dual coefficients: least squares, or those of an SVR."""
        alpha = self.setting.alpha
        if support_vectors:
            self.dual, shift = _support_vectors(self.H, self.z, float(np.sqrt(alpha)))
            self.offset += shift
        else:
            self.dual = np.linalg.solve(self.H + alpha * np.eye(len(self.z)), self.z)
        return self

    @cached_property
    def inverse(self) -> Floats:
        """The inverse of the kernel matrix with the penalty (n, n): only uncertainty needs it."""
        return np.asarray(np.linalg.inv(self.H + self.setting.alpha * np.eye(len(self.z))))

    def predict(self, F: Floats, *, return_std: bool = False) -> tuple[Floats, Floats]:
        """Return the mean (n,) and, if asked, the posterior standard deviation with noise (n,)."""
        s = self.setting
        rows = (F - self.centre) * self.weight
        if not s.mix and not return_std:
            return (mean := self._linear(rows)), mean
        gram = self._kernel(rows)
        row = gram.mean(axis=1)
        gram = gram - row[:, None] - self.column + self.level
        mean = gram @ self.dual + self.offset if s.mix else self._linear(rows)
        if not return_std:
            return mean, mean
        own = (1 - s.mix) * (rows**2).sum(axis=1) + s.mix - 2 * row + self.level
        variance = own - ((gram @ self.inverse) * gram).sum(axis=1)
        return mean, np.sqrt(s.alpha + np.maximum(variance, 0.0))

    def _linear(self, rows: Floats) -> Floats:
        return np.asarray(rows @ (self.A.T @ self.dual) + self.offset)

    def left_out_std(self) -> Floats:
        """Return the standard deviation of each row under the model of all others (n,)."""
        return np.asarray(1 / np.sqrt(np.diag(self.inverse)))


def _support_vectors(gram: Floats, z: Floats, noise: float) -> tuple[Floats, float]:
    """Return dual coefficients (n,) and intercept of an SVR, robust beyond twice the noise."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import SVR

    # Ridge has dual coefficients residual / noise**2, so this bound is a residual of 2 noise.
    model = SVR(kernel="precomputed", C=min(2 / noise, 50.0), epsilon=noise / 4, max_iter=50_000)
    model.random_state = 0  # no argument of it: else it draws an unused seed from the global state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # then it is as good as it needs to be
        model.fit(gram, z)
    dual = np.zeros(len(z))
    dual[model.support_] = model.dual_coef_[0]
    return dual, float(model.intercept_[0])


def one_thread() -> Any:
    """Return a context in which linear algebra runs on one thread.

    The matrices are small: more threads gain nothing, and on a busy machine they wait for another.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")


def tree_model(name: str, random_state: int) -> Any:
    """Return the unfitted model behind "forest", "extra-trees" or "boosting"."""
    from sklearn.ensemble import (
        ExtraTreesRegressor,
        GradientBoostingRegressor,
        RandomForestRegressor,
    )

    settings = {"max_features": 0.5, "random_state": random_state}
    if name == "boosting":
        settings |= {"n_estimators": 150, "learning_rate": 0.08, "max_depth": 4, "subsample": 0.7}
        return GradientBoostingRegressor(**settings)
    kind = ExtraTreesRegressor if name == "extra-trees" else RandomForestRegressor
    return kind(60, bootstrap=True, **settings)


def published_model(name: str, random_state: int) -> Any:
    """Return an unfitted model of a published search, with its settings or the nearest there are.

    Args:
        name: `"boosting"`, `"mlp"` or `"forest"` of WeakNAS; `"carts"`, `"gp"` or `"network"` of
            NSGANetV2.
        random_state: The seed of trees and weights.
    """
    seed = {"random_state": random_state}
    if name == "boosting":
        from sklearn.ensemble import HistGradientBoostingRegressor

        # XGBoost's defaults. Each round leaves at most 0.85 of the residual of a row that has a
        # leaf of its own: of 1000 rounds those after the fiftieth change no ranking (on 250 rows of
        # NAS-Bench-201, that after 50 and that after 100 agree with a Kendall tau of .9999).
        return HistGradientBoostingRegressor(
            max_iter=50,
            max_depth=20,
            max_leaf_nodes=None,
            learning_rate=0.3,
            l2_regularization=1.0,
            min_samples_leaf=1,
            early_stopping=False,
            **seed,
        )
    if name == "mlp":
        from sklearn.neural_network import MLPRegressor

        return MLPRegressor(hidden_layer_sizes=(1000,) * 4, max_iter=100, **seed)
    if name == "network":
        from sklearn.neural_network import MLPRegressor

        shape = {"hidden_layer_sizes": (100,), "solver": "lbfgs", "alpha": 0.01}
        return MLPRegressor(max_iter=100, **shape, **seed)
    if name == "forest":
        from sklearn.ensemble import RandomForestRegressor

        return RandomForestRegressor(1000, max_depth=10, **seed)
    if name == "carts":
        from sklearn.ensemble import RandomForestRegressor

        return RandomForestRegressor(100, bootstrap=False, max_features=0.5, **seed)
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    kernel = ConstantKernel() * RBF() + WhiteKernel(0.1)
    return GaussianProcessRegressor(kernel, **seed)


def fitted(model: Any, F: Floats, z: Floats) -> Any:
    """Return the model, fitted on one thread: sums over threads depend on how many there are."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the rounds are those published
        return model.fit(single(model, F), z)


def single(model: Any, F: Floats) -> npt.NDArray[Any]:
    """Return the features for a model: in single precision for networks, which is twice as fast."""
    from sklearn.neural_network import MLPRegressor

    return F.astype(np.float32) if isinstance(model, MLPRegressor) else F


def settled(model: Any) -> Any:
    """Return an unfitted copy of a fitted model; a Gaussian process keeps its kernel's settings."""
    copy = fresh(model)
    return copy.set_params(kernel=model.kernel_, optimizer=None) if is_process(model) else copy


def is_process(model: Any) -> bool:
    """Return whether a model is a Gaussian process."""
    from sklearn.gaussian_process import GaussianProcessRegressor

    return isinstance(model, GaussianProcessRegressor)


def seeded(model: Any, random_state: int) -> Any:
    """Return an unfitted copy of an estimator, with a seed if it draws numbers and has none."""
    copy = fresh(model)
    if copy.get_params().get("random_state", 0) is None:
        copy.set_params(random_state=random_state)
    return copy


def is_forest(model: Any) -> bool:
    """Return whether a fitted model is an ensemble of trees on bootstrap samples."""
    from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

    return isinstance(model, (ExtraTreesRegressor, RandomForestRegressor)) and bool(model.bootstrap)


def _votes(model: Any, F: Floats) -> Floats:
    rows = F.astype(np.float32)
    return np.stack([tree.tree_.predict(rows)[:, 0] for tree in model.estimators_])


def spread_of_trees(model: Any, F: Floats) -> tuple[Floats, Floats]:
    """Return mean and standard deviation (n,) over the trees of a forest."""
    votes = _votes(model, F)
    return votes.mean(axis=0), votes.std(axis=0)


def out_of_bag(model: Any, F: Floats) -> tuple[Floats, Floats]:
    """Return mean and spread (n,) over the trees that did not see a row; NaN where all did."""
    votes = _votes(model, F)
    for vote, drawn in zip(votes, model.estimators_samples_, strict=True):
        vote[drawn] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN is the answer there
        return np.nanmean(votes, axis=0), np.nanstd(votes, axis=0)


def fresh(model: Any) -> Any:
    """Return an unfitted copy of an estimator."""
    from sklearn.base import clone

    return clone(model)


def has_own_std(model: Any) -> bool:
    """Return whether `model.predict` takes `return_std`, as that of a Gaussian process does."""
    return "return_std" in inspect.signature(model.predict).parameters


def dense_clusters(F: Floats, *, min_cluster_size: int, min_samples: int) -> npt.NDArray[np.int64]:
    """Return the number of the cluster of each row of F (n, d) by HDBSCAN, -1 for noise.

    Where no two clusters stand apart, all rows may be one: an archive around a single front is.

    References:
        Campello et al., Density-Based Clustering Based on Hierarchical Density Estimates, PAKDD
        2013.
    """
    from sklearn.cluster import HDBSCAN

    labels: npt.NDArray[np.int64] = np.full(len(F), -1)
    for single in (False, True):
        if (labels < 0).all():
            model = HDBSCAN(
                min_cluster_size=min_cluster_size,
                min_samples=min(min_samples, len(F)),
                allow_single_cluster=single,
                copy=True,
            )
            with one_thread():
                labels = model.fit(F).labels_.astype(np.int64)
    return labels


def regressor_tags() -> Any:
    """Return what scikit-learn 1.6 and later ask a regressor for."""
    from sklearn.linear_model import LinearRegression

    return LinearRegression().__sklearn_tags__()
