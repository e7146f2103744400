# SPDX-License-Identifier: Apache-2.0
"""How much of a measure each choice of a space explains: main effects and first-order shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Indices
from lightning_subnet.errors import ObjectiveError, SearchError
from lightning_subnet.predictors import _sklearn
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.measures import Measure

Floats = npt.NDArray[np.float64]

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
    """Return the largest subnet with a dimension at its least, as canonical rows (k, n_choices).

    Ordered choices are at the first of their values. Categorical ones have no least: there is one
    row for each of their values. A dimension that does not exist in the largest subnet has no row.
    """
    largest = space.indices([space.largest])
    kept = {
        j: [space.choices[space.names[j]].values.index(v) for v in space.values[space.names[j]]]
        for j in dimension.at
    }
    free = [j for j in dimension.at if not space.choices[space.names[j]].ordered]
    rows = []
    for k in range(max([len(kept[j]) for j in free], default=1)):
        row = largest.copy()
        for j, positions in kept.items():
            row[0, j] = positions[min(k, len(positions) - 1) if j in free else 0]
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
        spare = len(values) - len(means)
        if not complete and spare > 0:
            within = float(((values - values.mean()) ** 2).sum()) - between
            between -= (len(means) - 1) * max(within, 0.0) / spare
        out[j] = between / len(y)
    return out


@dataclass(frozen=True)
class Sensitivity:
    """What the dimensions of a space do to one measure.

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
        rest: The share that is left: what choices do together, noise, and what a predictor misses.
        rest_error: Its standard error.
        basis: What all this was computed from, in words.
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
class _Parts:
    """Variance by choice, in all, and changes: of all data, or without one fold."""

    by_choice: Floats
    total: float
    at: Floats  # the values of the turned-down rows; the first is the largest subnet's


@dataclass(frozen=True)
class Below:
    """Measured values of the turned-down rows, the largest subnet's first, with their errors."""

    values: Floats
    errors: Floats


@dataclass(frozen=True)
class Study:
    """A space, its dimensions and the rows that they are turned down to.

    Args:
        space: The space.
        parts: Its dimensions.
        seed: The seed of samples and folds.
    """

    space: SearchSpace
    parts: Sequence[Dimension]
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

        What is turned down is measured; the shares are those of a predictor, unless the n subnets
        are all.
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
        known = np.isfinite(y)
        X, y = X[known], y[known]
        complete = len(X) == self.space.size if complete is None else complete and bool(known.all())
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
                f"need at least {FEWEST}, and 100 or more tell more. Measure more of them."
            )
            raise SearchError(msg)
        return self._predicted(name, unit, X, y, below, predictor)

    def uniform(self, at_most: int, sampled: int) -> tuple[Indices, bool]:
        """Return all rows of a space that has few, else a uniform sample; and which it is."""
        if self.space.size <= at_most:
            return np.concatenate(list(self.space.index_blocks())), True
        return self.space.sample_indices(sampled, np.random.default_rng(self.seed)), False

    @cached_property
    def rows(self) -> tuple[Indices, list[slice]]:
        """The largest subnet and what is below it, and where each dimension's rows are."""
        below = [turned_down(self.space, part) for part in self.parts]
        ends = np.cumsum([1, *map(len, below)])
        X = np.concatenate([self.space.indices([self.space.largest]), *below])
        return X, [slice(int(a), int(b)) for a, b in pairwise(ends)]

    def _directly(
        self, name: str, unit: str, X: Indices, y: Floats, below: Below, complete: bool, basis: str
    ) -> Sensitivity:
        def of(X: Indices, y: Floats) -> _Parts:
            total = float(y.var(ddof=0 if complete else 1))
            return _Parts(explained(self.space, X, y, complete=complete), total, below.values)

        _check(name, y)
        folds = np.arange(len(X)) % min(_FOLDS, len(X))
        without = [] if complete else [of(X[folds != k], y[folds != k]) for k in np.unique(folds)]
        return self._told(name, unit, of(X, y), without, basis, below)

    def _predicted(
        self, name: str, unit: str, X: Indices, y: Floats, below: Below | None, predictor: Any
    ) -> Sensitivity:
        _check(name, y)
        wide, complete = self.uniform(SAMPLED, SAMPLED)
        rows, _ = self.rows
        F, everywhere, beneath = (features(self.space, part) for part in (X, wide, rows))

        def of(used: npt.NDArray[np.bool_]) -> tuple[_Parts, Any]:
            model = make(predictor, random_state=self.seed, space=self.space).fit(F[used], y[used])
            told = model.predict(everywhere)
            parts = explained(self.space, wide, told, complete=complete)
            at = model.predict(beneath) if below is None else below.values
            return _Parts(parts, float(told.var()), at), model

        folds = np.random.default_rng(self.seed).permutation(len(X)) % min(_FOLDS, len(X))
        with _sklearn.one_thread():
            whole, model = of(np.ones(len(X), dtype=bool))
            left_out, without = np.zeros(len(X)), []
            for k in np.unique(folds):
                parts, other = of(folds != k)
                left_out[folds == k] = other.predict(F[folds == k])
                without.append(parts)
        missed = float(((y - left_out) ** 2).mean())
        whole, *without = [_Parts(p.by_choice, p.total + missed, p.at) for p in (whole, *without)]
        known = (
            f"R² {1 - missed / float(y.var()):.2f} on left-out ones" if y.var() > 0 else "constant"
        )
        basis = f"{len(X):,} evaluations, predicted by {model.used} ({known})"
        return self._told(name, unit, whole, without, basis, below)

    def _told(
        self, name: str, unit: str, whole: _Parts, without: Sequence[_Parts], basis: str,
        below: Below | None,
    ) -> Sensitivity:  # fmt: skip
        """Return the figures by dimension, with the errors that the folds tell."""
        _, places = self.rows
        moved = [_farthest(whole.at, place) for place in places]

        def change(parts: _Parts) -> Floats:
            return np.array([np.nan if i is None else parts.at[i] - parts.at[0] for i in moved])

        def share(parts: _Parts) -> Floats:
            if parts.total <= 0:
                return np.zeros(len(self.parts))
            return np.array([parts.by_choice[list(p.at)].sum() for p in self.parts]) / parts.total

        def rest(parts: _Parts) -> Floats:
            return np.array([1 - parts.by_choice.sum() / parts.total if parts.total > 0 else 0.0])

        errors = _jackknife(change, without, whole)
        if below is not None:  # measured, each with its own error
            e = below.errors
            errors = np.array([np.nan if i is None else np.hypot(e[i], e[0]) for i in moved])
        return Sensitivity(
            name, unit, float(whole.at[0]), change(whole), errors,
            share(whole), _jackknife(share, without, whole),
            float(rest(whole)[0]), float(_jackknife(rest, without, whole)[0]), basis,
        )  # fmt: skip


def _check(name: str, y: Floats) -> None:
    if not np.isfinite(y).all():
        bad = int((~np.isfinite(y)).sum())
        msg = f"{name!r} is not a finite number for {bad} of {len(y)} subnets. Look at the measure."
        raise ObjectiveError(msg)


def _farthest(at: Floats, place: slice) -> int | None:
    """Return the row of a dimension that differs most from the largest subnet, which is row 0."""
    if place.start == place.stop or np.isnan(at[place]).all():
        return None
    return range(len(at))[place][int(np.nanargmax(np.abs(at[place] - at[0])))]


def _jackknife(
    figure: Callable[[_Parts], Floats], without: Sequence[_Parts], whole: _Parts
) -> Floats:
    """Return the standard error of a figure from what it is without each fold; 0 without folds.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11 (delete-d
        jackknife).
    """
    if not without:
        return np.where(np.isnan(figure(whole)), np.nan, 0.0)
    values = np.stack([figure(parts) for parts in without])
    k = len(values)
    spread: Floats = np.sqrt((k - 1) / k * ((values - values.mean(axis=0)) ** 2).sum(axis=0))
    return spread
