# SPDX-License-Identifier: Apache-2.0
"""Once-for-all networks: MobileNetV3 and ResNets.

The methods are those of the package `ofa`: `set_active_subnet(ks, e, d)` and `(d, e, w)`; layers
that slice by the channels of their input; smaller kernels out of larger ones by a learned matrix;
`get_active_subnet(preserve_weight)`, which builds the subnet of ordinary layers.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet.supernets import from_ofa
from tests.families.family import CLASSES, Family, Lit, images, seeded

DIVISIBLE = 4


def make_divisible(value: float) -> int:
    rounded = max(DIVISIBLE, int(value + DIVISIBLE / 2) // DIVISIBLE * DIVISIBLE)
    return rounded + DIVISIBLE if rounded < 0.9 * value else rounded


def as_list(value: Any, n: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * n


# Layers that know how many channels are active


class DynamicConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False)
        self.kernel, self.stride, self.active_out_channel = kernel, stride, outputs

    def get_active_filter(self, outputs: int, inputs: int) -> torch.Tensor:
        return self.conv.weight[:outputs, :inputs]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.get_active_filter(self.active_out_channel, x.size(1)).contiguous()
        return F.conv2d(x, weight, None, self.stride, self.kernel // 2)

    def plain(self, inputs: int) -> nn.Conv2d:
        outputs = self.active_out_channel
        conv = nn.Conv2d(inputs, outputs, self.kernel, self.stride, self.kernel // 2, bias=False)
        conv.weight.data.copy_(self.get_active_filter(outputs, inputs))
        return conv


class DynamicSeparableConv2d(nn.Module):
    """A depthwise convolution: the smaller kernel is the middle of the larger, times a matrix."""

    def __init__(self, channels: int, kernels: list[int], stride: int) -> None:
        super().__init__()
        self.kernels, self.stride = sorted(kernels), stride
        self.conv = nn.Conv2d(channels, channels, max(kernels), groups=channels, bias=False)
        for small, large in zip(self.kernels, self.kernels[1:], strict=False):
            self.register_parameter(f"{large}to{small}_matrix", nn.Parameter(torch.eye(small**2)))
        self.active_kernel_size = max(kernels)

    def get_active_filter(self, channels: int, kernel: int) -> torch.Tensor:
        weight = self.conv.weight[:channels, :channels]
        for i in range(len(self.kernels) - 1, 0, -1):
            large, small = self.kernels[i], self.kernels[i - 1]
            if large <= kernel:
                break
            cut = (large - small) // 2
            middle = weight[:, :, cut : cut + small, cut : cut + small].contiguous()
            matrix = getattr(self, f"{large}to{small}_matrix")
            weight = F.linear(middle.view(-1, small**2), matrix).view(middle.shape)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, kernel = x.size(1), self.active_kernel_size
        weight = self.get_active_filter(c, kernel).contiguous()
        return F.conv2d(x, weight, None, self.stride, kernel // 2, 1, c)

    def plain(self, channels: int) -> nn.Conv2d:
        k = self.active_kernel_size
        conv = nn.Conv2d(channels, channels, k, self.stride, k // 2, groups=channels, bias=False)
        conv.weight.data.copy_(self.get_active_filter(channels, k))
        return conv


class DynamicBatchNorm2d(nn.Module):
    """Takes the first channels of the statistics, and counts its batches itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bn, c = self.bn, x.size(1)
        if bn.num_features == c:
            return bn(x)
        factor = 0.0
        if bn.training and bn.track_running_stats:
            bn.num_batches_tracked += 1
            whole = bn.momentum is None  # a cumulative average
            factor = 1.0 / float(bn.num_batches_tracked) if whole else bn.momentum
        return F.batch_norm(
            x, bn.running_mean[:c], bn.running_var[:c], bn.weight[:c], bn.bias[:c],
            bn.training or not bn.track_running_stats, factor, bn.eps,
        )  # fmt: skip

    def plain(self, channels: int) -> nn.BatchNorm2d:
        return copy_bn(nn.BatchNorm2d(channels), self.bn)


def copy_bn(target: nn.BatchNorm2d, source: nn.BatchNorm2d) -> nn.BatchNorm2d:
    c = target.num_features
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(target, name).data.copy_(getattr(source, name).data[:c])
    target.eps, target.momentum = source.eps, source.momentum
    return target


class DynamicSE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, make_divisible(channels // 4), 1)
        self.expand = nn.Conv2d(make_divisible(channels // 4), channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = x.size(1)
        m = make_divisible(c // 4)
        y = x.mean((2, 3), keepdim=True)
        y = F.conv2d(y, self.reduce.weight[:m, :c].contiguous(), self.reduce.bias[:m]).relu()
        y = F.conv2d(y, self.expand.weight[:c, :m].contiguous(), self.expand.bias[:c])
        return x * F.hardsigmoid(y)

    def plain(self, channels: int) -> SE:
        se = SE(channels)
        for target, source in ((se.reduce, self.reduce), (se.expand, self.expand)):
            o, i = target.weight.shape[:2]
            target.weight.data.copy_(source.weight.data[:o, :i])
            target.bias.data.copy_(source.bias.data[:o])
        return se


class SE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, make_divisible(channels // 4), 1)
        self.expand = nn.Conv2d(make_divisible(channels // 4), channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.reduce(x.mean((2, 3), keepdim=True)).relu()
        return x * F.hardsigmoid(self.expand(y))


# MobileNetV3


class DynamicMBConv(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernels: list[int],
        ratios: list[int],
        stride: int,
        se: bool,
    ) -> None:
        super().__init__()
        middle = make_divisible(inputs * max(ratios))
        self.inverted = DynamicConv2d(inputs, middle)
        self.inverted_bn = DynamicBatchNorm2d(middle)
        self.depth = DynamicSeparableConv2d(middle, kernels, stride)
        self.depth_bn = DynamicBatchNorm2d(middle)
        self.se = DynamicSE(middle) if se else None
        self.point = DynamicConv2d(middle, outputs)
        self.point_bn = DynamicBatchNorm2d(outputs)
        self.adds = stride == 1 and inputs == outputs
        self.active_kernel_size, self.active_expand_ratio = max(kernels), max(ratios)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inverted.active_out_channel = make_divisible(x.size(1) * self.active_expand_ratio)
        self.depth.active_kernel_size = self.active_kernel_size
        y = F.hardswish(self.inverted_bn(self.inverted(x)))
        y = F.hardswish(self.depth_bn(self.depth(y)))
        y = y if self.se is None else self.se(y)
        y = self.point_bn(self.point(y))
        return x + y if self.adds else y

    def get_active_subnet(self, inputs: int) -> nn.Module:
        middle = make_divisible(inputs * self.active_expand_ratio)
        self.inverted.active_out_channel = middle
        self.depth.active_kernel_size = self.active_kernel_size
        layers: list[nn.Module] = [
            self.inverted.plain(inputs), self.inverted_bn.plain(middle), nn.Hardswish(),
            self.depth.plain(middle), self.depth_bn.plain(middle), nn.Hardswish(),
        ]  # fmt: skip
        layers += [] if self.se is None else [self.se.plain(middle)]
        outputs = self.point.active_out_channel
        layers += [self.point.plain(middle), self.point_bn.plain(outputs)]
        return Residual(*layers) if self.adds else nn.Sequential(*layers)


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class OFAMobileNetV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ks_list, self.expand_ratio_list, self.depth_list = [3, 5, 7], [2, 3, 4], [1, 2, 3]
        self.first_conv = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 1, bias=False))])
        self.block_group_info: list[list[int]] = []
        inputs = 8
        for outputs, stride, se in ((8, 1, False), (12, 2, True)):
            self.block_group_info.append([])
            for i in range(max(self.depth_list)):
                self.block_group_info[-1].append(len(self.blocks))
                self.blocks.append(
                    DynamicMBConv(
                        inputs, outputs, self.ks_list, self.expand_ratio_list,
                        1 if i else stride, se,
                    )
                )  # fmt: skip
                inputs = outputs
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(inputs, CLASSES))
        self.runtime_depth = [len(group) for group in self.block_group_info]

    def set_active_subnet(self, ks: Any = None, e: Any = None, d: Any = None, **_: Any) -> None:
        n = len(self.blocks) - 1
        for block, kernel, ratio in zip(
            self.blocks[1:], as_list(ks, n), as_list(e, n), strict=False
        ):
            block.active_kernel_size = kernel or block.active_kernel_size
            block.active_expand_ratio = ratio or block.active_expand_ratio
        for i, depth in enumerate(as_list(d, len(self.block_group_info))):
            if depth is not None:
                self.runtime_depth[i] = min(len(self.block_group_info[i]), depth)

    def _active(self) -> list[int]:
        return [
            number
            for group, depth in zip(self.block_group_info, self.runtime_depth, strict=True)
            for number in group[:depth]
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](self.first_conv(x))
        for i in self._active():
            x = self.blocks[i](x)
        return self.classifier(x.mean(3, keepdim=True).mean(2).view(x.size(0), -1))

    def get_active_subnet(self, preserve_weight: bool = True) -> nn.Module:
        assert preserve_weight
        layers, inputs = [copy.deepcopy(self.first_conv), copy.deepcopy(self.blocks[0])], 8
        for i in self._active():
            layers.append(self.blocks[i].get_active_subnet(inputs))
            inputs = self.blocks[i].point.active_out_channel
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*layers, pool, copy.deepcopy(self.classifier))


# ResNets


class DynamicConvLayer(nn.Module):
    def __init__(self, inputs: int, outputs: list[int], kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = DynamicConv2d(inputs, max(outputs), kernel, stride)
        self.bn = DynamicBatchNorm2d(max(outputs))
        self.out_channel_list, self.active_out_channel = outputs, max(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv.active_out_channel = self.active_out_channel
        return self.bn(self.conv(x))

    def get_active_subnet(self, inputs: int) -> nn.Module:
        self.conv.active_out_channel = self.active_out_channel
        return nn.Sequential(self.conv.plain(inputs), self.bn.plain(self.active_out_channel))


class DynamicBottleneck(nn.Module):
    def __init__(
        self, inputs: list[int], outputs: list[int], ratios: list[float], stride: int
    ) -> None:
        super().__init__()
        middle = make_divisible(max(outputs) * max(ratios))
        self.conv1 = DynamicConvLayer(max(inputs), [middle], 1)
        self.conv2 = DynamicConvLayer(middle, [middle], 3, stride)
        self.conv3 = DynamicConvLayer(middle, outputs, 1)
        shortcut = [nn.AvgPool2d(stride)] if stride > 1 else []
        self.shortcut = nn.Sequential(*shortcut, DynamicConvLayer(max(inputs), outputs, 1))
        self.identity = stride == 1 and inputs == outputs
        if self.identity:
            self.shortcut = nn.Sequential()
        self.out_channel_list, self.active_out_channel = outputs, max(outputs)
        self.active_expand_ratio = max(ratios)

    def _set(self) -> None:
        middle = make_divisible(self.active_out_channel * self.active_expand_ratio)
        self.conv1.active_out_channel = self.conv2.active_out_channel = middle
        self.conv3.active_out_channel = self.active_out_channel
        if not self.identity:
            self.shortcut[-1].active_out_channel = self.active_out_channel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._set()
        y = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return (y + self.shortcut(x)).relu()

    def get_active_subnet(self, inputs: int) -> nn.Module:
        self._set()
        middle = self.conv1.active_out_channel
        convs = [c.get_active_subnet(i) for c, i in
                 ((self.conv1, inputs), (self.conv2, middle), (self.conv3, middle))]  # fmt: skip
        shortcut = nn.Sequential(
            *(m.get_active_subnet(inputs) if isinstance(m, DynamicConvLayer) else m
              for m in self.shortcut)
        )  # fmt: skip
        return Bottleneck(convs, shortcut)


class Bottleneck(nn.Module):
    def __init__(self, convs: list[nn.Module], shortcut: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


class OFAResNets(nn.Module):
    STAGE_WIDTH_LIST: ClassVar = [8, 12, 16, 24]
    BASE_DEPTH_LIST: ClassVar = [1, 1, 1, 1]
    CHANNEL_DIVISIBLE: ClassVar = DIVISIBLE

    def __init__(self) -> None:
        super().__init__()
        self.depth_list, self.expand_ratio_list = [0, 1], [0.25, 0.5]
        self.width_mult_list = [0.5, 1.0]

        def scaled(width: int) -> list[int]:
            return [make_divisible(width * w) for w in self.width_mult_list]

        stem, first = scaled(8), scaled(12)
        self.input_stem = nn.ModuleList(
            [
                DynamicConvLayer(1, stem, 3),
                DynamicConvLayer(max(stem), stem, 3),
                DynamicConvLayer(max(stem), first, 3),
            ]
        )
        self.blocks, self.grouped_block_index, inputs = nn.ModuleList(), [], first
        for width, base, stride in zip(self.STAGE_WIDTH_LIST, self.BASE_DEPTH_LIST, (1, 1, 2, 1),
                                       strict=True):  # fmt: skip
            self.grouped_block_index.append([])
            for i in range(base + max(self.depth_list)):
                self.grouped_block_index[-1].append(len(self.blocks))
                outputs = scaled(width)
                block = DynamicBottleneck(
                    inputs, outputs, self.expand_ratio_list, 1 if i else stride
                )
                self.blocks.append(block)
                inputs = outputs
        self.classifier = nn.Linear(max(inputs), CLASSES)
        self.input_stem_skipping, self.runtime_depth = 0, [0] * len(self.BASE_DEPTH_LIST)

    def set_active_subnet(self, d: Any = None, e: Any = None, w: Any = None, **_: Any) -> None:
        stages = len(self.BASE_DEPTH_LIST)
        d, w = as_list(d, stages + 1), as_list(w, stages + 2)
        for block, ratio in zip(self.blocks, as_list(e, len(self.blocks)), strict=True):
            block.active_expand_ratio = ratio
        stem = self.input_stem
        stem[0].active_out_channel = stem[0].out_channel_list[w[0]]
        stem[1].active_out_channel = stem[0].active_out_channel
        stem[2].active_out_channel = stem[2].out_channel_list[w[1]]
        self.input_stem_skipping = d[0] != max(self.depth_list)
        for stage, group in enumerate(self.grouped_block_index):
            self.runtime_depth[stage] = max(self.depth_list) - d[stage + 1]
            for i in group:
                width = self.blocks[i].out_channel_list[w[stage + 2]]
                self.blocks[i].active_out_channel = width

    def _active(self) -> list[DynamicBottleneck]:
        return [
            self.blocks[i]
            for group, gone in zip(self.grouped_block_index, self.runtime_depth, strict=True)
            for i in group[: len(group) - gone]
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input_stem[0](x).relu()
        if not self.input_stem_skipping:
            x = x + self.input_stem[1](x).relu()
        x = self.input_stem[2](x).relu()
        for block in self._active():
            x = block(x)
        x = x.mean((2, 3))
        weight = self.classifier.weight[:, : x.size(1)].contiguous()
        return F.linear(x, weight, self.classifier.bias)

    def get_active_subnet(self, preserve_weight: bool = True) -> nn.Module:
        assert preserve_weight
        first, second, third = self.input_stem
        c = first.active_out_channel
        layers = [nn.Sequential(first.get_active_subnet(1), nn.ReLU())]
        if not self.input_stem_skipping:
            layers.append(Residual(second.get_active_subnet(c), nn.ReLU()))
        layers.append(nn.Sequential(third.get_active_subnet(c), nn.ReLU()))
        inputs = third.active_out_channel
        for block in self._active():
            layers.append(block.get_active_subnet(inputs))
            inputs = block.active_out_channel
        head = nn.Linear(inputs, CLASSES)
        head.weight.data.copy_(self.classifier.weight.data[:, :inputs])
        head.bias.data.copy_(self.classifier.bias.data)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def mobilenet() -> Lit:
    return Lit(from_ofa(seeded(OFAMobileNetV3)))


def resnets() -> Lit:
    return Lit(from_ofa(seeded(OFAResNets)))


FAMILIES = [
    Family(
        "OFA MobileNetV3",
        mobilenet,
        images,
        "net = from_ofa(net)",
        "Cai et al., Once-for-All, ICLR 2020; package ofa",
    ),
    Family(
        "OFA ResNets",
        resnets,
        images,
        "net = from_ofa(net)",
        "Cai et al., Once-for-All, ICLR 2020; package ofa",
    ),
]
