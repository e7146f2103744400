# SPDX-License-Identifier: Apache-2.0
"""Sensitivity of a measure to each choice of a space: main effects and first-order shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Floats, Indices
from lightning_subnet.errors import ObjectiveError, SearchError
from lightning_subnet.predictors import _sklearn
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.measures import Measure

ENUMERATED = 100_000  # subnets of a space whose exact measures are taken of all
SAMPLED = 20_000
FEWEST = 20  # evaluations that a predictor may be fitted on
_FOLDS = 20


@dataclass(frozen=True)
class Dimension:
    """One choice, or a group of them such as `ks.*`.

    Args:
        name: Its name.
        at: The positions of its choices.
    """

    name: str
    at: tuple[int, ...]


def dimensions(space: SearchSpace, *, by: str) -> list[Dimension]:
    """Return the choices of a space one by one, or the groups that their names form.

    Args:
        space: The space.
        by: `"choice"`, or `"group"`, where `ks.0, ks.1, ...` are `ks.*`.

    Example:
        >>> space = SearchSpace({"depth": [1, 2], "ks.0": [3, 5], "ks.1": [3, 5]})
        >>> [dimension.name for dimension in dimensions(space, by="group")]
        ['depth', 'ks.*']
    """
    groups: dict[str, list[int]] = {}
    for j, name in enumerate(space.names):
        stem, dot, tail = name.rpartition(".")
        numbered = by == "group" and dot and stem and tail.isdigit()
        groups.setdefault(f"{stem}.*" if numbered else name, []).append(j)
    return [Dimension(name, tuple(at)) for name, at in groups.items()]


def turned_down(space: SearchSpace, dimension: Dimension) -> Indices:
    """Return the largest subnet with a dimension at its least value, as rows (k, n_choices).

    Ordered choices are at the first of their values. Categorical ones have no least value: there is
    one row for each of theirs. A dimension that the largest subnet does not have gives no row.
    The rows are canonical.
    """
    largest = space.indices([space.largest])
    indices = {
        j: [space.choices[space.names[j]].values.index(v) for v in space.values[space.names[j]]]
        for j in dimension.at
    }
    free = [j for j in dimension.at if not space.choices[space.names[j]].ordered]
    rows = []
    for k in range(max([len(indices[j]) for j in free], default=1)):
        row = largest.copy()
        for j, of_values in indices.items():
            row[0, j] = of_values[min(k, len(of_values) - 1) if j in free else 0]
        rows.append(space.canonical(row))
    X = np.concatenate(rows)
    return X[[code != row_codes(largest)[0] for code in row_codes(X)]]


def explained(space: SearchSpace, X: Indices, y: Floats, *, complete: bool) -> Floats:
    """Return the variance that each choice explains by itself, where it exists, (n_choices,).

    That is P(it exists) Var(E[y | its value]), over the subnets in which it exists: the variance
    between the means of its values. Of a sample the part that chance gives is taken off, as in
    Kelley's epsilon squared, so that a choice without effect has 0 on average.

    Args:
        space: The space.
        X: Canonical rows (n, n_choices), uniform over the space.
        y: Their values (n,).
        complete: Whether these are all subnets, so that chance has no part in it.

    References:
        Sobol, Sensitivity estimates for nonlinear mathematical models, 1993 (first-order indices);
        Kelley, An unbiased correlation ratio measure, PNAS 21(9), 1935; Hutter et al., An efficient
        approach for assessing hyperparameter importance, ICML 2014 (conditional choices).

    Example:
        >>> space = SearchSpace(a=[0, 1], b=[0, 1])
        >>> X = np.concatenate(list(space.index_blocks()))
        >>> explained(space, X, 3.0 * X[:, 0] + X[:, 1], complete=True).tolist()
        [2.25, 0.25]
    """
    exists, out = space.active(X), np.zeros(X.shape[1])
    y = y - y.mean()
    for j in range(X.shape[1]):
        values = y[exists[:, j]]
        counts = np.bincount(X[exists[:, j], j])
        sums = np.bincount(X[exists[:, j], j], values)
        if not len(values):
            continue
        means = sums[counts > 0] / counts[counts > 0]
        between = float((counts[counts > 0] * (means - values.mean()) ** 2).sum())
        freedom = len(values) - len(means)
        if not complete and freedom > 0:
            within = float(((values - values.mean()) ** 2).sum()) - between
            between -= (len(means) - 1) * max(within, 0.0) / freedom
        out[j] = between / len(y)
    return out


@dataclass(frozen=True)
class Sensitivity:
    """Figures of how one measure depends on the dimensions of a space.

    Args:
        measure: Its name.
        unit: Its unit.
        largest: Its value at the largest subnet.
        change: By dimension, its change where that is turned down from the largest, in its unit;
            NaN where the largest does not have the dimension.
        change_error: The standard errors.
        share: By dimension, the share of its variance over the space that the choices explain, each
            by itself.
        share_error: The standard errors.
        rest: The share that is left: choices together, noise, and the error of a predictor.
        rest_error: Its standard error.
        basis: The subnets and the predictor behind all this, in words.
    """

    measure: str
    unit: str
    largest: float
    change: Floats
    change_error: Floats
    share: Floats
    share_error: Floats
    rest: float
    rest_error: float
    basis: str


@dataclass(frozen=True)
class _Variances:
    """Variance by choice and in all, and values: of all data, or without one fold."""

    by_choice: Floats
    total: float
    values: Floats  # of the turned-down rows; the first is the largest subnet's


@dataclass(frozen=True)
class Below:
    """Measured values of the turned-down rows, the largest subnet's first, with their errors."""

    values: Floats
    errors: Floats


@dataclass(frozen=True)
class Analysis:
    """Sensitivities of measures to the dimensions of a space.

    Args:
        space: The space.
        dimensions: Its dimensions.
        seed: The seed of samples and folds.
    """

    space: SearchSpace
    dimensions: Sequence[Dimension]
    seed: int

    def of_exact(self, measure: Measure) -> Sensitivity:
        """Return the sensitivity of an exact measure of index rows, without a predictor."""
        X, complete = self.uniform(ENUMERATED, SAMPLED)
        y, _ = measure.evaluate(self.space, X)
        rows, _ = self.rows
        below = Below(*measure.evaluate(self.space, rows))
        basis = f"{'all' if complete else 'a sample of'} {len(X):,} subnets"
        return self._directly(measure.name, measure.unit, X, y, below, complete, basis)

    def of_measured(self, measure: Measure, n: int) -> Sensitivity:
        """Return the sensitivity of a measure that takes its time, of n subnets and those below.

        The turned-down rows are measured; the shares are those of a predictor, unless the n subnets
        are all of the space.
        """
        X, complete = self.uniform(n, n)
        rows, _ = self.rows
        values, errors = measure.evaluate(self.space, np.concatenate([rows, X]))
        below = Below(values[: len(rows)], errors[: len(rows)])
        y = values[len(rows) :]
        return self.of_values(measure.name, measure.unit, X, y, below=below, complete=complete)

    def of_values(
        self,
        name: str,
        unit: str,
        X: Indices,
        y: Floats,
        *,
        below: Below | None = None,
        complete: bool | None = None,
        predictor: Any = "ridge",
    ) -> Sensitivity:
        """Return the sensitivity of values that were measured, of all subnets or by a predictor.

        Args:
            name: The measure's name.
            unit: Its unit.
            X: Canonical rows (n, n_choices) of distinct subnets, drawn in any way.
            y: Their values (n,).
            below: The turned-down rows, where they were measured too.
            complete: Whether the rows are all subnets; by default, as many as the space has.
            predictor: As `predictors.make` takes it.

        Raises:
            SearchError: Too few evaluations.
        """
        finite = np.isfinite(y)
        X, y = X[finite], y[finite]
        complete = (
            len(X) == self.space.size if complete is None else complete and bool(finite.all())
        )
        if complete:
            if below is None:
                place = dict(zip(row_codes(X), y, strict=True))
                at = [place.get(code, np.nan) for code in row_codes(self.rows[0])]
                below = Below(np.array(at), np.zeros(len(at)))
            basis = f"all {len(X):,} subnets, measured"
            return self._directly(name, unit, X, y, below, True, basis)
        if len(X) < FEWEST:
            msg = (
                f"{name!r} was measured on {len(X)} of {self.space.size:,} subnets; its shares "
                f"need at least {FEWEST}, better 100. Measure more of them."
            )
            raise SearchError(msg)
        return self._predicted(name, unit, X, y, below, predictor)

    def uniform(self, at_most: int, sampled: int) -> tuple[Indices, bool]:
        """Return all rows of a space that has few, else a uniform sample; and whether it is all."""
        if self.space.size <= at_most:
            return np.concatenate(list(self.space.index_blocks())), True
        return self.space.sample_indices(sampled, np.random.default_rng(self.seed)), False

    @cached_property
    def rows(self) -> tuple[Indices, list[slice]]:
        """The largest subnet and the rows below it, and the place of each dimension's rows."""
        below = [turned_down(self.space, dimension) for dimension in self.dimensions]
        ends = np.cumsum([1, *map(len, below)])
        X = np.concatenate([self.space.indices([self.space.largest]), *below])
        return X, [slice(int(a), int(b)) for a, b in pairwise(ends)]

    def _directly(
        self, name: str, unit: str, X: Indices, y: Floats, below: Below, complete: bool, basis: str
    ) -> Sensitivity:
        def variances(X: Indices, y: Floats) -> _Variances:
            total = float(y.var(ddof=0 if complete else 1))
            return _Variances(explained(self.space, X, y, complete=complete), total, below.values)

        _check(name, y)
        folds = np.arange(len(X)) % min(_FOLDS, len(X))
        rest = [] if complete else [folds != k for k in np.unique(folds)]
        without = [variances(X[rows], y[rows]) for rows in rest]
        return self._figures(name, unit, variances(X, y), without, basis, below)

    def _predicted(
        self, name: str, unit: str, X: Indices, y: Floats, below: Below | None, predictor: Any
    ) -> Sensitivity:
        _check(name, y)
        uniform, complete = self.uniform(SAMPLED, SAMPLED)
        turned, _ = self.rows
        F, everywhere, below_largest = (features(self.space, rows) for rows in (X, uniform, turned))

        def variances(rows: npt.NDArray[np.bool_]) -> tuple[_Variances, Any]:
            model = make(predictor, random_state=self.seed, space=self.space).fit(F[rows], y[rows])
            predictions = model.predict(everywhere)
            by_choice = explained(self.space, uniform, predictions, complete=complete)
            values = model.predict(below_largest) if below is None else below.values
            return _Variances(by_choice, float(predictions.var()), values), model

        folds = np.random.default_rng(self.seed).permutation(len(X)) % min(_FOLDS, len(X))
        with _sklearn.one_thread():
            whole, model = variances(np.ones(len(X), dtype=bool))
            left_out, without = np.zeros(len(X)), []
            for k in np.unique(folds):
                one, other = variances(folds != k)
                left_out[folds == k] = other.predict(F[folds == k])
                without.append(one)
        error = float(((y - left_out) ** 2).mean())
        whole, *without = [replace(v, total=v.total + error) for v in (whole, *without)]
        quality = (
            f"R² {1 - error / float(y.var()):.2f} on left-out ones" if y.var() > 0 else "constant"
        )
        basis = f"{len(X):,} evaluations, predicted by {model.used} ({quality})"
        return self._figures(name, unit, whole, without, basis, below)

    def _figures(
        self, name: str, unit: str, whole: _Variances, without: Sequence[_Variances], basis: str,
        below: Below | None,
    ) -> Sensitivity:  # fmt: skip
        """Return the figures by dimension, with the errors that follow from the folds."""
        _, places = self.rows
        rows = [_farthest(whole.values, place) for place in places]

        def change(v: _Variances) -> Floats:
            return np.array([np.nan if i is None else v.values[i] - v.values[0] for i in rows])

        def share(v: _Variances) -> Floats:
            if v.total <= 0:
                return np.zeros(len(self.dimensions))
            return np.array([v.by_choice[list(d.at)].sum() for d in self.dimensions]) / v.total

        def rest(v: _Variances) -> Floats:
            return np.array([1 - v.by_choice.sum() / v.total if v.total > 0 else 0.0])

        errors = _jackknife(change, without, whole)
        if below is not None:  # measured, each with its own error
            e = below.errors
            errors = np.array([np.nan if i is None else np.hypot(e[i], e[0]) for i in rows])
        return Sensitivity(
            name, unit, float(whole.values[0]), change(whole), errors,
            share(whole), _jackknife(share, without, whole),
            float(rest(whole)[0]), float(_jackknife(rest, without, whole)[0]), basis,
        )  # fmt: skip


def _check(name: str, y: Floats) -> None:
    if not np.isfinite(y).all():
        bad = int((~np.isfinite(y)).sum())
        msg = f"{name!r} is not a finite number for {bad} of {len(y)} subnets. Look at the measure."
        raise ObjectiveError(msg)


def _farthest(values: Floats, place: slice) -> int | None:
    """Return the row of a dimension that differs most from the largest subnet, which is row 0."""
    if place.start == place.stop or np.isnan(values[place]).all():
        return None
    return range(len(values))[place][int(np.nanargmax(np.abs(values[place] - values[0])))]


def _jackknife(
    figure: Callable[[_Variances], Floats], without: Sequence[_Variances], whole: _Variances
) -> Floats:
    """Return the standard error of a figure from its values without each fold; 0 without folds.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11 (delete-d
        jackknife).
    """
    if not without:
        return np.where(np.isnan(figure(whole)), np.nan, 0.0)
    values = np.stack([figure(variances) for variances in without])
    k = len(values)
    spread: Floats = np.sqrt((k - 1) / k * ((values - values.mean(axis=0)) ** 2).sum(axis=0))
    return spread
