# SPDX-License-Identifier: Apache-2.0
"""Importance of units, and sorting them by it, so that subnets keep the most important ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lightning_subnet._messages import did_you_mean
from lightning_subnet._torch.contexts import evaluating, random_state
from lightning_subnet._torch.inputs import arguments
from lightning_subnet.elasticity.channels.discovery import ChannelGroup
from lightning_subnet.elasticity.sorting import Move, order_within
from lightning_subnet.errors import ElasticityError

Tensors = Mapping[str, torch.Tensor]
Score = Callable[[ChannelGroup, Tensors], torch.Tensor]
Importance = Literal["l1", "l2", "taylor", "activation"]

NAMES = ("l1", "l2", "taylor", "activation")


def scores(
    net: nn.Module,
    groups: Iterable[ChannelGroup],
    importance: Importance | Score,
    batches: Iterable[Any] = (),
) -> list[torch.Tensor]:
    """Return the importance of each unit of some groups.

    Args:
        net: The network.
        groups: The groups.
        importance: `"l1"`, `"l2"`: the norm of the weights that read a unit; `"taylor"`: how much
            the loss changes without them, to first order, of the gradients that the network has
            (Molchanov et al., CVPR 2019, equation 8); `"activation"`: the norm of what they read
            times their L1 norm, of some batches (Sun et al., ICLR 2024, equation 1); or a function
            of a group and the tensors by name that returns a tensor (units,).
        batches: Inputs of the network for `"activation"`, as `example_input` is.

    Raises:
        ElasticityError: There is none of that name, or what it needs is missing.

    Example:
        >>> from lightning_subnet.elasticity.channels.discovery import discover
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, -3.0, 0.0]]))
        >>> groups = discover(net, torch.zeros(1, 2)).groups
        >>> scores(net, groups, "l1")
        [tensor([1., 3., 0.], dtype=torch.float64)]
    """
    tensors = _tensors(net)
    groups = list(groups)
    if callable(importance):
        return [_checked(importance(group, tensors), group) for group in groups]
    if importance not in NAMES:
        hint = did_you_mean(importance, NAMES)
        msg = (
            f"importance={importance!r} is not known.{hint} Give one of {', '.join(NAMES)}, or a "
            "function of (group, tensors) that returns a tensor of one number per unit."
        )
        raise ElasticityError(msg)
    if importance == "activation":
        return _of_activations(net, groups, tensors, batches)
    return [_of_weights(group, tensors, importance) for group in groups]


def _checked(value: Any, group: ChannelGroup) -> torch.Tensor:
    score: torch.Tensor = torch.as_tensor(value).detach().cpu().double()
    if score.shape != (group.units,) or score.isnan().any():
        msg = (
            f"importance= returned {tuple(score.shape)} numbers for a group of {group.units} "
            "units. Return one number per unit, none of them NaN."
        )
        raise ElasticityError(msg)
    return score


def _of_weights(group: ChannelGroup, tensors: Tensors, importance: str) -> torch.Tensor:
    total = torch.zeros(group.units, dtype=torch.float64)
    for axis in group.readers:
        tensor = tensors[axis[0]]
        rows = _by_unit(tensor.detach(), axis[1], group.axes[axis])
        if importance == "taylor":
            if tensor.grad is None:
                msg = (
                    f'importance="taylor" needs gradients, and {axis[0]!r} has none. Run '
                    "loss.backward() on a few batches first, without an optimizer step."
                )
                raise ElasticityError(msg)
            total += (rows * _by_unit(tensor.grad, axis[1], group.axes[axis])).sum(1).square()
        elif importance == "l2":
            total += rows.square().sum(1)
        else:
            total += rows.abs().sum(1)
    return total.sqrt() if importance == "l2" else total


def _by_unit(tensor: torch.Tensor, dim: int, places: torch.Tensor) -> torch.Tensor:
    """Return the entries of each unit along a dimension, (units, all of them), in double."""
    rows = tensor.cpu().double().movedim(dim, 0).reshape(tensor.shape[dim], -1)
    return rows[places.flatten()].reshape(len(places), -1)


def _of_activations(
    net: nn.Module, groups: list[ChannelGroup], tensors: Tensors, batches: Iterable[Any]
) -> list[torch.Tensor]:
    by_id = {
        id(tensors[axis[0]]): axis
        for group in groups
        for axis in group.readers
        if tensors[axis[0]].ndim > 1
    }
    sums: dict[Any, torch.Tensor] = {}

    def add(axis: Any, module: Any, args: tuple[Any, ...]) -> None:
        dim = 1 - tensors[axis[0]].ndim if isinstance(module, _CONVS) else -1
        x = args[0].detach().double().movedim(dim, 0).flatten(1).square().sum(1).cpu()
        sums[axis] = sums[axis] + x if axis in sums else x

    n = 0
    with ExitStack() as stack:
        for module in net.modules():
            for p in module.parameters(recurse=False):
                if id(p) in by_id:
                    hook = partial(add, by_id[id(p)])
                    stack.callback(module.register_forward_pre_hook(hook).remove)
        with evaluating(net), torch.no_grad(), random_state(0):
            for batch in batches:
                args, kwargs = arguments(net, batch)
                net(*args, **kwargs)
                n += 1
    if not n:
        msg = (
            'importance="activation" needs inputs of the network. Give a few with batches=[...], '
            "each as example_input is."
        )
        raise ElasticityError(msg)
    result = []
    for group in groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        for axis in group.readers:
            weights = _by_unit(tensors[axis[0]].detach().abs(), axis[1], group.axes[axis])
            reads = sums.get(axis)
            norm = 1.0 if reads is None else _by_unit(reads.sqrt(), 0, group.axes[axis]).mean(1)
            total += weights.sum(1) * norm
        result.append(total)
    return result


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class SortableUnits:
    """A group of units that can be sorted by importance; the whole network stays the same.

    Attributes:
        group: The group.
        tensors: The tensors of the network by name.
        score: The importance of each unit.
        bounds: Numbers of first units that stay the same ones, in another order.
    """

    group: ChannelGroup
    tensors: Tensors
    score: torch.Tensor
    bounds: tuple[int, ...] = ()

    def moves(self) -> list[Move]:
        """Return tensors and dimensions with their new order; nothing if it stays the same."""
        order = order_within(self.score, self.bounds)
        if torch.equal(order, torch.arange(self.group.units)):
            return []
        moves: list[Move] = []
        for (name, dim), places in self.group.axes.items():
            index = torch.arange(self.tensors[name].shape[dim])
            index[places.flatten()] = places[order].flatten()
            moves.append((self.tensors[name], dim, index))
        return moves


def sortable_units(
    net: nn.Module,
    groups: Sequence[ChannelGroup],
    importance: Importance | Score,
    batches: Iterable[Any] = (),
    bounds: Mapping[int, tuple[int, ...]] | None = None,
) -> list[SortableUnits]:
    """Return groups of a network that can be sorted by importance.

    Args:
        net: The network.
        groups: The groups.
        importance: As `scores` takes it.
        batches: As `scores` takes them.
        bounds: By the number of a group, those of its `SortableUnits`; None: none.
    """
    tensors, bounds = _tensors(net), bounds or {}
    importances = enumerate(scores(net, groups, importance, batches))
    return [SortableUnits(groups[i], tensors, score, bounds.get(i, ())) for i, score in importances]


def _tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}
