# SPDX-License-Identifier: Apache-2.0
"""Counting: which weights a subnet reads, seen in one forward pass, without slicing it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_subnet._torch.contexts import evaluating, plain_attention, random_state
from lightning_subnet._torch.inputs import arguments
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.elasticity.slicing.regions import Part, WeightReader
from lightning_subnet.space.subnet import Subnet


@dataclass(frozen=True)
class Used:
    """What a subnet uses of one tensor.

    Args:
        numel: How many of its elements.
        itemsize: Bytes of one.
        parameter: Whether they are parameters of the sliced subnet; else it is a buffer.
        persistent: Whether it is in the state dict.
    """

    numel: int
    itemsize: int
    parameter: bool
    persistent: bool = True


def used_weights(
    module: nn.Module,
    subnet: Subnet,
    example_input: Any,
    *,
    open_dims: Mapping[str, frozenset[int]] | None = None,
) -> dict[str, Used]:
    """Return what a subnet reads of the weights of its super-network.

    It is what slicing keeps of them: the elements that are read, each once; of a weight that is
    read in several places the smallest block around them.

    Args:
        module: A super-network, or a module with one elastic descendant, which is then counted.
        subnet: The subnet; it is put in force, and the one before comes back.
        example_input: Arguments of the forward pass of `module`.
        open_dims: Dimensions, by name of a tensor, of which as much is read as the input is long,
            and all is kept.

    Returns:
        What is read, by the name of the tensor in the super-network.

    Example:
        >>> from lightning_subnet import SearchSpace, elastic
        >>> net = elastic(nn.Linear(4, 4), space=SearchSpace(scale=[1, 2]),
        ...               activate=lambda net, subnet: setattr(net, "scale", subnet["scale"]))
        >>> used = used_weights(net, net.search_space().smallest, torch.zeros(1, 4))
        >>> used["weight"].numel, used["bias"].numel
        (16, 4)
    """
    parts = parts_read(module, subnet, example_input)
    return {
        name: Used(
            _numel(part, (open_dims or {}).get(name, frozenset())),
            part.source.tensor.element_size(),
            part.source.kind != "buffer",
            part.source.persistent,
        )
        for name, part in parts.items()
    }


def parts_read(module: nn.Module, subnet: Subnet, example_input: Any) -> dict[str, Part]:
    """Return the parts of tensors that a subnet reads in eval mode, by name."""
    part: Any = elastic_part(module)
    reader = WeightReader(part)
    args, kwargs = arguments(module, example_input)
    reader.vary(x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
    with ExitStack() as stack:
        stack.enter_context(activated(part, subnet))
        with reader.activating():
            part.activate(subnet)
        for context in (evaluating(module), torch.no_grad(), random_state(0), plain_attention()):
            stack.enter_context(context)
        with reader:
            module(*args, **kwargs)
    return reader.parts()


def _numel(part: Part, dims: frozenset[int]) -> int:
    if not dims:
        return part.numel
    sizes = (
        size if d in dims else n
        for d, (size, n) in enumerate(zip(part.source.tensor.shape, part.block, strict=True))
    )
    return int(torch.Size(sizes).numel())
