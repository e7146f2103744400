# SPDX-License-Identifier: Apache-2.0
"""GP: a Gaussian process on features of subnets, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from lightning_subnet._types import Floats
from lightning_subnet.predictors.base import KERNEL_ROWS, SEARCH_ROWS, Predictor, spaced_rows
from lightning_subnet.predictors.kernel_regression import (
    Scale,
    Setting,
    squared_distances,
    weights,
)

_ITERATIONS = 30
_WEIGHTS = Setting(share=0.15, power=1.0)


@dataclass(frozen=True)
class Kernel:
    """Hyperparameters: variances of the parts, length scales, and the variance of the noise.

    Distances are scaled so that two random rows are 1 apart in the root mean square.

    Args:
        linear: Variance of the linear part, on all columns.
        rbf: Variance of the RBF part, on columns that hold numbers.
        rbf_length: Its length scale.
        hamming: Variance of the Hamming part, on indicator columns.
        hamming_length: Its length scale.
        noise: Variance of the noise.
    """

    linear: float = 1.0
    rbf: float = 0.3
    rbf_length: float = 1.0
    hamming: float = 0.1
    hamming_length: float = 1.0
    noise: float = 0.02


# The logarithms have normal priors: weak ones, around the values above.
_PRIOR = np.log(astuple(Kernel()))
_PRIOR_STD = np.array([1.5, 1.5, 0.7, 1.5, 0.7, 1.5])
_LIMITS = np.log(
    [(1e-4, 1e2), (1e-4, 1e2), (0.05, 20), (1e-4, 1e2), (0.05, 20), (1e-5, 2)]
)  # of each


# Why none of the others serves here: scikit-learn's kernels see all columns, and its processes have
# neither priors nor left-out predictions; GPyTorch needs torch, which predictors do without; and
# `Additive` warps the values, so that its posterior is not Gaussian in the units of the measure, as
# the expected improvement of "bayesian" takes it to be.
class Gaussian:
    """Gaussian process regression on a linear, an RBF and a Hamming kernel, in closed form.

    On indicator columns the squared distance counts the choices that differ, so that an RBF kernel
    of it is the categorical kernel `exp(-differences / scale)`.

    Args:
        F: Features (n, d).
        z: Targets (n,), of mean 0 and variance about 1.
        kernel: The hyperparameters; None finds those of the greatest marginal likelihood times
            prior, on 400 evenly spaced rows at most.

    Raises:
        numpy.linalg.LinAlgError: The kernel matrix is not positive definite.

    References:
        Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), algorithm 2.1,
        sections 5.4.1 and 5.4.2; Ru et al., Bayesian Optimisation over Multiple Continuous and
        Categorical Inputs, arXiv:1906.08878, section 4.2 (the categorical kernel).
    """

    def __init__(self, F: Floats, z: Floats, kernel: Kernel | None = None) -> None:
        self.centre = F.mean(axis=0)
        weight = weights(F, z, _WEIGHTS)
        indicator = ((F == 0) | (F == 1)).all(axis=0)
        spread = weight * F.std(axis=0)

        def unit_distance(columns: Any) -> Floats:
            """Return weights such that the mean squared distance of two rows is 1."""
            total = 2 * float((spread[columns] ** 2).sum())
            return np.asarray(weight[columns] / np.sqrt(total) if total > 0 else weight[columns])

        self.weight = weight
        self.columns = [np.flatnonzero((weight > 0) & kind) for kind in (~indicator, indicator)]
        self.scales = [unit_distance(columns) for columns in self.columns]
        if kernel is None:
            some = spaced_rows(len(z), SEARCH_ROWS)
            kernel = self._likeliest(F[some], z[some])
        self.kernel = kernel
        self.rows = self.blocks(F)
        self.z = z
        self.chol = np.linalg.cholesky(self.prior(self.rows, self.rows) + self._noise(len(z)))
        self.dual = self.solve(z)

    def blocks(self, F: Floats) -> tuple[Floats, ...]:
        """Return features (n, d) as the columns of the linear, RBF and Hamming part."""
        F = F - self.centre
        parts = zip(self.columns, self.scales, strict=True)
        return (F * self.weight, *(F[:, columns] * scale for columns, scale in parts))

    def prior(self, a: tuple[Floats, ...], b: tuple[Floats, ...]) -> Floats:
        """Return the kernel between the blocks of n and of k rows, (n, k), without noise."""
        k = self.kernel
        similarity = []
        for i, length in self._lengths():
            products = a[i] @ b[i].T  # to the last bit symmetric where a is b
            similarity.append(np.exp(-squared_distances(a[i], b[i], products) / (2 * length**2)))
        pairs = zip((k.rbf, k.hamming), similarity, strict=True)
        parts = (variance * part for variance, part in pairs)
        return np.asarray(k.linear * (a[0] @ b[0].T) + sum(parts))

    def prior_variance(self, a: tuple[Floats, ...]) -> Floats:
        """Return the kernel of each row with itself (n,), without noise."""
        k = self.kernel
        return np.asarray(k.linear * (a[0] ** 2).sum(axis=1) + k.rbf + k.hamming)

    def _lengths(self) -> tuple[tuple[int, float], ...]:
        return (1, self.kernel.rbf_length), (2, self.kernel.hamming_length)

    def _noise(self, n: int) -> Floats:
        return np.asarray(self.kernel.noise * np.eye(n))

    def solve(self, right: Floats) -> Floats:
        """Return the inverse of the kernel matrix with noise times (n,) or (n, k)."""
        from scipy.linalg import cho_solve

        return np.asarray(cho_solve((self.chol, True), right))

    def whitened(self, a: tuple[Floats, ...]) -> Floats:
        """Return V (n, k) for k rows' blocks: posterior covariances are priors less V' V."""
        from scipy.linalg import solve_triangular

        return np.asarray(solve_triangular(self.chol, self.prior(self.rows, a), lower=True))

    def predict(self, F: Floats, *, return_std: bool = True) -> tuple[Floats, Floats]:
        """Return the mean (k,) and the posterior standard deviation with noise (k,)."""
        a = self.blocks(F)
        mean = self.prior(a, self.rows) @ self.dual
        if not return_std:
            return mean, mean
        variance = self.prior_variance(a) - (self.whitened(a) ** 2).sum(axis=0)
        return mean, np.sqrt(np.maximum(variance, 0.0) + self.kernel.noise)

    def leave_one_out(self) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of each row under the process of all others (n,)."""
        precision = np.diag(self.solve(np.eye(len(self.z))))  # equations 5.10 to 5.12
        return self.z - self.dual / precision, 1 / np.sqrt(precision)

    def _likeliest(self, F: Floats, z: Floats) -> Kernel:
        """Return the hyperparameters of the greatest posterior density, by L-BFGS."""
        from scipy.optimize import minimize

        linear, *others = (block @ block.T for block in self.blocks(F))
        squares = [np.maximum(_squares(gram), 0.0) for gram in others]
        present = [bool(len(columns)) for columns in self.columns]
        free = np.flatnonzero([True, present[0], present[0], present[1], present[1], True])
        theta = _PRIOR.copy()

        def loss(free_values: Floats) -> tuple[float, Floats]:
            theta[free] = free_values
            value, slope = _log_density(theta, linear, squares, z, present)
            off = (theta - _PRIOR) / _PRIOR_STD
            value -= 0.5 * float((off[free] ** 2).sum())
            return -value, -(slope - off / _PRIOR_STD)[free]

        optimum = minimize(
            loss,
            _PRIOR[free],
            jac=True,
            method="L-BFGS-B",
            bounds=_LIMITS[free],
            options={"maxiter": _ITERATIONS},
        )
        theta[free] = optimum.x
        # A part without columns is a constant, which the data cannot tell from the mean.
        off = np.array([1, present[0], 1, present[1], 1, 1], dtype=float)
        return Kernel(*(np.exp(theta) * off).tolist())


def _squares(gram: Floats) -> Floats:
    """Return the squared distances (n, n) between rows, from their products (n, n)."""
    squares = np.diag(gram)
    return np.asarray(squares[:, None] + squares - 2 * gram)


def _log_density(
    theta: Floats, linear: Floats, squares: Sequence[Floats], z: Floats, present: Sequence[bool]
) -> tuple[float, Floats]:
    """Return the log marginal likelihood, less a constant, and its slope in log parameters.

    References:
        Rasmussen and Williams (2006), equations 5.8 and 5.9.
    """
    from scipy.linalg import cho_solve

    level, *pairs, noise = np.exp(theta)
    pairs = [(pairs[0], pairs[1]), (pairs[2], pairs[3])]
    parts = [
        has * variance * np.exp(-square / (2 * length**2))
        for (variance, length), square, has in zip(pairs, squares, present, strict=True)
    ]
    chol = np.linalg.cholesky(level * linear + sum(parts) + noise * np.eye(len(z)))
    dual = cho_solve((chol, True), z)
    gap = np.outer(dual, dual) - cho_solve((chol, True), np.eye(len(z)))
    slope = [level * (gap * linear).sum()]
    for (_, length), square, part in zip(pairs, squares, parts, strict=True):
        weighted = gap * part
        slope += [weighted.sum(), (weighted * square).sum() / length**2]
    slope.append(noise * np.trace(gap))
    value = -0.5 * float(z @ dual) - float(np.log(np.diag(chol)).sum())
    return value, 0.5 * np.array(slope)


class GP(Predictor):
    """A Gaussian process with a linear, an RBF and a Hamming kernel.

    The linear and the RBF part see columns weighted by their correlation with the target, the
    Hamming part counts the choices that differ. Hyperparameters are those of the greatest marginal
    likelihood, under weak priors; predictions of left-out rows are in closed form.

    Args:
        random_state: Not used; all predictors have it.

    References:
        Rasmussen and Williams, Gaussian Processes for Machine Learning (2006).

    Example:
        >>> F = np.random.default_rng(0).random((30, 3))
        >>> y = np.sin(3 * F[:, 0]) + F[:, 1]
        >>> gp = GP().fit(F, y)
        >>> bool(np.corrcoef(gp.out_of_fold, y)[0, 1] > 0.95)
        True
    """

    name = "gp"
    minimum = 8

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        rows = spaced_rows(len(y), KERNEL_ROWS)
        self._scale = Scale(y[rows])
        self._model = Gaussian(F[rows], self._scale.z)
        return self._unseen(F, rows, self._scale.back(*self._model.leave_one_out()))

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        return self._scale.back(*self._model.predict(F, return_std=return_std))
