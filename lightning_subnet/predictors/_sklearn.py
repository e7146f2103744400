# SPDX-License-Identifier: Apache-2.0
"""The only file that imports scikit-learn, inside its functions: models, clusters, threads."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Floats


def svr_coefficients(gram: Floats, z: Floats, noise: float) -> tuple[Floats, float]:
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
    """Return the unfitted model of "forest", "extra-trees" or "boosting"."""
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
    """Return an unfitted model of a published search, with its settings or those nearest to them.

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


def fit(model: Any, F: Floats, z: Floats) -> Any:
    """Fit a model on one thread and return it: sums over threads depend on how many there are."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the rounds are those published
        return model.fit(inputs_of(model, F), z)


def inputs_of(model: Any, F: Floats) -> npt.NDArray[Any]:
    """Return the features for a model: in single precision for networks, which is twice as fast."""
    from sklearn.neural_network import MLPRegressor

    return F.astype(np.float32) if isinstance(model, MLPRegressor) else F


def copy_with_kernel(model: Any) -> Any:
    """Return an unfitted copy of a fitted model; a Gaussian process keeps its kernel's settings."""
    copy = unfitted_copy(model)
    return copy.set_params(kernel=model.kernel_, optimizer=None) if is_process(model) else copy


def is_process(model: Any) -> bool:
    """Return whether a model is a Gaussian process."""
    from sklearn.gaussian_process import GaussianProcessRegressor

    return isinstance(model, GaussianProcessRegressor)


def copy_with_seed(model: Any, random_state: int) -> Any:
    """Return an unfitted copy of an estimator, with a seed if it draws numbers and has none."""
    copy = unfitted_copy(model)
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
    for vote, rows in zip(votes, model.estimators_samples_, strict=True):
        vote[rows] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN is the answer there
        return np.nanmean(votes, axis=0), np.nanstd(votes, axis=0)


def unfitted_copy(model: Any) -> Any:
    """Return an unfitted copy of an estimator."""
    from sklearn.base import clone

    return clone(model)


def has_own_std(model: Any) -> bool:
    """Return whether `model.predict` takes `return_std`, as that of a Gaussian process does."""
    return "return_std" in inspect.signature(model.predict).parameters


def dense_clusters(F: Floats, *, min_cluster_size: int, min_samples: int) -> npt.NDArray[np.int64]:
    """Return the number of the cluster of each row of F (n, d) by HDBSCAN, -1 for noise.

    Where no two clusters are apart, all rows may be one: an archive around a single front is.

    References:
        Campello et al., Density-Based Clustering Based on Hierarchical Density Estimates, PAKDD
        2013.
    """
    from sklearn.cluster import HDBSCAN

    labels: npt.NDArray[np.int64] = np.full(len(F), -1)
    for allow_single_cluster in (False, True):
        if (labels < 0).all():
            model = HDBSCAN(
                min_cluster_size=min_cluster_size,
                min_samples=min(min_samples, len(F)),
                allow_single_cluster=allow_single_cluster,
                copy=True,
            )
            with one_thread():
                labels = model.fit(F).labels_.astype(np.int64)
    return labels


def regressor_tags() -> Any:
    """Return the tags of a regressor, which scikit-learn 1.6 and later ask for."""
    from sklearn.linear_model import LinearRegression

    return LinearRegression().__sklearn_tags__()
