# SPDX-License-Identifier: Apache-2.0
"""Groups of channels that vary together, where the network's code takes their sizes to be equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from lightning_subnet.elasticity.channels.discovery import ChannelGroup


def alike(groups: Iterable[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Return those of several groups that are the same part of several layers.

    They have as many units and tensors of the same names and shapes, as the heads of all
    cross-attentions of a decoder do.

    Args:
        groups: Groups of channels of one network.
    """
    by_form: dict[Any, list[ChannelGroup]] = defaultdict(list)
    for group in groups:
        form = sorted(
            (*name.split(".")[-2:], dim, group.sizes[name, dim], places.shape[1])
            for (name, dim), places in group.axes.items()
        )
        by_form[group.units, tuple(form)].append(group)
    return [several for several in by_form.values() if len(several) > 1]


def tied(groups: Iterable[ChannelGroup]) -> ChannelGroup:
    """Return one group whose units are the first, second, ... units of each of several.

    Args:
        groups: Groups of as many units, none of which have an axis in common.

    Example:
        >>> import torch
        >>> one = ChannelGroup({("a", 1): torch.tensor([[0], [1]])}, {("a", 1): 2}, (("a", 1),))
        >>> other = ChannelGroup({("b", 1): torch.tensor([[0], [1]])}, {("b", 1): 2}, (("b", 1),))
        >>> list(tied([one, other]).axes)
        [('a', 1), ('b', 1)]
    """
    groups = list(groups)
    return ChannelGroup(
        {axis: places for group in groups for axis, places in group.axes.items()},
        {axis: size for group in groups for axis, size in group.sizes.items()},
        tuple(axis for group in groups for axis in group.readers),
        tuple(axis for group in groups for axis in group.norms),
        any(group.spreads for group in groups),
    )
