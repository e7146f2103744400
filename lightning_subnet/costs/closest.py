# SPDX-License-Identifier: Apache-2.0
"""`closest_subnet`: a subnet of so many parameters, or so many milliseconds, in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from lightning_subnet._checks import checked_int
from lightning_subnet._torch.contexts import random_state
from lightning_subnet._types import Floats, Indices
from lightning_subnet.costs.resolve import resolve, with_sample
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.errors import MeasurementError, NoFeasibleSubnet, ObjectiveError, SearchError
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make
from lightning_subnet.space.members import distinct_rows, row_codes
from lightning_subnet.space.minimise import least_rows
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure, NetworkMeasure, by_name

_OPENING, _BATCH = 12, 4  # subnets that are measured before a prediction, and after each
_AROUND = 3  # best subnets whose neighbours are proposed too
_PATIENCE = 4  # batches without a nearer subnet before the search ends
_SAMPLE = 2000  # subnets from which the search on predictions starts
_ABOVE = 1e6  # of a subnet that exceeds a target: more than any distance of one that does not


@dataclass(frozen=True, slots=True)
class Closest:
    """The subnet whose costs are nearest to the targets.

    Args:
        subnet: The subnet; `extract(model, subnet)` makes a network of it.
        values: Its costs, by name.
        targets: The targets, by name.
        errors: Standard errors by name, where a measure gave one.
        evaluations: How many subnets were measured or traced; 0 where tables were read.
    """

    subnet: Subnet
    values: Mapping[str, float]
    targets: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 0

    def __post_init__(self) -> None:
        for name in ("values", "targets", "errors"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def distance(self) -> float:
        """The largest relative difference to a target."""
        return max(abs(self.values[name] / target - 1) for name, target in self.targets.items())

    def __str__(self) -> str:
        costs = ", ".join(
            f"{name} {self.values[name]:.6g} (asked: {target:.6g})"
            for name, target in self.targets.items()
        )
        return f"{costs} at {self.subnet!r}"


def closest_subnet(
    model: Any,
    example_input: Any = None,
    *,
    measures: Measure | NetworkMeasure | Sequence[Measure | NetworkMeasure] = (),
    below: bool = False,
    tolerance: float = 0.01,
    evaluations: int = 60,
    seed: int = 0,
    **targets: float,
) -> Closest:
    """Return the subnet whose cost is nearest to a number, or whose costs are nearest to several.

    The nearest has the least maximum of relative differences to the targets. Where all costs are
    read from tables (those of this package's networks, `LatencyTable`), all subnets of a space of
    up to 200,000 are compared, so nothing is nearer; a larger space is searched in about a second.
    Any other cost is measured or traced on a few subnets: the extremes and a sample, then, four at
    a time, those that are nearest by a ridge regression on all of them, corrected by its error
    nearby.

    Args:
        model: A super-network, a module with one elastic descendant, or a `SearchSpace`.
        example_input: One sample, for measures that run the network; None: the model's
            `example_input_array`.
        measures: The measures that the targets name, besides `macs`, `params`, `size_mb` and
            `latency_ms`; give a `Latency(...)` of that name to time in another way.
        below: Only subnets that exceed no target.
        tolerance: A relative difference that is near enough to stop measuring.
        evaluations: The most subnets that are measured or traced.
        seed: Of the sample.
        **targets: Positive numbers by name of measure: `params=1e6`, `latency_ms=5`.

    Raises:
        ObjectiveError: There is no target, an unknown one, or one that is not a positive number.
        NoFeasibleSubnet: With `below`, every subnet that was compared exceeds a target.
        SearchError: The model is not a super-network, or there is no sample to count on.

    Example:
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> near = closest_subnet(net, params=40_000, macs=700_000)
        >>> dict(near.values), f"{near.distance:.4f}", near.evaluations
        ({'params': 40058.0, 'macs': 700160.0}, '0.0014', 0)
    """
    _check(targets, measures, tolerance, evaluations)
    space, part = _space_of(model)
    rng = np.random.default_rng(seed)
    # Counting puts one subnet after the other in force.
    with nullcontext() if part is None else activated(part, space.largest), random_state():
        bound = _measures(model, example_input, measures, targets)
        costs = _Costs(space, bound, targets, below=below)
        if all(measure.vectorised for measure in bound):
            row = least_rows(space, lambda X: costs.score(costs.values(X)), rng=rng)[0]
            values, errors = costs.values(row[None])[0], np.zeros(len(targets))
        else:
            row, values, errors = _by_measuring(costs, rng, tolerance=tolerance, most=evaluations)
    closest = Closest(
        subnet=space.from_indices(row[None])[0],
        values=dict(zip(targets, values.tolist(), strict=True)),
        targets={name: float(target) for name, target in targets.items()},
        errors={n: e for n, e in zip(targets, errors.tolist(), strict=True) if e > 0},
        evaluations=len(costs.results),
    )
    if below and any(closest.values[name] > target for name, target in targets.items()):
        bounds = " and ".join(f"{name} <= {target:g}" for name, target in targets.items())
        msg = f"No subnet was found with {bounds}. The nearest: {closest}. Ask for more."
        raise NoFeasibleSubnet(msg, closest)
    return closest


def _measures(
    model: Any, example_input: Any, measures: Any, targets: Mapping[str, float]
) -> list[Measure]:
    """Return the measures of the targets, in order."""
    lone = isinstance(measures, (Measure, NetworkMeasure))
    items = [measures] if lone else list(measures)
    by_name(items)
    host, sample = with_sample(model, example_input)
    of_targets = [item for item in items if item.name in targets]
    names = [item.name for item in items]
    by_target = resolve(host, of_targets, targets, lambda: sample, also=names)
    return [by_target[name] for name in targets]


class _Costs:
    """The costs of subnets, those without a table measured once each.

    Attributes:
        below: Whether a subnet that exceeds a target is farther away than any that does not.
        results: By row code: values (m,) and standard errors (m,) of all costs; NaN if it failed.
    """

    def __init__(
        self,
        space: SearchSpace,
        measures: list[Measure],
        targets: Mapping[str, float],
        *,
        below: bool,
    ) -> None:
        self.space, self.measures, self.below = space, measures, below
        self.targets = np.array([float(target) for target in targets.values()])
        self.results: dict[bytes, tuple[Floats, Floats]] = {}
        self.rows: list[Indices] = []
        self.failure: Exception | None = None

    def values(self, X: Indices) -> Floats:
        """Return all costs (n, m) of rows, which must all be tables."""
        return np.stack([m.evaluate(self.space, X)[0] for m in self.measures], axis=1)

    def score(self, values: Floats) -> Floats:
        """Return the distance (n,) of costs (n, m); infinite where one failed."""
        ratio = values / self.targets
        distance = np.abs(ratio - 1).max(axis=1)
        if self.below:
            over = np.maximum(ratio - 1, 0).max(axis=1)
            distance = np.where(over > 0, _ABOVE + over, distance)
        return np.where(np.isnan(distance), np.inf, distance)

    def measure(self, row: Indices) -> None:
        """Measure all costs of a row; a cost that fails for it alone is NaN."""
        values, errors = np.full(len(self.measures), np.nan), np.zeros(len(self.measures))
        for k, measure in enumerate(self.measures):
            try:
                value, error = measure.evaluate(self.space, row[None])
                values[k], errors[k] = value[0], error[0]
            except (ObjectiveError, MeasurementError):
                raise
            except Exception as failure:
                self.failure = failure
        self.results[row_codes(row[None])[0]] = values, errors
        self.rows.append(row)

    def table(self) -> tuple[Indices, Floats]:
        """Return the measured rows and their costs."""
        return np.stack(self.rows), np.stack([values for values, _ in self.results.values()])


def _by_measuring(
    costs: _Costs, rng: np.random.Generator, *, tolerance: float, most: int
) -> tuple[Indices, Floats, Floats]:
    """Return the nearest row that was measured, its costs and their standard errors."""
    space = costs.space
    opening = space.sample_indices(min(_OPENING, space.size), rng)
    opening = np.concatenate([space.indices([space.smallest, space.largest]), opening])
    nearest, patience = math.inf, _PATIENCE
    while True:
        for row, code in zip(opening, row_codes(opening), strict=True):
            if code not in costs.results and len(costs.results) < most:
                costs.measure(row)
        X, Y = costs.table()
        order = np.argsort(costs.score(Y), kind="stable")
        near = float(costs.score(Y[order[:1]])[0])
        patience = _PATIENCE if near < nearest else patience - 1
        nearest = near
        if near <= tolerance or not patience or len(X) >= min(most, space.size):
            break
        opening = _proposals(costs, X, Y, order, rng)
        if not len(opening):
            break
    if not np.isfinite(near):
        msg = f"All {len(X)} subnets failed, the last with: {costs.failure or 'no number'}."
        raise SearchError(msg)
    best = X[order[0]]
    return best, *costs.results[row_codes(best[None])[0]]


def _proposals(
    costs: _Costs, X: Indices, Y: Floats, order: Indices, rng: np.random.Generator
) -> Indices:
    """Return the unmeasured rows whose predicted costs are nearest."""
    space = costs.space
    F, finite = features(space, X), np.isfinite(Y)
    models = []
    with one_thread():
        for k, measure in enumerate(costs.measures):
            ok = finite[:, k]
            usable = not measure.vectorised and ok.sum() > 0
            models.append(make("ridge").fit(F[ok], Y[ok, k]) if usable else None)

        def predict(Z: Indices) -> Floats:
            inputs = features(space, Z)
            columns = [
                np.asarray(model.predict(inputs)) if model else measure.evaluate(space, Z)[0]
                for model, measure in zip(models, costs.measures, strict=True)
            ]
            return np.stack(columns, axis=1)

        ratio = np.where(finite, Y / predict(X), 1.0)

        def correct(Z: Indices) -> Floats:  # by the error at the nearest measured row
            nearest = (Z[:, None, :] != X[None]).sum(axis=2).argmin(axis=1)
            return np.asarray(predict(Z) * ratio[nearest])

        blocks = [
            least_rows(space, lambda Z: costs.score(predict(Z)), rng=rng, n=64, n_sample=_SAMPLE),
            *(space.indices(space.neighbours(s)) for s in space.from_indices(X[order[:_AROUND]])),
        ]
        Z = np.concatenate([rows for rows in blocks if len(rows)])
        Z = Z[[code not in costs.results for code in row_codes(Z)]]
        if len(Z):
            Z = Z[distinct_rows(Z)]
            Z = Z[np.argsort(costs.score(correct(Z)), kind="stable")[:_BATCH]]
        return Z


def _check(targets: Mapping[str, Any], measures: Any, tolerance: Any, evaluations: Any) -> None:
    if not targets:
        msg = "closest_subnet() got no target. Write closest_subnet(model, params=1e6)."
        raise ObjectiveError(msg)
    for name, value in targets.items():
        number = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
        if not (number and 0 < value < math.inf):
            if isinstance(value, (Measure, NetworkMeasure)):
                msg = f"{name}= is a measure. Write measures=[...], and a number for its name."
            else:
                msg = f"{name}={value!r:.60} is not a target. Give a positive number: params=1e6."
            raise ObjectiveError(msg)
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        msg = f"tolerance={tolerance!r:.60} must be a number from 0, such as 0.01."
        raise ObjectiveError(msg)
    checked_int(evaluations, "evaluations", error=ObjectiveError)


def _space_of(model: Any) -> tuple[SearchSpace, Any]:
    """Return the space and, of a model, its elastic part."""
    if isinstance(model, SearchSpace):
        return model, None
    if not isinstance(model, nn.Module):
        msg = f"closest_subnet() got {model!r:.60}. Pass a super-network, or a SearchSpace."
        raise SearchError(msg)
    part = elastic_part(model)
    return part.search_space(), part
