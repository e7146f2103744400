# SPDX-License-Identifier: Apache-2.0
"""Additive: a Gaussian process of the effects of choices, on values that may saturate.

It is not a kernel of `gaussian_process.Gaussian`: its weights are variance components, one for each
set of effects and a dozen or more in all, which a few steps in closed form find, and its values are
warped together with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.predictors.base import Predictor, spaced_rows
from lightning_subnet.predictors.kernel_regression import squared_distances
from lightning_subnet.space.space import SearchSpace

_SEARCH_ROWS = 120  # rows that weights and warp are chosen on: their cost grows with the cube
_ROWS = 2000  # rows of the kernel matrix
_STEPS = 6  # of the weights; five give what sixty give
_PRIOR = 0.5  # pseudo-observations that keep a weight near its start
_NOISE, _LEAST_NOISE = 0.03, 1e-4
_LENGTH = 0.3  # of the group: over it, effects of neighbouring positions are alike
_LEVELS = 0.6  # correlation of the effects of two steps of one choice
_MIXED, _RATE = 0.2, 1.5  # interactions: their share at the start, and the rate of their kernel
_EDGES = (0.3, 1.0, 3.0)  # how far beyond the data a value may saturate, in standard deviations
_FAR = 6.0  # standard deviations beyond which predictions are cut off
_VALUES = 50  # of a choice, that have effects of their own
_OWN = 12  # so many choices that stand alone are a group each
_TINY = 1e-9

Part = tuple[Indices, Floats, float]


@dataclass(frozen=True, eq=False, repr=False)
class Effects:
    """Effects of the values of a space's choices, and which of them are alike.

    An ordered choice has an effect of being there, and one of each step up; another choice has one
    of each value. Choices `ks.0, ks.1 ...` are a group: their effects are alike, the more so the
    nearer they stand.

    Args:
        basis: From one-hot columns to effects (d, t).
        group: Of each effect (t,).
        position: In the group (t,), from 0 to 1.
        level: The step or value (t,), -1 for being there.
        ordered: Whether it is a step (t,).
    """

    basis: Floats
    group: Indices
    position: Floats
    level: Indices
    ordered: Indices

    @classmethod
    def of(cls, space: SearchSpace) -> Effects:
        """Return the effects of a space's choices, for the one-hot columns of its features."""
        stems = []
        for name in space.names:
            stem, dot, tail = name.rpartition(".")
            stems.append(stem if dot and tail.isdigit() else name)
        alone = {stem for stem in stems if stems.count(stem) == 1}
        shared = alone if len(alone) > _OWN else set()
        groups = {stem: i for i, stem in enumerate(dict.fromkeys(stems)) if stem not in shared}
        sizes = [  # values that mean the same network share a column
            len({choice.representative(i) for i in range(len(choice.values))})
            for choice in space.choices.values()
        ]
        basis, rows, at = [], [], 0
        for j, (stem, choice) in enumerate(zip(stems, space.choices.values(), strict=True)):
            k = sizes[j]
            bins = spaced_rows(k, _VALUES)  # of so many values, neighbours share an effect
            # Many choices that stand alone share a group, too far from each other to be alike.
            position = j * 1e3 if stem in alone else stems[:j].count(stem) / stems.count(stem)
            for level in range(-1, len(bins)):
                if choice.ordered and level == 0:
                    continue  # being there at the least value
                column = np.zeros(sum(sizes))
                first = at + int(bins[max(level, 0)])
                last = at + int([*bins, k][level + 1])
                column[first : at + k if choice.ordered or level < 0 else last] = 1
                basis.append(column)
                rows.append((groups.get(stem, -1), position, level, choice.ordered))
            at += k
        return cls(np.stack(basis, axis=1), *(np.array(part) for part in zip(*rows, strict=True)))

    def parts(self) -> list[Part]:
        """Return sets of effects, their covariance, and the weight that it has at the start."""
        parts = []
        for group in np.unique(self.group):
            presence = (self.group == group) & (self.level < 0)
            at = np.flatnonzero((self.group == group) & ~presence)
            if len(at):
                level, position = self.level[at], self.position[at]
                covariance = np.where(level[:, None] == level, 1.0, _LEVELS * self.ordered[at])
                covariance *= self.ordered[at][:, None] == self.ordered[at]  # a step is no value
                distance = np.abs(position[:, None] - position)
                parts.append((at, covariance * np.exp(-distance / _LENGTH), 0.5))
                parts.append((at, covariance * (distance <= 1), 0.3))
                parts.append((at, np.eye(len(at)), 0.3))
            at = np.flatnonzero(presence)
            distance = np.abs(self.position[at][:, None] - self.position[at])
            parts.append((at, 0.7 * np.exp(-distance / _LENGTH) + 0.3 * np.eye(len(at)), 0.4))
        return parts


@dataclass(frozen=True)
class Warp:
    """Makes values that saturate at an edge straight: their distance to it, as a logarithm.

    Args:
        side: 1 if the edge is above, -1 below, 0 if there is none.
        edge: Its place.
        mean: Of the warped values.
        std: Of the warped values.

    References:
        Snelson, Rasmussen, Ghahramani, Warped Gaussian Processes, NeurIPS 2003.
    """

    side: int = 0
    edge: float = 0.0
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def to(cls, y: Floats, side: int, beyond: float) -> Warp:
        """Return the warp whose edge is so many standard deviations beyond the values."""
        edge = float(y.max() + beyond * y.std() if side > 0 else y.min() - beyond * y.std())
        z = cls(side, edge).straight(y)
        return cls(side, edge, float(z.mean()), float(z.std()) or 1.0)

    def straight(self, y: Floats) -> Floats:
        """Return warped values (n,), of mean 0 and variance 1."""
        t = y if not self.side else -self.side * np.log(self.side * (self.edge - y))
        return np.asarray((t - self.mean) / self.std)

    def log_slope(self, y: Floats) -> float:
        """Return the sum of the logarithms of the slope at values (n,)."""
        slope = np.abs(self.edge - y) if self.side else np.ones(len(y))
        return float(-np.log(slope * self.std).sum())

    def back(self, mean: Floats, std: Floats) -> tuple[Floats, Floats]:
        """Return mean and standard deviation (n,) in the units of the values."""
        t, std = np.clip(mean, -_FAR, _FAR) * self.std + self.mean, std * self.std
        if not self.side:
            return t, std
        left = np.exp(-self.side * t)
        return self.edge - self.side * left, left * std


class Additive(Predictor):
    """A Gaussian process: additive effects of choices, interactions, and a warp of the values.

    The effects of one group of choices, such as the kernel sizes `ks.0, ks.1 ...` of a network's
    blocks, are alike, and more so between near blocks. How large the effects of each group are, how
    alike, and how much interactions (an RBF kernel) add, are weights of maximal posterior density;
    the warp is the likeliest of a few. Few samples suffice, and predictions beyond them are sane.

    Args:
        effects: The effects of the space's choices; None takes every column by itself.
        random_state: Not used; all predictors have it.

    References:
        Duvenaud et al., Additive Gaussian Processes, NeurIPS 2011; Zhou et al., MM Algorithms For
        Variance Components Models, JCGS 28 (2019), for the weights; Rasmussen and Williams,
        Gaussian Processes for Machine Learning (2006), equation 5.12, for left-out predictions.

    Example:
        >>> from lightning_subnet.predictors.masked_features import features
        >>> space = SearchSpace({f"width.{i}": [8, 16, 32, 64] for i in range(8)})
        >>> X = space.sample_indices(200, 0)
        >>> y = 80 - 20 * np.exp(-X.mean(axis=1))
        >>> F = features(space, X)
        >>> predictor = Additive(Effects.of(space)).fit(F[:25], y[:25])
        >>> bool(np.abs(predictor.predict(F[25:]) - y[25:]).max() < 0.3)
        True
    """

    name = "additive"
    minimum: ClassVar[int] = 6

    def __init__(self, effects: Effects | None = None, *, random_state: int = 0) -> None:
        super().__init__(random_state=random_state)
        self.effects = effects

    @classmethod
    def for_space(cls, space: SearchSpace, *, random_state: int = 0) -> Predictor:
        """Return a predictor that knows which features of the space are alike."""
        return cls(effects=Effects.of(space), random_state=random_state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(random_state={self.random_state!r})"

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        rows, some = spaced_rows(len(y), _ROWS), spaced_rows(len(y), _SEARCH_ROWS)
        margin = _EDGES[0] * y[some].std()
        if y.max() >= y[some].max() + margin or y.min() <= y[some].min() - margin:
            some = np.union1d(some, [y.argmin(), y.argmax()])  # an edge is beyond all values
        self._kernel = _Kernel(self._effects_of(F[rows]), self._parts(F.shape[1]))
        small = self._kernel
        if len(some) < len(rows):  # weights and warp are chosen on fewer rows
            small = _Kernel(self._effects_of(F[some]), small.parts)
        self.warp, weights, noise = _likeliest(small, y[some])
        self._kernel.weigh(weights)
        z = self.warp.straight(y[rows])
        gram = self._kernel.gram() + noise * np.eye(len(rows))
        self._noise, self._inverse = noise, np.linalg.inv(gram)
        self._dual = self._inverse @ z
        precision = np.diag(self._inverse)
        left_out = self.warp.back(z - self._dual / precision, 1 / np.sqrt(precision))
        return self._unseen(F, rows, left_out)

    def _effects_of(self, F: Floats) -> Floats:
        """Return the effects (n, t) that are in features (n, d)."""
        if self.effects is None:
            return F
        return np.asarray(F[:, : len(self.effects.basis)] @ self.effects.basis)

    def _parts(self, n_columns: int) -> list[Part]:
        if self.effects is not None:
            return self.effects.parts()
        return [(np.arange(n_columns), np.eye(n_columns), 1.0)]

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        rows = self._effects_of(F)
        mean = self._kernel.times(rows, self._dual)
        if not return_std:
            return self.warp.back(mean, mean)
        cross, prior = self._kernel.cross(rows)
        variance = prior + self._noise - ((cross @ self._inverse) * cross).sum(axis=1)
        return self.warp.back(mean, np.sqrt(np.maximum(variance, self._noise)))


class _Kernel:
    """Sums of covariances of effects, an RBF kernel for interactions, and a constant.

    It has no weights, and so no values, before `weigh`; `start` are those to begin with.

    Args:
        rows: Effects (n, t).
        parts: The sets of effects; those that do not vary in the rows get no weight.
    """

    def __init__(self, rows: Floats, parts: list[Part]) -> None:
        self.parts, self.centre = parts, rows.mean(axis=0)
        self.A = rows - self.centre
        self.grams = [self.A[:, at] @ covariance @ self.A[:, at].T for at, covariance, _ in parts]
        level = np.array([gram.trace() for gram in self.grams]) / len(rows)
        start = np.array([weight for _, _, weight in parts]) * (level > _TINY)
        start /= max(float(start @ level), _TINY)
        scale = np.zeros(rows.shape[1])
        for (at, covariance, _), weight in zip(parts, start, strict=True):
            scale[at] += weight * np.diag(covariance)
        self.scale = np.sqrt(_RATE * scale)
        self.R = self.A * self.scale
        rbf = self._rbf(self.R)
        self.column, self.level = rbf.mean(axis=0), float(rbf.mean())
        rbf = self._less_mean(rbf)
        self.stretch = len(rows) / max(float(rbf.trace()), _TINY)
        self.grams.append(rbf * self.stretch)
        self.start = np.append(start, _MIXED)

    def weigh(self, weights: Floats) -> None:
        """Set the weights of the parts and of the interactions."""
        self.weights = weights
        self.covariance = np.zeros((len(self.scale),) * 2)
        for (at, covariance, _), weight in zip(self.parts, weights[:-1], strict=True):
            self.covariance[np.ix_(at, at)] += weight * covariance

    def gram(self) -> Floats:
        """Return the kernel matrix of the rows (n, n), without noise."""
        return np.asarray(1.0 + sum(w * g for w, g in zip(self.weights, self.grams, strict=True)))

    def cross(self, others: Floats) -> tuple[Floats, Floats]:
        """Return the kernel of other rows with these (m, n), and of each with itself (m,)."""
        others = others - self.centre
        rbf = self._rbf(others * self.scale)
        share = self.weights[-1] * self.stretch
        linear = others @ self.covariance
        variance = 1.0 + (linear * others).sum(axis=1)
        variance += share * (1.0 - 2 * rbf.mean(axis=1) + self.level)
        return np.asarray(1.0 + linear @ self.A.T + share * self._less_mean(rbf)), variance

    def times(self, others: Floats, dual: Floats) -> Floats:
        """Return the kernel of other rows with these, times a vector (n,): (m,)."""
        others = others - self.centre
        rbf = self._rbf(others * self.scale)
        total = float(dual.sum())
        mixed = rbf @ dual - rbf.mean(axis=1) * total - self.column @ dual + self.level * total
        linear = others @ (self.covariance @ (self.A.T @ dual))
        return np.asarray(total + linear + self.weights[-1] * self.stretch * mixed)

    def _rbf(self, points: Floats) -> Floats:
        return np.asarray(np.exp(-squared_distances(points, self.R)))

    def _less_mean(self, rbf: Floats) -> Floats:
        """Return the RBF kernel (m, n) of effects from which those of the mean row are taken."""
        return np.asarray(rbf - rbf.mean(axis=1)[:, None] - self.column + self.level)


def _likeliest(kernel: _Kernel, y: Floats) -> tuple[Warp, Floats, float]:
    """Return warp, weights and noise of the greatest posterior density."""
    n = len(y)
    flat = np.stack(kernel.grams).reshape(len(kernel.grams), -1)
    start, varies = kernel.start, kernel.start > 0
    prior = np.where(varies, start, 1.0)
    warps = [Warp(0, 0.0, float(y.mean()), float(y.std()))]
    warps += [Warp.to(y, side, beyond) for side in (1, -1) for beyond in _EDGES]
    if y.min() > 0:
        warps.append(Warp.to(y, -1, float(y.min() / y.std())))  # its edge is 0: the logarithm
    fits = []
    for warp in warps:
        z = warp.straight(y)
        weights, noise = start.copy(), _NOISE
        for _ in range(_STEPS):
            inverse = np.linalg.inv(_matrix(flat, weights, noise, n))
            dual = inverse @ z
            positive = np.where(varies, weights, 1.0)
            # Each weight moves by the root of the variance it explains over its cost.
            explains = flat @ np.outer(dual, dual).ravel() + _PRIOR * prior / positive**2
            costs = flat @ inverse.ravel() + _PRIOR / positive
            weights = weights * np.sqrt(np.maximum(explains, 0.0) / np.maximum(costs, _TINY))
            more = (dual @ dual + _PRIOR * _NOISE / noise**2) / (inverse.trace() + _PRIOR / noise)
            noise = max(float(noise * np.sqrt(more)), _LEAST_NOISE)
        gram = _matrix(flat, weights, noise, n)
        positive = np.where(varies, weights, 1.0)
        density = warp.log_slope(y) - 0.5 * float(
            np.linalg.slogdet(gram)[1]
            + z @ np.linalg.solve(gram, z)
            + _PRIOR * (np.log(positive) + prior / positive)[varies].sum()
        )
        fits.append((density, warp, weights, noise))
    _, warp, weights, noise = max(fits, key=lambda fit: fit[0])
    return warp, weights, noise


def _matrix(flat: Floats, weights: Floats, noise: float, n: int) -> Floats:
    return np.asarray(1.0 + (weights @ flat).reshape(n, n) + noise * np.eye(n))
