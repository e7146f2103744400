# SPDX-License-Identifier: Apache-2.0
"""The bottleneck block of ResNets, with elastic or plain layers, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lightning_subnet.elasticity.sorting import Channels, inputs, outputs
from lightning_subnet.supernets._blocks.mbconv import Layers, Pixels


def conv_norm_act(layers: Layers, c_in: int, c_out: int, kernel: int, stride: int) -> nn.Sequential:
    """Return convolution, normalisation and ReLU."""
    return nn.Sequential(
        layers.conv(c_in, c_out, kernel, stride=stride), layers.norm(c_out), nn.ReLU()
    )


class Shortcut(nn.Module):
    """Add the input of a module to its output."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply; (n, c, h, w) to the same."""
        y: torch.Tensor = self.body(x) + x
        return y


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 beside a shortcut, which the first block of a stage adapts.

    The layers may be elastic or plain; the channels are those at the largest.
    """

    def __init__(
        self, layers: Layers, c_in: int, c_out: int, mid: int, stride: int, first: bool
    ) -> None:
        super().__init__()
        self.conv1 = conv_norm_act(layers, c_in, mid, 1, 1)
        self.conv2 = conv_norm_act(layers, mid, mid, 3, stride)
        self.conv3 = nn.Sequential(layers.conv(mid, c_out, 1), layers.norm(c_out))
        self.downsample = (
            nn.Sequential(
                nn.AvgPool2d(stride, stride, ceil_mode=True),
                layers.conv(c_in, c_out, 1),
                layers.norm(c_out),
            )
            if first
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block; (n, c_in, h, w) to (n, c_out, h', w')."""
        shortcut: torch.Tensor = x if self.downsample is None else self.downsample(x)
        y: torch.Tensor = self.conv3(self.conv2(self.conv1(x)))
        return (y + shortcut).relu()


def bottleneck_channels(block: Any, mids: Sequence[int]) -> list[Channels]:
    """Return the channels behind the first and behind the second convolution of a block.

    Args:
        block: A `Bottleneck` of elastic layers.
        mids: Numbers of inner channels of subnets that are to stay as they are.
    """
    (first, norm, *_), (second, norm2, *_), third = block.conv1, block.conv2, block.conv3[0]
    return [
        Channels([*outputs(first, norm), *inputs(second)], inputs(second), mids),
        Channels([*outputs(second, norm2), *inputs(third)], inputs(third), mids),
    ]


def costs(module: nn.Module, sizes: Sequence[tuple[Pixels, Pixels]]) -> npt.NDArray[np.float64]:
    """Return MACs, parameters and megabytes of a block or a part of the stem, (n_sizes, 3).

    Args:
        module: A module of plain layers.
        sizes: Pixels of the image before and after it; one row of the result each.
    """
    inner = sum(m.weight.numel() for n, m in module.named_modules() if _at_input(n, m))
    outer = sum(
        m.weight.numel()
        for n, m in module.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and not _at_input(n, m)
    )
    params = sum(p.numel() for p in module.parameters())
    tensors = [*module.parameters(), *module.buffers()]
    megabytes = sum(t.numel() * t.element_size() for t in tensors) / 1e6
    macs = [inner * prod(a) + outer * prod(b) for a, b in sizes]
    return np.array([[n, params, megabytes] for n in macs])


def _at_input(name: str, layer: nn.Module) -> bool:
    """Return whether this is a convolution that sees the image before it shrinks."""
    return name == "conv1.0" and isinstance(layer, nn.Conv2d)
