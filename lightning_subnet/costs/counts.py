# SPDX-License-Identifier: Apache-2.0
"""Counts: exact numbers of the subnet that ships, traced or summed up one subnet at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_subnet._torch.contexts import random_state, shadowed
from lightning_subnet._torch.macs import count_macs
from lightning_subnet._torch.stored import n_bytes, n_elements, stored, weights
from lightning_subnet.costs.weight_counts import WeightCounter, counter_of
from lightning_subnet.elasticity.extraction import extract, own_or_frozen
from lightning_subnet.elasticity.protocol import Elastic, activated, elastic_part
from lightning_subnet.elasticity.slicing.counting import Used
from lightning_subnet.errors import MeasurementError, SearchError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure


@dataclass(frozen=True, eq=False)
class Count:
    """An exact count; it is bound to the whole model, in which the elastic part may be a child.

    Args:
        name: The measure's name.
        count: Called with the model, a subnet and the sample; it leaves the model as it was.
        unit: The unit.
        needs_sample: Whether it counts in a forward pass of the model.
        takes_sample: Whether it does so where the elastic part has no `extract` and there is one.
        of_model: Whether it is bound to the model around the elastic part; see `resolve`.

    Example:
        >>> import torch
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> macs = MACS.bind(net, torch.zeros(1, 1, 8, 8))
        >>> macs([net.search_space().smallest])
        [152320.0]
    """

    name: str
    count: Callable[[nn.Module, Subnet, Any], float]
    unit: str = ""
    needs_sample: bool = False
    takes_sample: bool = False
    of_model: bool = True

    def bind(self, elastic: nn.Module, example_input: Any) -> Measure:
        """Return the measure of one model.

        Args:
            elastic: The super-network, or a module around it.
            example_input: One sample, as the forward pass of `elastic` takes it.

        Raises:
            SearchError: It counts in a forward pass, and there is no sample.
        """
        part = _part(elastic)
        if self.needs_sample and example_input is None:
            msg = (
                f"{self.name!r} of {type(part).__name__} needs one sample, and there is none. "
                f"Set example_input_array of {type(elastic).__name__}, or pass example_input= "
                "where it is an argument."
            )
            raise SearchError(msg)

        def one(subnet: Subnet) -> float:
            with random_state():  # extraction draws
                return self.count(elastic, subnet, example_input)

        sliced = self.takes_sample and _counter(part, example_input) is not None
        return remembered(self.name, one, self.unit, SLICED if sliced else None)


def _macs(model: nn.Module, subnet: Subnet, sample: Any) -> float:
    part = _part(model)
    with activated(part, subnet), ExitStack() as stack:
        # A super-network may do work that its subnets do not (OFA's kernel transformations).
        if callable(getattr(part, "extract", None)):
            plain = extract(part, subnet)
            stack.enter_context(shadowed(part, "forward", plain.forward))
            return count_macs(model, sample, weights=[plain])
        return count_macs(model, sample)


def _params(model: nn.Module, subnet: Subnet, sample: Any) -> float:
    part = _part(model)
    if (used := _used(part, subnet, sample)) is not None:
        return sum(x.numel for x in used if x.parameter)
    return n_elements(weights(own_or_frozen(part, subnet)))


def _size_mb(model: nn.Module, subnet: Subnet, sample: Any) -> float:
    part = _part(model)
    if (used := _used(part, subnet, sample)) is not None:
        return sum(x.numel * x.itemsize for x in used if x.persistent) / 1e6
    return n_bytes(stored(own_or_frozen(part, subnet))) / 1e6


def _used(part: nn.Module, subnet: Subnet, sample: Any) -> list[Used] | None:
    """Return what slicing keeps of a network without `extract`; None if it has one, or keeps all.

    Each subnet would take seconds to slice.
    """
    counter = _counter(part, sample)
    return None if counter is None else [*counter(subnet).values()]


def _counter(part: nn.Module, sample: Any) -> WeightCounter | None:
    if sample is None:
        sample = getattr(part, "example_input_array", None)
    if sample is None or callable(getattr(part, "extract", None)):
        return None
    counter = counter_of(part, sample)
    return counter if counter.refusal is None else None


def slices(part: nn.Module, sample: Any) -> bool:
    """Return whether the weights of single subnets can be counted: by its extract, or by slicing.

    Of other networks a subnet has all weights of the copy that extraction gives.
    """
    return callable(getattr(part, "extract", None)) or _counter(part, sample) is not None


def _part(model: nn.Module) -> nn.Module:
    part: Elastic = elastic_part(model)
    assert isinstance(part, nn.Module), "the elastic part of a module is a module"
    return part


MACS = Count("macs", _macs, "MAC", needs_sample=True)
"""Multiply-accumulates for the sample, of the extracted subnet if the network can be sliced."""

PARAMS = Count("params", _params, takes_sample=True, of_model=False)
"""Weights of the extracted subnet, those that are shared once; those that quantised layers pack
count as well. Of a network without `extract` they are those that slicing keeps, for which it needs
a sample; of a frozen copy they are those of the super-network."""

SIZE_MB = Count("size_mb", _size_mb, "MB", takes_sample=True, of_model=False)
"""What a checkpoint of the extracted subnet holds, in 10^6 bytes: parameters, persistent buffers,
packed weights with their scales, and tensors of an extra state, in their types, each piece of
memory once."""


SLICED = "of the slice"
"""The fingerprint of exact measures of networks without `extract`, of which earlier versions
measured all weights: a study does not mix the two."""


def remembered(
    name: str, fn: Callable[[Subnet], float], unit: str = "", fingerprint: str | None = None
) -> Measure:
    """Return an exact measure that calls a function once per subnet.

    A `MeasurementError` of it ends the search while no subnet has worked; later it is a failure of
    that subnet alone.
    """
    values: dict[Subnet, float] = {}

    def measure(subnets: list[Subnet]) -> list[float]:
        for subnet in subnets:
            if subnet in values:
                continue
            try:
                values[subnet] = float(fn(subnet))
            except MeasurementError as error:
                if not values:
                    raise  # no subnet can be counted
                raise RuntimeError(str(error)) from error  # this one cannot
        return [values[subnet] for subnet in subnets]

    return Measure(name, measure, unit=unit, exact=True, fingerprint=fingerprint)
