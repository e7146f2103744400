# SPDX-License-Identifier: Apache-2.0
"""Slimmable networks, with switchable and with universal BatchNorm.

The methods are those of JiahuiYu/slimmable_networks: layers read `width_mult`, which
`net.apply(lambda m: setattr(m, "width_mult", w))` sets, and slice their weights in `forward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, elastic
from tests.families.family import CLASSES, Family, Lit, images, seeded

WIDTHS = (0.25, 0.5, 0.625, 0.75, 1.0)
UNIVERSAL = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def set_width(net: nn.Module, width: float) -> None:
    net.apply(lambda module: setattr(module, "width_mult", width))


# Yu et al., ICLR 2019


class SwitchableBatchNorm2d(nn.Module):
    """One BatchNorm for each width."""

    def __init__(self, features: Sequence[int]) -> None:
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm2d(n) for n in features)
        self.width_mult = max(WIDTHS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn[WIDTHS.index(self.width_mult)](x)


class SlimmableConv2d(nn.Conv2d):
    """Takes the first channels, as many as the list says at the number of the width."""

    def __init__(
        self, inputs: Sequence[int], outputs: Sequence[int], kernel: int, *, groups: bool = False
    ) -> None:
        super().__init__(
            max(inputs), max(outputs), kernel, padding=kernel // 2, bias=False,
            groups=max(inputs) if groups else 1,
        )  # fmt: skip
        self.inputs, self.outputs, self.depthwise = inputs, outputs, groups
        self.width_mult = max(WIDTHS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        i = WIDTHS.index(self.width_mult)
        self.in_channels, self.out_channels = self.inputs[i], self.outputs[i]
        self.groups = self.in_channels if self.depthwise else 1
        weight = self.weight[: self.out_channels, : self.in_channels]
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


class SlimmableLinear(nn.Linear):
    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__(max(inputs), max(outputs))
        self.inputs, self.outputs = inputs, outputs
        self.width_mult = max(WIDTHS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        i = WIDTHS.index(self.width_mult)
        self.in_features, self.out_features = self.inputs[i], self.outputs[i]
        weight = self.weight[: self.out_features, : self.in_features]
        return F.linear(x, weight, self.bias[: self.out_features])


class SlimmableBlock(nn.Module):
    """A bottleneck, whose depthwise convolution has as many groups as channels."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        middle = [n // 2 for n in outputs]
        self.body = nn.Sequential(
            SlimmableConv2d(inputs, middle, 1),
            SwitchableBatchNorm2d(middle),
            nn.ReLU(inplace=True),
            SlimmableConv2d(middle, middle, 3, groups=True),
            SwitchableBatchNorm2d(middle),
            nn.ReLU(inplace=True),
            SlimmableConv2d(middle, outputs, 1),
            SwitchableBatchNorm2d(outputs),
        )
        self.adds = inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.adds:
            y += x
        return y.relu()


class SlimmableNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, last = ([int(c * w) for w in WIDTHS] for c in (16, 32))
        self.stem = SlimmableConv2d([1] * len(WIDTHS), first, 3)
        self.bn = SwitchableBatchNorm2d(first)
        self.blocks = nn.Sequential(
            SlimmableBlock(first, first), SlimmableBlock(first, last), SlimmableBlock(last, last)
        )
        self.classifier = SlimmableLinear(last, [CLASSES] * len(WIDTHS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.bn(self.stem(x)).relu())
        return self.classifier(x.mean((2, 3)))


def switchable() -> Lit:
    return Lit(
        elastic(
            seeded(SlimmableNet),
            space=SearchSpace(width=WIDTHS),
            activate=lambda net, subnet: set_width(net, subnet["width"]),
        )
    )


# Yu and Huang, ICCV 2019


def make_divisible(value: float, divisor: int = 4) -> int:
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class USBatchNorm2d(nn.BatchNorm2d):
    """Holds BatchNorms for statistics alone; its own flag says whether it trains.

    Where its width has statistics, `F.batch_norm` gets those buffers; else the holder's, which are
    None (`track_running_stats=False`), so that such a width is normalised by its batch.
    """

    def __init__(self, features: int, widths: Sequence[float] = UNIVERSAL) -> None:
        super().__init__(features, affine=True, track_running_stats=False)
        self.features, self.widths = features, widths
        self.bn = nn.ModuleList(
            nn.BatchNorm2d(make_divisible(features * w), affine=False) for w in widths
        )
        self.width_mult = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = make_divisible(self.features * self.width_mult)
        mean, var = self.running_mean, self.running_var
        if self.width_mult in self.widths:
            own = self.bn[self.widths.index(self.width_mult)]
            mean, var = own.running_mean[:c], own.running_var[:c]
        return F.batch_norm(
            x, mean, var, self.weight[:c], self.bias[:c], self.training, self.momentum, self.eps
        )


class USHolder(nn.Module):
    """Holds one BatchNorm of all features and slices it; its own flag says whether it trains."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(features)
        self.momentum, self.width_mult = 0.1, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, bn = x.shape[1], self.bn
        return F.batch_norm(
            x, bn.running_mean[:c], bn.running_var[:c], bn.weight[:c], bn.bias[:c],
            self.training, self.momentum, bn.eps,
        )  # fmt: skip


class USConv2d(nn.Conv2d):
    """Computes its channels from the width, whatever it is."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, us: tuple[bool, bool] = (True, True),
        depthwise: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            inputs, outputs, kernel, padding=kernel // 2, bias=False,
            groups=inputs if depthwise else 1,
        )  # fmt: skip
        self.inputs, self.outputs, self.us, self.depthwise = inputs, outputs, us, depthwise
        self.width_mult = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.us[0]:
            self.in_channels = make_divisible(self.inputs * self.width_mult)
        if self.us[1]:
            self.out_channels = make_divisible(self.outputs * self.width_mult)
        self.groups = self.in_channels if self.depthwise else 1
        weight = self.weight[: self.out_channels, : self.in_channels]
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


class USNet(nn.Module):
    def __init__(self, norm: type[nn.Module] = USBatchNorm2d) -> None:
        super().__init__()
        self.body = nn.Sequential(
            USConv2d(1, 16, 3, us=(False, True)), norm(16), nn.ReLU6(inplace=True),
            USConv2d(16, 16, 3, depthwise=True), norm(16), nn.ReLU6(inplace=True),
            USConv2d(16, 32, 1), norm(32), nn.ReLU6(inplace=True),
            USConv2d(32, 48, 1, us=(True, False)), nn.BatchNorm2d(48), nn.ReLU6(inplace=True),
        )  # fmt: skip
        self.classifier = nn.Linear(48, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x).mean((2, 3)))


def _universal(norm: type[nn.Module]) -> Lit:
    net = seeded(lambda: USNet(norm))
    return Lit(
        elastic(
            net,
            space=SearchSpace(width=UNIVERSAL),
            activate=lambda net, subnet: set_width(net, subnet["width"]),
        )
    )


def universal() -> Lit:
    return _universal(USBatchNorm2d)


def universal_sliced() -> Lit:
    return _universal(USHolder)


_CODE = """\
net = elastic(net, space=SearchSpace(width=[0.25, 0.5, 0.75, 1.0]), activate=lambda net, s:
              net.apply(lambda module: setattr(module, "width_mult", s["width"])))"""
_PROJECT = "JiahuiYu/slimmable_networks"

FAMILIES = [
    Family(
        "slimmable, switchable BatchNorm",
        switchable,
        images,
        _CODE,
        f"Yu et al., Slimmable Neural Networks, ICLR 2019; {_PROJECT}",
    ),
    Family(
        "slimmable, universal BatchNorm",
        universal,
        images,
        _CODE,
        f"Yu and Huang, Universally Slimmable Networks, ICCV 2019; {_PROJECT}",
    ),
    Family(
        "slimmable, one BatchNorm sliced",
        universal_sliced,
        images,
        _CODE,
        "Yu and Huang, Universally Slimmable Networks, ICCV 2019",
    ),
]
