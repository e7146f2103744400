# SPDX-License-Identifier: Apache-2.0
"""A super-network out of any residual network: its blocks that keep their shape may be skipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from lightning_subnet._messages import warn
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.protocol import elastic
from lightning_subnet.errors import ElasticityError, ElasticityWarning, SearchError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.supernets._blocks.skips import Skips

_Net = TypeVar("_Net", bound=nn.Module)

_MOST = 0.9  # of the MACs in the smallest subnet: skipping saves nearly nothing


def skippable_blocks(
    net: _Net, example_input: Any, *, blocks: type[nn.Module] | Iterable[str] | None = None
) -> _Net:
    """Make a residual network searchable: each block that keeps its shape may be left out.

    Nothing has to be trained for it, and class and state dict stay as they are. The choices are
    `keep.<i>`, 0 or 1, in the order in which the blocks run. Extraction gives a copy without the
    blocks that are left out; everything else keeps its name. An `nn.Identity` stands for a block
    that takes and gives one tensor; a small module for any other, such as a layer of a transformer
    with masks and a cache, which gives the stream on in the structure of the block's output.
    Forward hooks of a block run where it is skipped too, and go along with what stands for it.

    Args:
        net: A network of torch, `timm`, `transformers` or your own, or a LightningModule.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of `forward`;
            a copy of the network is run on it.
        blocks: Which may be skipped: a class, or names as in `named_modules()`. By default the
            residual modules that run once: with all their weights at zero, or all but those that
            scale, they return an input, its ReLU or its layer normalisation. Of those that lie in
            one another the smaller are taken, unless much of the computing is outside of them: the
            blocks of a stage, and no normalisation in a block; of a transformer's layer with
            several arguments the whole.

    Returns:
        The same object, with `search_space()`, `activate(subnet)`, `extract(subnet)` and
        `active_subnet`.

    Raises:
        SearchError: The network is not a module, or does not have a module of that name.
        ElasticityError: There are no such blocks, or one that was named changes its shape, does not
            run exactly once, gives a tensor of its own besides the stream, or holds what a cache
            tells its length by. Also raised in extraction, where a hook of a skipped block needs
            the block itself.

    Warns:
        ElasticityWarning: The smallest subnet has over 90 % of the MACs of the network.

    References:
        Veit et al., Residual Networks Behave Like Ensembles of Relatively Shallow Networks, NeurIPS
        2016, section 4 (deleting single blocks).

    Example:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.layer(x).relu()
        >>> net = skippable_blocks(nn.Sequential(*(Block() for _ in range(3))), torch.zeros(1, 4))
        >>> net.search_space().size
        8
        >>> net.activate(net.search_space().subnet(keep=[1, 0, 0]))
        >>> sum(p.numel() for p in net.extract(net.active_subnet).parameters())
        20
    """
    if not isinstance(net, nn.Module):
        msg = f"skippable_blocks() got a {class_name(net)}, which is not an nn.Module."
        raise SearchError(msg)
    skips = Skips.find(net, example_input, blocks)
    if blocks is not None and skips.refused:
        name, reason = next(iter(skips.refused.items()))
        msg = f"Block {name!r} of {class_name(net)} cannot be skipped: it {reason}."
        raise ElasticityError(msg)
    names = skips.names
    if not names:
        but = "".join(f" ({n!r} adds, but {why})" for n, why in [*skips.refused.items()][:1])
        msg = (
            f"{class_name(net)} has no block that adds to its input and keeps its shape{but}. "
            "Name the blocks, skippable_blocks(net, input, blocks=Block), or use elastic()."
        )
        raise ElasticityError(msg)
    if skips.least_share is not None and skips.least_share > _MOST:
        block = class_name(net.get_submodule(names[0]))
        msg = (
            f"Without all {len(names)} blocks that may be skipped, {class_name(net)} still has "
            f"{skips.least_share:.1%} of its MACs; the first of them is {names[0]!r}, a {block}. "
            "Name larger ones with blocks=."
        )
        warn(msg, ElasticityWarning)
    space = SearchSpace({f"keep.{i}": [0, 1] for i in range(len(names))})

    def activate(net: nn.Module, subnet: Subnet) -> None:
        skips.put(net, _skipped(names, subnet))

    def extract(net: nn.Module, subnet: Subnet) -> nn.Module:
        return skips.extract(net, _skipped(names, subnet))

    return elastic(net, space=space, activate=activate, extract=extract)


def _skipped(names: list[str], subnet: Subnet) -> list[str]:
    return [name for name, keep in zip(names, subnet.values(), strict=True) if not keep]
