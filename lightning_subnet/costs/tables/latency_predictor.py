# SPDX-License-Identifier: Apache-2.0
"""Costs predicted from subnets on which they were measured, here or on a device elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_subnet._checks import checked_int
from lightning_subnet._json import digest, read, unreadable, write
from lightning_subnet._torch.contexts import random_state
from lightning_subnet._torch.inputs import batched, described
from lightning_subnet._types import Floats, Indices
from lightning_subnet.costs.resolve import part_with_sample
from lightning_subnet.costs.tables.files import (
    Agreement,
    check_device,
    check_space,
    device_of,
    settings_of,
)
from lightning_subnet.elasticity.extraction import own_or_frozen
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make, names
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure, NetworkMeasure

_log = logging.getLogger(__name__)
_FORMAT = "lightning-subnet latency predictor 1"
_FEWEST = 8


class LatencyPredictor:
    """A latency, or any other cost, predicted from subnets on which it was measured.

    `fit` measures them here; the constructor takes values from elsewhere, such as a phone. It is a
    measure for `SubnetSearch(measures=[predictor])`: exact, as it gives the same every time, so it
    costs no budget; `report` says how true it is, and `result.remeasure` measures the front.

    Args:
        space: The space of the subnets.
        subnets: The n measured subnets, or their values, each once.
        values: Their costs (n,), in `unit`.
        errors: Standard errors (n,).
        name: The measure's name.
        unit: Its unit.
        predictor: A name: one of `lightning_subnet.predictors.registry.names()`.
        device: The device that they were measured on, in words.
        conditions: The other conditions of the measurement, for people who read the file.
        network: A hash of the network; None: any with this space.

    Attributes:
        report: Agreement with left-out folds.
        failed: How many subnets could not be measured.

    Raises:
        ObjectiveError: Fewer than 8 subnets, a value that is not a positive number, one subnet
            twice, or an unknown predictor.

    Example:
        >>> from lightning_subnet import SearchSpace
        >>> space = SearchSpace(depth=[1, 2, 3, 4], width=[8, 16, 32])
        >>> ms = {s: 2.0 + s["depth"] * s["width"] / 8 for s in space}  # on a phone
        >>> phone = LatencyPredictor(space, ms, list(ms.values()), device="phone",
        ...                          predictor="ridge")
        >>> mean, std = phone.predict([space.largest], return_std=True)
        >>> bool(abs(mean[0] - 18) < 3), bool(std[0] > 0), phone.report.tau > 0.9
        (True, True, True)

    References:
        Wang et al., HAT: Hardware-Aware Transformers, ACL 2020, section 3.2 (latency predictor).
    """

    needs_sample: ClassVar[bool] = False

    def __init__(  # noqa: PLR0913 - the parts of a file
        self,
        space: SearchSpace,
        subnets: Iterable[Subnet | Mapping[str, Any]],
        values: npt.ArrayLike,
        *,
        errors: npt.ArrayLike | None = None,
        name: str = "latency_ms",
        unit: str = "ms",
        predictor: str = "auto",
        device: str = "unknown",
        conditions: Mapping[str, Any] | None = None,
        network: str | None = None,
    ) -> None:
        self.space, self.name, self.unit, self.device = space, name, unit, device
        self.conditions, self.network, self.failed = dict(conditions or {}), network, 0
        self.subnets = [space.subnet(subnet) for subnet in subnets]
        self.values = np.asarray(values, dtype=float)
        n = len(self.subnets)
        self.errors = np.zeros(n) if errors is None else np.asarray(errors, dtype=float)
        self._allowed: str | None = device  # values that were passed or measured here are meant
        _check(self.subnets, self.values, self.errors)
        _check_name(predictor)
        self.predictor = predictor
        self._model = make(predictor, space=space)
        with one_thread(), random_state(0):
            self._model.fit(features(space, space.indices(self.subnets)), self.values)
        self.report = Agreement.of(self._model.out_of_fold, self.values)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        latency: NetworkMeasure,
        *,
        n: int = 100,
        example_input: Any = None,
        predictor: str = "auto",
        seed: int = 0,
    ) -> LatencyPredictor:
        """Measure n subnets of a super-network: its extremes and a sample.

        Args:
            model: The super-network.
            latency: `Latency(...)`, or another measure of networks.
            n: How many subnets; a subnet that fails is left out.
            example_input: One sample, as the super-network takes it; None: the `input` of the
                measure, or what the super-network gets of the model's `example_input_array`.
            predictor: See `LatencyPredictor`.
            seed: Of the sample.

        Raises:
            MeasurementError: The largest subnet fails, or too many do.
            ObjectiveError: A wrong argument.
        """
        if isinstance(latency, type) or not isinstance(latency, NetworkMeasure):
            msg = f"{latency!r:.60} is not a measure of networks. Write Latency(threads=1)."
            raise ObjectiveError(msg)
        checked_int(n, "n", error=ObjectiveError, least=_FEWEST, hint="25 to 200 are usual.")
        _check_name(predictor)
        elastic, sample = part_with_sample(model, example_input, latency)
        bound, space = latency.bind(elastic, sample), elastic_part(elastic).search_space()
        X = _sample(space, n, np.random.default_rng(seed))
        values, errors, failures = bound.evaluate_each(space, X)
        for reason in failures.values():
            _log.warning("%s of a subnet failed and is left out: %s", latency.name, reason)
        ok = np.isfinite(values)
        if ok.sum() < _FEWEST:
            msg = f"Only {ok.sum()} of {len(X)} subnets could be measured; {_FEWEST} are needed."
            raise MeasurementError(msg)
        input_text = described(batched(sample, who=cls.__name__))
        result = cls(
            space,
            space.from_indices(X[ok]),
            values[ok],
            errors=errors[ok],
            name=latency.name,
            unit=bound.unit,
            predictor=predictor,
            device=device_of(latency),
            conditions=settings_of(latency) | {"input": input_text},
            network=_network(elastic, space),
        )
        result.failed = int((~ok).sum())
        return result

    def predict(self, subnets: Iterable[Subnet], *, return_std: bool = False) -> Any:
        """Return the predicted cost (n,) of subnets, and if asked its standard deviation (n,)."""
        F = features(self.space, self.space.indices(subnets))
        with one_thread():
            return self._model.predict(F, return_std)

    def bind(self, elastic: nn.Module, example_input: Any = None) -> Measure:
        """Return the measure of a super-network.

        Raises:
            MeasurementError: It was measured on another device, space or network.
        """
        what = f"The predictor of {self.name!r}"
        space = elastic_part(elastic).search_space()
        check_space(what, self.space, space)
        if self.network is not None and self.network != _network(elastic, space):
            msg = f"{what} was fitted to another network of this space. Fit one to this network."
            raise MeasurementError(msg)
        return self.measure

    @property
    def measure(self) -> Measure:
        """The measure of value indices, which needs no network."""
        check_device(f"The predictor of {self.name!r}", self.device, self._allowed)
        parts = [s.to_json() for s in self.subnets], self.values.tolist(), self.predictor

        def predict(X: Indices) -> Floats:
            with one_thread():
                return np.asarray(self._model.predict(features(self.space, X)))

        return Measure(
            self.name, predict, self.unit, exact=True, takes="indices",
            fingerprint=f"predictor of {self.name}: {digest(parts)}",
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the measured values as JSON; `load` reads them and fits the same predictor."""
        data = {
            "format": _FORMAT,
            "name": self.name,
            "unit": self.unit,
            "device": self.device,
            "conditions": self.conditions,
            "network": self.network,
            "predictor": self.predictor,
            "space": self.space.to_json(),
            "subnets": [subnet.to_json() for subnet in self.subnets],
            "values": self.values.tolist(),
            "errors": self.errors.tolist(),
        }
        write(path, data)

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> LatencyPredictor:
        """Return the predictor in a file that `save` wrote.

        Args:
            path: The file.
            device: Which device it may be of: a part of its description, or `"any"`. None: of this
                machine's only, which is checked where it is used.

        Raises:
            StorageError: The file is not a predictor's.
            MeasurementError: It is of another device than `device`.
        """
        data = read(path, _FORMAT, cls.__name__)
        try:
            keys = ("name", "unit", "device", "conditions", "network", "predictor", "errors")
            arguments = {key: data[key] for key in keys}
            space = SearchSpace.from_json(data["space"])
            predictor = cls(space, data["subnets"], data["values"], **arguments)
        except (ValueError, KeyError, TypeError) as error:
            raise unreadable(path, cls.__name__, error) from error
        predictor._allowed = device
        if device is not None:
            check_device(f"The predictor of {predictor.name!r}", predictor.device, device)
        return predictor

    def __repr__(self) -> str:
        return (
            f"<LatencyPredictor from {len(self.subnets)} subnets on {self.device}: {self.report}>"
        )


def _sample(space: SearchSpace, n: int, rng: np.random.Generator) -> Indices:
    """Return the extremes and a sample without them, n rows or the whole space."""
    ends = space.indices(dict.fromkeys([space.largest, space.smallest]))
    X = space.sample_indices(min(n, space.size), rng)
    other = ~(X[:, None] == ends).all(axis=2).any(axis=1)
    rows: Indices = np.concatenate([ends, X[other]])[: min(n, space.size)]
    return rows


def _network(elastic: Any, space: SearchSpace) -> str:
    """Return a hash of the shapes of the largest subnet."""
    with random_state():  # the plain network is initialised first
        state = own_or_frozen(elastic, space.largest).state_dict()
    return digest([[name, [*x.shape], str(x.dtype)] for name, x in state.items()])


def _check_name(predictor: Any) -> None:
    if not isinstance(predictor, str):
        msg = f"predictor={predictor!r:.60} must be a name, so that it can be written to a file."
        raise ObjectiveError(msg)
    if predictor not in names():
        make(predictor)  # raises, with the nearest name


def _check(subnets: Sequence[Subnet], values: Floats, errors: Floats) -> None:
    n = len(subnets)
    if values.shape != (n,) or errors.shape != (n,):
        msg = f"values has shape {values.shape} and errors {errors.shape}; {n} subnets need ({n},)."
        raise ObjectiveError(msg)
    if n < _FEWEST:
        msg = f"{n} subnets are too few to predict from. Measure {_FEWEST} or more: 100, say."
        raise ObjectiveError(msg)
    if not (np.isfinite(values) & (values > 0)).all():
        at = int(np.flatnonzero(~(np.isfinite(values) & (values > 0)))[0])
        msg = f"values[{at}] is {values[at]}: not a positive number. Leave out subnets that failed."
        raise ObjectiveError(msg)
    if len(set(subnets)) < n:
        twice = next(s for s in subnets if subnets.count(s) > 1)
        msg = f"{twice!r:.200} is listed twice. Average its values, or keep one."
        raise ObjectiveError(msg)
