# SPDX-License-Identifier: Apache-2.0
"""Weights of a sliced network: what is stored of each source, and how operators get it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from lightning_subnet.elasticity.slicing.network import put
from lightning_subnet.elasticity.slicing.regions import Part, Region


@dataclass(frozen=True)
class Use:
    """A node of a graph whose value is a part of a source, and which others compute with."""

    node: fx.Node
    region: Region
    value: torch.Tensor


class Weights:
    """The weights of a sliced network, and how nodes get them.

    Args:
        parts: What the subnet reads in eval mode, by the name of the source.
        graphs: What each of its graphs reads.
    """

    def __init__(self, parts: Mapping[str, Part], graphs: Sequence[Mapping[str, Part]]) -> None:
        self._parts: dict[str, Part] = {}
        for name in dict.fromkeys(name for graph in graphs for name in graph):
            regions = [r for graph in graphs if name in graph for r in graph[name].regions]
            self._parts[name] = Part(regions[0].source, regions)
        self._eval = set(parts)
        self._stored: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._constants: dict[str, torch.Tensor] = {}

    def node_of(self, graph: fx.Graph, use: Use, of_whole: bool) -> fx.Node:
        """Return a node with the value of another one, made of a weight of its own."""
        source, region = use.region.source, use.region
        part = self._parts[source.name]
        simple = any(r.box is not None for r in part.regions)
        if region.box is not None and part.whole and of_whole:
            self._store(source.name, source.tensor, None)
            return use.node
        if part.single and not simple and not _in_order(part):
            if source.name not in self._stored:
                first = next(r for r in part.regions if r.box is None)
                assert first.index is not None
                flat = source.tensor.detach().reshape(-1)[first.index.to(source.tensor.device)]
                self._store(source.name, flat, first.index)
        elif source.name not in self._stored:
            self._store(source.name, _block_of(part), None)
        numbers = self._stored[source.name][1]
        weight = graph.create_node("get_attr", source.name)
        if numbers is None and region.box is not None:
            return self._view(graph, weight, part, region)
        return self._gathered(graph, weight, part, region, numbers)

    def constant(self, value: torch.Tensor) -> str:
        """Return the name of a tensor that is none of the weights."""
        for name, tensor in self._constants.items():
            same = tensor.shape == value.shape and tensor.dtype == value.dtype
            if tensor is value or (same and tensor.equal(value)):
                return name
        name = f"_constant_{len(self._constants)}"
        self._constants[name] = value
        return name

    def register(self, net: nn.Module) -> None:
        """Give a network the tensors."""
        for name in sorted(self._stored, key=lambda name: self._parts[name].source.number):
            stored = self._stored[name][0]
            source, value = self._parts[name].source, stored.detach().clone()
            if source.kind != "buffer":
                learns = source.kind == "computed" or source.tensor.requires_grad
                value = nn.Parameter(value, requires_grad=learns and value.is_floating_point())
            put(net, name, value, persistent=source.persistent and name in self._eval)
        for name, constant in self._constants.items():
            put(net, name, constant.detach().clone(), persistent=False)

    def _store(self, name: str, value: torch.Tensor, numbers: torch.Tensor | None) -> None:
        self._stored.setdefault(name, (value, numbers))

    def _view(self, graph: fx.Graph, node: fx.Node, part: Part, region: Region) -> fx.Node:
        """Return a block of a block."""
        assert region.box is not None
        sizes = list(part.block)
        for d, (steps, stored) in enumerate(zip(region.box, part.positions, strict=True)):
            at = torch.searchsorted(stored, steps.positions)
            n = len(at)
            if n == len(stored):
                continue
            sizes[d] = n
            step = int(at[1] - at[0]) if n > 1 else 1
            if bool((at.diff() == step).all()):
                args = (node, d, int(at[0]), int(at[-1]) + 1, step)
                node = graph.call_function(torch.ops.aten.slice.Tensor, args)
            else:
                index = graph.create_node("get_attr", self.constant(at))
                node = graph.call_function(torch.ops.aten.index_select.default, (node, d, index))
        along = [d for d in region.order if d is not None]
        order = along + [d for d in range(len(sizes)) if d not in along]
        if order != sorted(order):
            node = graph.call_function(torch.ops.aten.permute.default, (node, order))
        if tuple(sizes[d] for d in order) != region.shape:
            node = graph.call_function(torch.ops.aten.view.default, (node, list(region.shape)))
        return node

    def _gathered(
        self,
        graph: fx.Graph,
        node: fx.Node,
        part: Part,
        region: Region,
        numbers: torch.Tensor | None,
    ) -> fx.Node:
        """Return any elements of what is stored, which are in its order, or in that of numbers."""
        wanted = region.index
        if wanted is None:
            shape = part.source.tensor.shape
            wanted = _numbers_in_box(region, shape)
        if numbers is None:
            numbers = _numbers_of(part.positions, part.source.tensor.shape)
        order = numbers.flatten().argsort()
        at = order[torch.searchsorted(numbers.flatten()[order], wanted.flatten())]
        if not torch.equal(at, torch.arange(numbers.numel())):
            flat = graph.call_function(torch.ops.aten.reshape.default, (node, [-1]))
            index = graph.create_node("get_attr", self.constant(at.view(wanted.shape)))
            return graph.call_function(torch.ops.aten.index.Tensor, (flat, [index]))
        if tuple(numbers.shape) == region.shape:
            return node
        return graph.call_function(torch.ops.aten.reshape.default, (node, list(region.shape)))


def _block_of(part: Part) -> torch.Tensor:
    """Return the smallest block of a source that holds what is read."""
    value = part.source.tensor.detach()
    for d, positions in enumerate(part.positions):
        if len(positions) == value.shape[d]:
            continue
        if bool((positions == torch.arange(len(positions))).all()):
            value = value.narrow(d, 0, len(positions))  # which keeps the order in memory
        else:
            value = value.index_select(d, positions.to(value.device))
    return value


def _in_order(part: Part) -> bool:
    """Return whether what is read first is a block of the source, in the order of the source."""
    index = part.regions[0].index
    assert index is not None
    numbers = _numbers_of(part.positions, part.source.tensor.shape)
    return torch.equal(numbers.flatten(), index.flatten())


def _numbers_of(positions: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Return the number of each element of a block in its source."""
    numbers = torch.zeros((), dtype=torch.int64)
    for along, size in zip(positions, shape, strict=True):
        numbers = numbers.unsqueeze(-1) * size + along
    return numbers


def _numbers_in_box(region: Region, shape: Sequence[int]) -> torch.Tensor:
    assert region.box is not None
    numbers = _numbers_of([steps.positions for steps in region.box], shape)
    along = [d for d in region.order if d is not None]
    order = along + [d for d in range(len(shape)) if d not in along]
    return numbers.permute(order).reshape(region.shape)
