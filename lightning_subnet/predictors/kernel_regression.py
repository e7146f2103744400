# SPDX-License-Identifier: Apache-2.0
"""Kernel regression in closed form, and the scales of columns and targets that it works on.

NumPy alone, as it needs leave-one-out errors for a whole grid of settings at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_subnet._types import Floats
from lightning_subnet.predictors._sklearn import svr_coefficients

_ALPHAS = np.logspace(-4, 1.5, 12)
_TINY = 1e-9


class Scale:
    """The mean and the spread of values, which brings them to mean 0 and variance 1, and back.

    Args:
        y: The values (n,).
        log: Take their logarithms first.

    Attributes:
        z: The scaled values (n,).

    Example:
        >>> scale = Scale(np.array([1.0, 3.0]))
        >>> scale.z, scale.back(np.array([2.0]), np.array([1.0]))
        (array([-1.,  1.]), (array([4.]), array([1.])))
    """

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
    """Settings of a kernel regression, which leave-one-out chooses.

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
    deviations = F - F.mean(axis=0)
    std = np.sqrt((deviations**2).mean(axis=0))
    varies = std > _TINY
    safe = np.where(varies, std, 1.0)
    relevance = np.abs((z - z.mean()) @ deviations) / (len(z) * safe * (z.std() or 1.0))
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
        products: `a @ b.T`, if it is at hand.
    """
    twice = (2 * a) @ b.T if products is None else 2 * products
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - twice
    return np.asarray(np.maximum(squares, 0.0))  # rounding may leave less than nothing


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
        squares = squared_distances(rows, self.A, linear)
        return np.asarray((1 - s.mix) * linear + s.mix * np.exp(-s.rate * squares))

    def leave_one_out(self) -> tuple[float, float, Floats]:
        """Return the least mean squared leave-one-out error, its penalty, and its predictions."""
        values, vectors = np.linalg.eigh(self.H)
        lam = np.maximum(values, 0.0)[:, None]
        shrinkage = lam / (lam + _ALPHAS)
        leverage = (vectors**2) @ shrinkage + 1 / len(self.z)
        fits = vectors @ (shrinkage * (vectors.T @ self.z)[:, None])
        residuals = (self.z[:, None] - fits) / np.maximum(1 - leverage, 1e-4)
        error = (residuals**2).mean(axis=0)
        best = int(np.argmin(error))
        return float(error[best]), float(_ALPHAS[best]), self.z - residuals[:, best] + self.offset

    def solve(self, *, support_vectors: bool = False) -> KernelRegression:
        """Solve for the dual coefficients: least squares, or those of an SVR."""
        alpha = self.setting.alpha
        if support_vectors:
            self.dual, shift = svr_coefficients(self.H, self.z, float(np.sqrt(alpha)))
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
        prior = (1 - s.mix) * (rows**2).sum(axis=1) + s.mix - 2 * row + self.level
        variance = prior - ((gram @ self.inverse) * gram).sum(axis=1)
        return mean, np.sqrt(s.alpha + np.maximum(variance, 0.0))

    def _linear(self, rows: Floats) -> Floats:
        return np.asarray(rows @ (self.A.T @ self.dual) + self.offset)

    def left_out_std(self) -> Floats:
        """Return the standard deviation of each row under the model of all others (n,)."""
        return np.asarray(1 / np.sqrt(np.diag(self.inverse)))
