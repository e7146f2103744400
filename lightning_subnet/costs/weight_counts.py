# SPDX-License-Identifier: Apache-2.0
"""Weights that subnets of a network without `extract` read, counted in one pass each."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_subnet._torch.contexts import random_state
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.elasticity.slicing.counting import Used, parts_read, used_weights
from lightning_subnet.elasticity.slicing.regions import Part
from lightning_subnet.errors import MeasurementError
from lightning_subnet.space.subnet import Subnet

_COUNTERS: weakref.WeakKeyDictionary[nn.Module, list[WeightCounter]] = weakref.WeakKeyDictionary()


class WeightCounter:
    """Counts what slicing would keep, without slicing each subnet.

    The smallest and the largest subnet are sliced, which takes seconds; where the passes agree with
    that, other subnets are counted in one pass each, in tens of milliseconds. Otherwise each subnet
    is sliced. Positions, of which a pass reads as many as its input is long, are known by this.

    Args:
        net: A super-network without `extract`.
        sample: One sample, as its forward pass takes it.

    Attributes:
        refusal: Why its subnets cannot be sliced; None if they can.

    Example:
        >>> import torch
        >>> from lightning_subnet import SearchSpace, elastic
        >>> net = elastic(nn.Linear(4, 4), space=SearchSpace(scale=[1, 2]),
        ...               activate=lambda net, subnet: setattr(net, "scale", subnet["scale"]))
        >>> count = WeightCounter(net, torch.zeros(1, 4))
        >>> used = count(net.search_space().smallest)
        >>> used["weight"].numel, used["bias"].numel
        (16, 4)
    """

    def __init__(self, net: nn.Module, sample: Any) -> None:
        self.sample = sample
        self.refusal: str | None = None
        self._net = weakref.ref(net)
        self._open: dict[str, frozenset[int]] = {}
        self._agrees = True
        space = elastic_part(net).search_space()
        for subnet in dict.fromkeys([space.largest, space.smallest]):
            plain: Any = extract(net, subnet, sample, only="inference")
            if not plain.sliced:
                self.refusal = plain.unsliced_because
                return
            self._agrees = self._agrees and self._learn(net, subnet, plain)

    def __call__(self, subnet: Subnet) -> dict[str, Used]:
        """Return what a subnet uses, by the name of the tensor in the super-network.

        Raises:
            MeasurementError: It cannot be sliced.
        """
        net = self._net()
        assert net is not None, "it is counted as long as it is there"
        if self.refusal is None and self._agrees:
            return used_weights(net, subnet, self.sample, open_dims=self._open)
        plain: Any = extract(net, subnet, self.sample, only="inference")
        if not plain.sliced:
            raise MeasurementError(f"{subnet!r:.200} cannot be sliced: {plain.unsliced_because}.")
        return _used(plain)

    def _learn(self, net: nn.Module, subnet: Subnet, plain: nn.Module) -> bool:
        """Note dimensions that are as long as an input, and return whether all else agrees."""
        opened = _open_dims(parts_read(net, subnet, self.sample), plain)
        if opened is None:
            return False
        for name, dims in opened.items():
            self._open[name] = self._open.get(name, frozenset()) | dims
        counted = used_weights(net, subnet, self.sample, open_dims=self._open)
        return _sizes(counted) == _sizes(_used(plain))


def counter_of(net: nn.Module, sample: Any) -> WeightCounter:
    """Return a counter, the same one as long as network and sample are the same."""
    counters = _COUNTERS.setdefault(net, [])
    for counter in counters:
        if counter.sample is sample:
            return counter
    with random_state():
        counters.append(WeightCounter(net, sample))
    return counters[-1]


def _used(plain: nn.Module) -> dict[str, Used]:
    stored = plain.state_dict()
    parameters = dict(plain.named_parameters())
    return {
        name: Used(x.numel(), x.element_size(), name in parameters, name in stored)
        for name, x in (*parameters.items(), *plain.named_buffers())
    }


def _sizes(used: Mapping[str, Used]) -> dict[str, int]:
    return {name: x.numel for name, x in used.items() if x.parameter or x.persistent}


def _open_dims(parts: Mapping[str, Part], plain: nn.Module) -> dict[str, frozenset[int]] | None:
    """Return the dimensions of which slicing keeps all and a pass reads less; None: they differ."""
    opened: dict[str, frozenset[int]] = {}
    for name, tensor in plain.state_dict().items():
        part = parts.get(name)
        if part is None:
            return None
        if tensor.numel() == part.numel:
            continue
        shape = part.source.tensor.shape
        if tensor.ndim != len(shape):
            return None
        dims = {d for d, n in enumerate(part.block) if n != tensor.shape[d]}
        if any(tensor.shape[d] != shape[d] for d in dims):
            return None
        opened[name] = frozenset(dims)
    return opened
