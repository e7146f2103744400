# SPDX-License-Identifier: Apache-2.0
"""Sorting channels by importance, so that narrow subnets, which have the first, have the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import ElasticityError, SearchError
from lightning_subnet.space.choices import Value
from lightning_subnet.space.space import SearchSpace

Axis = tuple[torch.Tensor, int]  # a tensor, and the dimension that the channels are
Values = Mapping[str, Sequence[Value]]  # by name of choice
Move = tuple[torch.Tensor, int, torch.Tensor]  # a tensor, one of its dimensions, its new order


@dataclass(frozen=True)
class Channels:
    """Channels of which subnets have the first so many, and the tensors that have them.

    Args:
        axes: Every tensor that has these channels, parameters and buffers, with the dimension. The
            largest network must be the same function in any order of them.
        readers: Those of them whose weights read the channels; the importance of a channel is the
            L1 norm of what reads it.
        widths: Numbers of first channels that stay the same ones, in another order: of subnets
            whose function is to stay.
        unit: So many move together, as the channels of a head do.

    Raises:
        ElasticityError: Tensors that do not have the same number of channels, or a width or a unit
            that does not fit it.

    Example:
        >>> first, second = nn.Linear(2, 4), nn.Linear(4, 1)
        >>> _ = second.weight.data.copy_(torch.tensor([[0.1, 3.0, 0.0, 2.0]]))
        >>> Channels([*outputs(first), *inputs(second)], readers=inputs(second)).order()
        tensor([1, 3, 0, 2])
    """

    axes: Sequence[Axis]
    readers: Sequence[Axis]
    widths: Sequence[int] = ()
    unit: int = 1

    def __post_init__(self) -> None:
        sizes = [tensor.shape[dim] for tensor, dim in (*self.axes, *self.readers)]
        wrong = [w for w in self.widths if not 0 < w <= sizes[0] or w % self.unit] if sizes else []
        if not self.readers or len(set(sizes)) != 1 or sizes[0] % self.unit or wrong:
            msg = (
                f"Channels have sizes {sorted(set(sizes))}, widths {sorted(set(self.widths))} and "
                f"{len(self.readers)} readers. All tensors need one size, which the widths do not "
                f"exceed, all multiples of unit={self.unit}, and one reader or more."
            )
            raise ElasticityError(msg)

    @property
    def n(self) -> int:
        """Number of channels."""
        tensor, dim = self.readers[0]
        return tensor.shape[dim]

    def order(self) -> torch.Tensor:
        """Return the channels, the most important first, within the bounds that `widths` set."""
        # In double precision and on the CPU, where all ranks add up alike.
        score = torch.zeros(self.n // self.unit, dtype=torch.float64)
        for tensor, dim in self.readers:
            rows = tensor.detach().cpu().double().abs().movedim(dim, 0)
            score += rows.reshape(len(score), -1).sum(1)
        order = order_within(score, [width // self.unit for width in self.widths])
        return (order[:, None] * self.unit + torch.arange(self.unit)).flatten()

    def moves(self) -> list[Move]:
        """Return tensors and dimensions with their new order; nothing if it stays the same."""
        order = self.order()
        same = torch.equal(order, torch.arange(self.n))
        return [] if same else [(tensor, dim, order) for tensor, dim in self.axes]


def order_within(score: torch.Tensor, bounds: Iterable[int]) -> torch.Tensor:
    """Return the order by falling score in which none crosses a bound.

    Example:
        >>> order_within(torch.tensor([0.0, 1.0, 3.0, 2.0]), [2])
        tensor([1, 0, 2, 3])
    """
    ends = sorted({*bounds} | {0, len(score)})
    bands = [torch.arange(a, b) for a, b in pairwise(ends)]
    return torch.cat([band[score[band].argsort(descending=True, stable=True)] for band in bands])


@runtime_checkable
class Sortable(Protocol):
    """A network with a method that names the channels which may be sorted."""

    def sortable_channels(self, keep: Values) -> Iterable[Any]:
        """Return its groups of channels, `Channels` or what else has their `moves()`.

        Args:
            keep: By choice, the values whose subnets are to stay the same function; the widths of
                those subnets are the `Channels.widths`.
        """


def sort_channels(
    net: nn.Module,
    *,
    keep: SearchSpace | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> int:
    """Sort channels by importance, in place; the largest network stays the same function.

    Subnets have the first channels of each layer. Before widths are trained those are no better
    than any others; sorted, a narrow subnet begins with the channels that matter. The importance is
    the L1 norm of the weights that read a channel, as in the original.

    Args:
        net: A super-network with `sortable_channels` (see `Sortable`), or a module with one such
            part. Those of this package have it: for the expansion of `ElasticMobileNetV3`, the
            expansion and the width of `ElasticResNet`, the feed-forward channels of Transformers,
            and heads where each keeps its channels.
        keep: All subnets of this part of its space stay the same functions, so channels are sorted
            between its widths only; None: the largest alone.
        optimizers: Their states (momenta) of a weight are sorted with it, as its gradient is.

    Returns:
        How many groups of channels came into another order.

    Raises:
        SearchError: The network does not say what can be sorted.
        ElasticityError: The channels that it names do not fit together.

    References:
        Cai et al., Once-for-All, ICLR 2020, section 3.3 (channel sorting for elastic width).

    Example:
        >>> from lightning_subnet.supernets import ElasticViT
        >>> net, images = ElasticViT.tiny().eval(), torch.randn(2, 1, 8, 8)
        >>> before = net(images)
        >>> sort_channels(net) > 0
        True
        >>> torch.allclose(net(images), before, atol=1e-5)
        True
    """
    part = sortable_part(net)
    space: SearchSpace = part.search_space()
    largest = {name: (space.largest[name],) for name in space.names}
    values = largest if keep is None else keep.values
    return move_channels(part.sortable_channels(values), optimizers)


def move_channels(groups: Iterable[Any], optimizers: Iterable[torch.optim.Optimizer] = ()) -> int:
    """Bring groups of channels into their new order, in place.

    Args:
        groups: `Channels`, or what else has their `moves()`.
        optimizers: Their states (momenta) of a weight are sorted with it, as its gradient is.

    Returns:
        How many groups came into another order.
    """
    states = [optimizer.state for optimizer in optimizers]
    n_moved = 0
    with torch.no_grad():
        for group in groups:
            moves = group.moves()
            n_moved += bool(moves)
            for tensor, dim, order in moves:
                momenta = [x for state in states for x in state.get(tensor, {}).values()]
                for x in (tensor, tensor.grad, *momenta):
                    if isinstance(x, torch.Tensor) and x.shape == tensor.shape:
                        x.copy_(x.index_select(dim, order.to(x.device)))
    return n_moved


def sortable_part(net: nn.Module) -> Any:
    """Return the elastic part of a module, if it is `Sortable`.

    Raises:
        SearchError: It is not.
    """
    part = elastic_part(net)
    if not isinstance(part, Sortable):
        msg = (
            f"{class_name(part)} does not say which channels can be sorted. Give it a method "
            "sortable_channels(keep) that returns a list of lightning_subnet.elasticity.Channels."
        )
        raise SearchError(msg)
    return part


def outputs(*layers: Any) -> list[Axis]:
    """Return the places of the output channels of convolutions, linear and normalising layers."""
    tensors = [
        tensor
        for layer in layers
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    ]
    return [(tensor, 0) for tensor in tensors if tensor.ndim]


def inputs(*layers: Any) -> list[Axis]:
    """Return the places of the input channels of convolutions and linear layers."""
    return [(layer.weight, 1) for layer in layers]
