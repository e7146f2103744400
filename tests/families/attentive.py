# SPDX-License-Identifier: Apache-2.0
"""A network with the methods of AttentiveNAS's (facebookresearch/AttentiveNAS).

`set_active_subnet(resolution, width, depth, kernel_size, expand_ratio)`. Its BatchNorm has no
statistics of a subnet: it runs in training mode alone, and a subnet is evaluated as
`get_active_subnet()` builds it, with statistics renewed there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import Choice, SearchSpace, Subnet, activated, elastic
from tests.families.family import CLASSES, Family, Lit, images, seeded
from tests.families.ofa import DynamicSE, Residual, copy_bn, make_divisible


class DynamicBatchNorm2d(nn.Module):
    """Gathers no statistics (momentum 0), and refuses to use them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, momentum=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            msg = "DynamicBN only supports training"
            raise ValueError(msg)
        bn, c = self.bn, x.size(1)
        return F.batch_norm(
            x, bn.running_mean[:c], bn.running_var[:c], bn.weight[:c], bn.bias[:c],
            bn.training or not bn.track_running_stats, bn.momentum, bn.eps,
        )  # fmt: skip

    def plain(self, channels: int) -> nn.BatchNorm2d:
        return copy_bn(nn.BatchNorm2d(channels), self.bn)


class DynamicPointConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False)
        self.kernel, self.active_out_channel = kernel, outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.conv.weight[: self.active_out_channel, : x.size(1)].contiguous()
        return F.conv2d(x, weight, None, 1, self.kernel // 2)

    def plain(self, inputs: int) -> nn.Conv2d:
        c = self.active_out_channel
        conv = nn.Conv2d(inputs, c, self.kernel, 1, self.kernel // 2, bias=False)
        conv.weight.data.copy_(self.conv.weight.data[:c, :inputs])
        return conv


class DynamicSeparableConv2d(nn.Module):
    """A depthwise convolution: the smaller kernel is the middle of the larger."""

    def __init__(self, channels: int, kernels: list[int], stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, max(kernels), groups=channels, bias=False)
        self.stride, self.active_kernel_size, self.largest = stride, max(kernels), max(kernels)

    def get_active_filter(self, channels: int) -> torch.Tensor:
        k = self.active_kernel_size
        cut = (self.largest - k) // 2
        return self.conv.weight[:channels, :, cut : cut + k, cut : cut + k]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, k = x.size(1), self.active_kernel_size
        return F.conv2d(x, self.get_active_filter(c).contiguous(), None, self.stride, k // 2, 1, c)

    def plain(self, channels: int) -> nn.Conv2d:
        k = self.active_kernel_size
        conv = nn.Conv2d(channels, channels, k, self.stride, k // 2, groups=channels, bias=False)
        conv.weight.data.copy_(self.get_active_filter(channels))
        return conv


class DynamicMBConv(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernels: list[int], ratios: list[int], stride: int
    ) -> None:
        super().__init__()
        middle = make_divisible(inputs * max(ratios))
        self.inverted, self.inverted_bn = (
            DynamicPointConv2d(inputs, middle),
            DynamicBatchNorm2d(middle),
        )
        self.depth = DynamicSeparableConv2d(middle, kernels, stride)
        self.depth_bn = DynamicBatchNorm2d(middle)
        self.se = DynamicSE(middle)
        self.point, self.point_bn = DynamicPointConv2d(middle, outputs), DynamicBatchNorm2d(outputs)
        self.adds = stride == 1
        self.shortcut = DynamicPointConv2d(inputs, outputs)  # used where channels differ
        self.active_out_channel, self.active_expand_ratio = outputs, max(ratios)
        self.active_kernel_size = max(kernels)

    def _set(self, inputs: int) -> int:
        middle = make_divisible(inputs * self.active_expand_ratio)
        self.inverted.active_out_channel = middle
        self.depth.active_kernel_size = self.active_kernel_size
        for conv in (self.point, self.shortcut):
            conv.active_out_channel = self.active_out_channel
        return middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._set(x.size(1))
        y = F.hardswish(self.inverted_bn(self.inverted(x)))
        y = self.se(F.hardswish(self.depth_bn(self.depth(y))))
        y = self.point_bn(self.point(y))
        if not self.adds:
            return y
        return y + (x if x.size(1) == y.size(1) else self.shortcut(x))

    def get_active_subnet(self, inputs: int) -> nn.Module:
        middle, outputs = self._set(inputs), self.active_out_channel
        layers = [
            self.inverted.plain(inputs), self.inverted_bn.plain(middle), nn.Hardswish(),
            self.depth.plain(middle), self.depth_bn.plain(middle), nn.Hardswish(),
            self.se.plain(middle), self.point.plain(middle), self.point_bn.plain(outputs),
        ]  # fmt: skip
        if self.adds and inputs != outputs:
            return Shortcut(nn.Sequential(*layers), self.shortcut.plain(inputs))
        return Residual(*layers) if self.adds else nn.Sequential(*layers)


class Shortcut(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shortcut(x)


class Resized(nn.Module):
    """The first step of a subnet: the resolution that it is for."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.size(-1) == self.size:
            return x
        return F.interpolate(x, size=self.size, mode="bicubic")


class AttentiveNasDynamicModel(nn.Module):
    resolutions, kernels, ratios, depths = (6, 8), (3, 5), (2, 3, 4), (1, 2)
    widths = ((4, 8), (8, 12), (12, 16), (24, 32))  # of the first layer, the stages, the last

    def __init__(self) -> None:
        super().__init__()
        self.first = DynamicPointConv2d(1, max(self.widths[0]), 3)
        self.first_bn = DynamicBatchNorm2d(max(self.widths[0]))
        self.blocks, self.block_group_info, inputs = nn.ModuleList(), [], max(self.widths[0])
        for widths, stride in zip(self.widths[1:-1], (1, 2), strict=True):
            self.block_group_info.append([])
            for i in range(max(self.depths)):
                self.block_group_info[-1].append(len(self.blocks))
                block = DynamicMBConv(
                    inputs, max(widths), list(self.kernels), list(self.ratios), 1 if i else stride
                )
                self.blocks.append(block)
                inputs = max(widths)
        self.last, self.last_bn = (
            DynamicPointConv2d(inputs, max(self.widths[-1])),
            DynamicBatchNorm2d(32),
        )
        self.classifier = nn.Linear(max(self.widths[-1]), CLASSES)
        self.active_resolution = max(self.resolutions)
        self.runtime_depth = [max(self.depths)] * len(self.block_group_info)

    def set_active_subnet(
        self, resolution: int, width: list[int], depth: list[int], kernel_size: list[int],
        expand_ratio: list[int], **_: Any,
    ) -> None:  # fmt: skip
        self.active_resolution = resolution
        self.first.active_out_channel, self.last.active_out_channel = width[0], width[-1]
        for stage, (c, d, k, e) in enumerate(
            zip(width[1:-1], depth, kernel_size, expand_ratio, strict=True)
        ):
            self.runtime_depth[stage] = d
            for i in self.block_group_info[stage][:d]:  # deeper ones keep what they had
                block = self.blocks[i]
                block.active_out_channel, block.active_kernel_size = c, k
                block.active_expand_ratio = e

    def _active(self) -> list[DynamicMBConv]:
        return [
            self.blocks[i]
            for group, depth in zip(self.block_group_info, self.runtime_depth, strict=True)
            for i in group[:depth]
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.size(-1) != self.active_resolution:
            x = F.interpolate(x, size=self.active_resolution, mode="bicubic")
        x = F.hardswish(self.first_bn(self.first(x)))
        for block in self._active():
            x = block(x)
        x = F.hardswish(self.last_bn(self.last(x)))
        x = torch.flatten(x.mean(3, keepdim=True).mean(2, keepdim=True), 1)
        weight = self.classifier.weight[:, : x.size(1)].contiguous()
        return F.linear(x, weight, self.classifier.bias)

    def get_active_subnet(self, preserve_weight: bool = True) -> nn.Module:
        assert preserve_weight
        with torch.no_grad():
            c = self.first.active_out_channel
            layers: list[nn.Module] = [
                Resized(self.active_resolution),
                nn.Sequential(self.first.plain(1), self.first_bn.plain(c), nn.Hardswish()),
            ]
            for block in self._active():
                layers.append(block.get_active_subnet(c))
                c = block.active_out_channel
            out = self.last.active_out_channel
            last = (self.last.plain(c), self.last_bn.plain(out), nn.Hardswish())
            layers.append(nn.Sequential(*last))
            head = nn.Linear(out, CLASSES)
            head.weight.copy_(self.classifier.weight[:, :out])
            head.bias.copy_(self.classifier.bias)
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # a subnet gathers its own
        return net


def space() -> SearchSpace:
    net = AttentiveNasDynamicModel
    choices: dict[str, Any] = {"resolution": net.resolutions}
    choices |= {f"width.{i}": values for i, values in enumerate(net.widths)}
    for stage in range(len(net.widths) - 2):
        choices |= {
            f"depth.{stage}": net.depths,
            f"kernel_size.{stage}": net.kernels,
            f"expand_ratio.{stage}": net.ratios,
        }
    return SearchSpace({name: Choice(list(values)) for name, values in choices.items()})


def extract(net: AttentiveNasDynamicModel, subnet: Subnet) -> nn.Module:
    with activated(net, subnet):
        return net.get_active_subnet()


def dynamic() -> Lit:
    return Lit(
        elastic(
            seeded(AttentiveNasDynamicModel),
            space=space(),
            activate=lambda net, subnet: net.set_active_subnet(**subnet.grouped()),
            extract=extract,
        )
    )


FAMILIES = [
    Family(
        "AttentiveNAS",
        dynamic,
        images,
        "net = elastic(net, space=space, extract=extract,  # activate, then get_active_subnet()\n"
        "              activate=lambda net, s: net.set_active_subnet(**s.grouped()))",
        "Wang et al., AttentiveNAS, CVPR 2021; facebookresearch/AttentiveNAS",
    )
]
