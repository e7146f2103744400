# SPDX-License-Identifier: Apache-2.0
"""The inverted bottleneck of MobileNets, with elastic or plain layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_subnet.elasticity.layers import ElasticBatchNorm2d, ElasticConv2d
from lightning_subnet.elasticity.sorting import Channels, inputs, outputs

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "h_swish": nn.Hardswish}


def make_divisible(value: float, divisor: int = 8) -> int:
    """Return the nearest multiple of the divisor, not more than 10 % below the value.

    References:
        Howard et al., Searching for MobileNetV3, ICCV 2019 (the reference implementation's rule).
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


Pixels = tuple[int, int]
"""Height and width of an image."""


def output_size(size: Pixels, stride: int) -> Pixels:
    """Return the size that an odd kernel with half its size as padding leaves."""
    height, width = ((pixels - 1) // stride + 1 for pixels in size)
    return height, width


class SqueezeExcite(nn.Module):
    """Scale channels by the output of a small network on their means.

    Args:
        reduce: A layer from c to about c / 4 channels.
        expand: A layer from there to c again.
    """

    def __init__(self, reduce: nn.Module, expand: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = reduce, expand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale; (n, c, h, w) to the same."""
        y = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu())
        return x * nn.functional.hardsigmoid(y)


class MBConv(nn.Module):
    """Inverted bottleneck: expand, depthwise, squeeze and excite, project; a shortcut if it fits.

    The layers may be elastic or plain; `channels` counts them at their largest.
    """

    def __init__(self, spec: BlockSpec, layers: Layers, kernels: Sequence[int], mid: int) -> None:
        super().__init__()
        act = ACTIVATIONS[spec.activation]
        c_in, c_out = spec.c_in, spec.c_out
        self.expand = (
            nn.Sequential(layers.conv(c_in, mid, 1), layers.norm(mid), act())
            if spec.expands
            else None
        )
        self.depthwise = nn.Sequential(
            layers.conv(mid, mid, kernels, stride=spec.stride, groups=mid), layers.norm(mid), act()
        )
        squeezed = make_divisible(mid // 4)
        self.se = (
            SqueezeExcite(
                layers.conv(mid, squeezed, 1, bias=True), layers.conv(squeezed, mid, 1, bias=True)
            )
            if spec.se
            else None
        )
        self.project = nn.Sequential(layers.conv(mid, c_out, 1), layers.norm(c_out))
        self.c_in, self.shortcut = c_in, spec.stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block; (n, c_in, h, w) to (n, c_out, h', w')."""
        y: torch.Tensor = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = y if self.se is None else self.se(y)
        y = self.project(y)
        return x + y if self.shortcut else y


@dataclass(frozen=True, slots=True)
class Layers:
    """Constructors of convolutions and normalisations: elastic or plain ones."""

    conv: Callable[..., nn.Module]
    norm: Callable[[int], nn.Module]


def plain_conv(
    c_in: int,
    c_out: int,
    kernel: int | Sequence[int],
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    """Return a convolution that keeps the size of an image, up to its stride."""
    (k,) = [kernel] if isinstance(kernel, int) else kernel
    return nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=bias)


ELASTIC = Layers(ElasticConv2d, ElasticBatchNorm2d)
PLAIN = Layers(plain_conv, nn.BatchNorm2d)


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """The sizes of a block that are the same in every subnet."""

    c_in: int
    c_out: int
    stride: int
    activation: str
    se: bool
    expands: bool = True


def mbconv_channels(block: Any, mids: Sequence[int]) -> list[Channels]:
    """Return the inner channels of a block, and those inside its squeeze and excite.

    Args:
        block: An `MBConv` of elastic layers.
        mids: Numbers of inner channels of subnets that are to stay as they are.
    """
    (wide, norm, *_), (depthwise, norm2, *_) = block.expand, block.depthwise
    last = block.project[0]
    axes, groups = [*outputs(wide, norm, depthwise, norm2), *inputs(last)], []
    if block.se is not None:
        reduce, expand = block.se.reduce, block.se.expand
        axes += [*inputs(reduce), *outputs(expand)]
        squeezed = [make_divisible(mid // 4) for mid in mids]
        read = inputs(expand)
        groups.append(Channels([*outputs(reduce), *read], read, squeezed))
    return [Channels(axes, inputs(last), mids), *groups]
