# SPDX-License-Identifier: Apache-2.0
"""closest_subnet: a subnet of so many parameters, or so many milliseconds, in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._torch.contexts import random_state
from lightning_subnet._torch.inputs import sample_for
from lightning_subnet._types import Floats, Indices
from lightning_subnet.costs.counts import BUILT_IN, count_measures
from lightning_subnet.elasticity.protocol import Elastic, activated, elastic_part
from lightning_subnet.errors import MeasurementError, NoFeasibleSubnet, ObjectiveError, SearchError
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make
from lightning_subnet.space.members import distinct_rows, row_codes
from lightning_subnet.space.minimise import least_rows
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study import measures as measures_module
from lightning_subnet.study.measures import Measure, NetworkMeasure

_OPENING, _BATCH = 12, 4  # subnets that are measured before a prediction, and after each
_AROUND = 3  # of the best ones the neighbours are looked at
_PATIENCE = 4  # times that nothing nearer may be found
_DRAWN = 2000
_ABOVE = 1e6  # what counts, beside a distance, as far above a target


@dataclass(frozen=True, slots=True)
class Closest:
    """The subnet whose costs are nearest to what was asked.

    Args:
        subnet: The subnet; `extract(model, subnet)` makes a network of it.
        values: Its costs, by name.
        targets: What was asked.
        errors: Standard errors by name, where a measure gave one.
        evaluations: How many subnets were measured or traced to find it; 0 where tables were read.
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
        return max(abs(self.values[name] / wanted - 1) for name, wanted in self.targets.items())

    def __str__(self) -> str:
        told = ", ".join(
            f"{name} {self.values[name]:.6g} (asked: {wanted:.6g})"
            for name, wanted in self.targets.items()
        )
        return f"{told} at {self.subnet!r}"


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
    """Return the subnet whose cost is nearest to a number, or whose costs are to several.

    Nearest is the least of the largest relative difference to a target. Where all costs are read
    from tables (those of this package's networks, `LatencyTable`), a space of up to 200,000 subnets
    is looked at whole, so nothing is nearer; a larger one is searched in about a second. Any
    other cost is measured or traced on a few subnets: the extremes and a sample, then, four at a
    time, those that a ridge regression on all of them, corrected by what it missed nearby, says are
    nearest.

    Args:
        model: A super-network, a module with one elastic descendant, or a `SearchSpace`.
        example_input: One sample, for measures that run the network; None: the model's
            `example_input_array`.
        measures: The measures that the targets name, besides `macs`, `params`, `size_mb` and
            `latency_ms`; `Latency(...)` in its place says how to time.
        below: Only subnets that exceed no target.
        tolerance: A relative difference that is near enough to stop measuring.
        evaluations: The most subnets that are measured or traced.
        seed: Of the sample.
        **targets: Positive numbers by name of measure: `params=1e6`, `latency_ms=5`.

    Raises:
        ObjectiveError: No target, an unknown one, or no positive number.
        NoFeasibleSubnet: With `below`, every subnet that was looked at exceeds a target.
        SearchError: The model is no super-network.

    Example:
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> found = closest_subnet(net, params=40_000, macs=700_000)
        >>> dict(found.values), f"{found.distance:.4f}", found.evaluations
        ({'params': 40058.0, 'macs': 700160.0}, '0.0014', 0)
    """
    _check(targets, measures, tolerance, evaluations)
    space, part = _searched(model)
    rng = np.random.default_rng(seed)
    # Counting puts one subnet after the other in force.
    with nullcontext() if part is None else activated(part, space.largest), random_state():
        bound = _bound(model, part, example_input, measures, list(targets))
        costs = _Costs(space, bound, targets, below=below)
        if all(measure.vectorised for measure in bound):
            row = least_rows(space, lambda X: costs.score(costs.values(X)), rng=rng)[0]
            values, errors = costs.values(row[None])[0], np.zeros(len(bound))
        else:
            row, values, errors = _by_measuring(costs, rng, tolerance=tolerance, most=evaluations)
    found = Closest(
        subnet=space.from_indices(row[None])[0],
        values=dict(zip(targets, values.tolist(), strict=True)),
        targets={name: float(wanted) for name, wanted in targets.items()},
        errors={n: e for n, e in zip(targets, errors.tolist(), strict=True) if e > 0},
        evaluations=len(costs.measured),
    )
    if below and any(found.values[name] > wanted for name, wanted in targets.items()):
        asked = " and ".join(f"{name} <= {wanted:g}" for name, wanted in targets.items())
        msg = f"No subnet was found with {asked}. The nearest: {found}. Ask for more."
        raise NoFeasibleSubnet(msg, found)
    return found


class _Costs:
    """The costs of subnets, those that are no table measured once each.

    Attributes:
        measured: By row code: values (m,) and standard errors (m,) of all costs; NaN if it failed.
    """

    def __init__(
        self, space: SearchSpace, bound: list[Measure], targets: Mapping[str, float], *, below: bool
    ) -> None:
        self.space, self.bound, self.below = space, bound, below
        self.targets = np.array([float(wanted) for wanted in targets.values()])
        self.measured: dict[bytes, tuple[Floats, Floats]] = {}
        self.rows: list[Indices] = []
        self.failure: Exception | None = None

    def values(self, X: Indices) -> Floats:
        """Return all costs (n, m) of rows, which must all be tables."""
        return np.stack([m.evaluate(self.space, X)[0] for m in self.bound], axis=1)

    def score(self, values: Floats) -> Floats:
        """Return the distance (n,) of costs (n, m); infinite where one failed."""
        ratio = values / self.targets
        distance = np.abs(ratio - 1).max(axis=1)
        if self.below:
            over = np.maximum(ratio - 1, 0).max(axis=1)
            distance = np.where(over > 0, _ABOVE + over, distance)
        return np.where(np.isnan(distance), np.inf, distance)

    def measure(self, row: Indices) -> None:
        """Measure all costs of a row; what fails for it alone is NaN."""
        values, errors = np.full(len(self.bound), np.nan), np.zeros(len(self.bound))
        for k, measure in enumerate(self.bound):
            try:
                value, error = measure.evaluate(self.space, row[None])
                values[k], errors[k] = value[0], error[0]
            except (ObjectiveError, MeasurementError):
                raise
            except Exception as failure:
                self.failure = failure
        self.measured[row_codes(row[None])[0]] = values, errors
        self.rows.append(row)

    def table(self) -> tuple[Indices, Floats]:
        """Return the measured rows and their costs."""
        return np.stack(self.rows), np.stack([values for values, _ in self.measured.values()])


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
            if code not in costs.measured and len(costs.measured) < most:
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
    return best, *costs.measured[row_codes(best[None])[0]]


def _proposals(
    costs: _Costs, X: Indices, Y: Floats, order: Indices, rng: np.random.Generator
) -> Indices:
    """Return the unmeasured rows whose predicted costs are nearest."""
    space = costs.space
    F, known = features(space, X), np.isfinite(Y)
    models = []
    with one_thread():
        for k, measure in enumerate(costs.bound):
            ok = known[:, k]
            usable = not measure.vectorised and ok.sum() > 0
            models.append(make("ridge").fit(F[ok], Y[ok, k]) if usable else None)

        def predicted(Z: Indices) -> Floats:
            there = features(space, Z)
            columns = [
                np.asarray(model.predict(there)) if model else measure.evaluate(space, Z)[0]
                for model, measure in zip(models, costs.bound, strict=True)
            ]
            return np.stack(columns, axis=1)

        missed = np.where(known, Y / predicted(X), 1.0)

        def corrected(Z: Indices) -> Floats:  # by what was missed at the nearest measured row
            nearest = (Z[:, None, :] != X[None]).sum(axis=2).argmin(axis=1)
            return np.asarray(predicted(Z) * missed[nearest])

        found = [
            least_rows(space, lambda Z: costs.score(predicted(Z)), rng=rng, n=64, n_sample=_DRAWN),
            *(space.indices(space.neighbours(s)) for s in space.from_indices(X[order[:_AROUND]])),
        ]
        Z = np.concatenate([rows for rows in found if len(rows)])
        Z = Z[[code not in costs.measured for code in row_codes(Z)]]
        if len(Z):
            Z = Z[distinct_rows(Z)]
            Z = Z[np.argsort(costs.score(corrected(Z)), kind="stable")[:_BATCH]]
        return Z


def _check(targets: Mapping[str, Any], measures: Any, tolerance: Any, evaluations: Any) -> None:
    if not targets:
        msg = "closest_subnet() was told no target. Write closest_subnet(model, params=1e6)."
        raise ObjectiveError(msg)
    for name, value in targets.items():
        number = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
        if not (number and 0 < value < math.inf):
            if isinstance(value, (Measure, NetworkMeasure)):
                msg = f"{name}= is a measure. Write measures=[...], and a number for its name."
            else:
                msg = f"{name}={value!r:.60} is no target. Give a positive number: params=1e6."
            raise ObjectiveError(msg)
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        msg = f"tolerance={tolerance!r:.60} must be a number from 0, such as 0.01."
        raise ObjectiveError(msg)
    if not isinstance(evaluations, Integral) or evaluations < 1:
        msg = f"evaluations={evaluations!r:.60} must be a whole number from 1."
        raise ObjectiveError(msg)


def _searched(model: Any) -> tuple[SearchSpace, Any]:
    """Return the space and, of a model, what activates its subnets."""
    if isinstance(model, SearchSpace):
        return model, None
    if not isinstance(model, nn.Module):
        msg = f"closest_subnet() got {model!r:.60}. Pass a super-network, or a SearchSpace."
        raise SearchError(msg)
    part = elastic_part(model)
    return part.search_space(), part


def _bound(
    model: Any, part: Any, example_input: Any, measures: Any, names: list[str]
) -> list[Measure]:
    """Return the measures of the named costs, in order."""
    lone = isinstance(measures, (Measure, NetworkMeasure))
    items = [measures] if lone else list(measures)
    measures_module.by_name(items)
    given = {item.name: item for item in items}
    own = [m.name for m in part.exact_measures()] if hasattr(part, "exact_measures") else []
    built_in = dict.fromkeys([*BUILT_IN, "latency_ms", *own] if part is not None else [])
    if unknown := [n for n in names if n not in given and n not in built_in]:
        known = list(dict.fromkeys([*given, *built_in]))
        msg = f"There is no cost {unknown[0]!r}.{did_you_mean(unknown[0], known)} "
        raise ObjectiveError(msg + f"Known: {listed(known)}. Give others in measures=[...].")
    found: dict[str, Measure] = {}
    for name in names:
        item = given.get(name)
        if item is None and name == "latency_ms":
            from lightning_subnet.costs.latency.latency import Latency

            item = Latency()
        if item is not None and not isinstance(item, Measure):
            if part is None:
                msg = f"{name!r} measures networks, and a space has none. Pass the super-network."
                raise ObjectiveError(msg)
            item = item.bind(part, sample_for(model, example_input, item))
        if item is not None:
            found[name] = item
    counted = [name for name in names if name not in found]
    if counted:
        found |= {m.name: m for m in _counts(model, part, counted, example_input)}
    return [found[name] for name in names]


def _counts(model: nn.Module, part: Elastic, names: list[str], given: Any) -> list[Measure]:
    """Return exact counts of the elastic part."""

    def example() -> Any:
        sample = sample_for(model, given)
        if sample is None:
            msg = "'macs' needs one sample: closest_subnet(model, example_input, macs=...)."
            raise ObjectiveError(msg)
        return sample

    whole = given is None and getattr(model, "example_input_array", None) is not None
    assert isinstance(part, nn.Module), "the elastic part of a module is a module"
    return count_measures(model if whole else part, part, names, example)
