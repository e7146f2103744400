# SPDX-License-Identifier: Apache-2.0
"""The sizes of OFA's ResNet50 design, the choices that they allow, and the cost of each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_subnet.errors import SpaceError
from lightning_subnet.space.choices import Choice
from lightning_subnet.supernets._blocks.bottleneck import Bottleneck, conv_norm_act, costs
from lightning_subnet.supernets._blocks.mbconv import (
    PLAIN,
    Pixels,
    make_divisible,
    output_size,
)


@dataclass(frozen=True)
class ResNetConfig:
    """The sizes of a ResNet super-network; the defaults are those of OFA's ResNet50 at 224 pixels.

    Args:
        n_classes: Outputs.
        in_channels: Channels of the images.
        image_size: Their height and width in pixels, for the exact counts.
        stem: Channels at the end of the stem; half of them within.
        widths: Channels of the stages.
        base_depths: Blocks of the stages at depth 0.
        strides: Of the stem's first convolution, of its max pooling (1: none) and of each stage.
        depths: Numbers of blocks that a stage may have beyond its base depth. The largest in the
            first place gives the stem its residual convolution, any other takes it away.
        expansions: Ratios of a block's inner channels to its output.
        width_mults: Multipliers of the channels of the stem (two places) and of each stage.
        resolutions: Pixels that images may be resized to inside the network; none: no such choice.
        divisor: All channels are multiples of it.
        dropout: Before the classifier.

    Raises:
        SpaceError: The lengths of lists do not agree, or values are not positive or are repeated.
    """

    n_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    stem: int = 64
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    base_depths: tuple[int, ...] = (2, 2, 4, 2)
    strides: tuple[int, ...] = (2, 2, 1, 2, 2, 2)
    depths: tuple[int, ...] = (0, 1, 2)
    expansions: tuple[float, ...] = (0.2, 0.25, 0.35)
    width_mults: tuple[float, ...] = (0.65, 0.8, 1.0)
    resolutions: tuple[int, ...] = ()
    divisor: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        n = len(self.widths)
        if not n or (len(self.base_depths), len(self.strides)) != (n, n + 2):
            msg = (
                f"{n} stages need {n} base depths and {n + 2} strides (two of the stem), not "
                f"{len(self.base_depths)} and {len(self.strides)}."
            )
            raise SpaceError(msg)
        for name in ("depths", "expansions", "width_mults", "resolutions"):
            values = tuple(getattr(self, name))
            if name == "depths":
                kind = "whole numbers from 0"
                good = [isinstance(v, int) and v >= 0 for v in values]
            elif name == "resolutions":
                kind = "positive whole numbers"
                good = [isinstance(v, int) and v > 0 for v in values]
            else:
                kind, good = "positive numbers", [v > 0 for v in values]
            if not all(good) or (not values and name != "resolutions"):
                msg = f"{name}={values!r} must be one or more {kind}."
                raise SpaceError(msg)
            if len(set(values)) < len(values):
                msg = f"{name}={values!r} must have each value once."
                raise SpaceError(msg)
            object.__setattr__(self, name, tuple(sorted(values)))
        if min(self.base_depths) + min(self.depths) < 1:
            msg = f"base_depths={self.base_depths!r} with depths={self.depths!r} leave no block."
            raise SpaceError(msg)

    def scaled(self, channels: float) -> int:
        """Return channels as a multiple of the divisor."""
        return make_divisible(channels, self.divisor)

    def mid(self, c_out: int, expansion: float) -> int:
        """Return the inner channels of a block."""
        return self.scaled(round(c_out * expansion))

    @property
    def channels(self) -> list[list[int]]:
        """Channels by multiplier, within the stem, at its end, of each stage."""
        stem = [self.scaled(self.stem * w) for w in self.width_mults]
        return [
            [self.scaled(c // 2) for c in stem],
            stem,
            *([self.scaled(width * w) for w in self.width_mults] for width in self.widths),
        ]

    @property
    def numbers(self) -> list[list[int]]:
        """Numbers of the blocks of each stage at full depth."""
        counts = [base + max(self.depths) for base in self.base_depths]
        return [[*range(end - n, end)] for n, end in zip(counts, accumulate(counts), strict=True)]

    def at(self, place: int, width_mult: float) -> int:
        """Return the channels of one place at a multiplier."""
        return self.channels[place][self.width_mults.index(width_mult)]


def _same(values: Sequence[Any], sizes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return the groups of values that give equal sizes, for `Choice(same=)`."""
    pairs = list(zip(values, sizes, strict=True))
    groups = [tuple(v for v, s in pairs if s == size) for size in dict.fromkeys(sizes)]
    return [group for group in groups if len(group) > 1]


def _inner(config: ResNetConfig, stage: int) -> list[tuple[int, ...]]:
    """Return the inner channels of a stage's blocks at each multiplier, by expansion."""
    outs = config.channels[2 + stage]
    return [tuple(config.mid(c, e) for c in outs) for e in config.expansions]


def resnet_choices(config: ResNetConfig) -> dict[str, Choice]:
    """Return the choices by name, with values that always mean the same network merged."""
    depths, choices = config.depths, {}
    choices["d.0"] = Choice(depths, same=[depths[:-1]] if len(depths) > 1 else [])
    choices |= {f"d.{s + 1}": Choice(depths) for s in range(len(config.widths))}
    for s, numbers in enumerate(config.numbers):
        same = _same(config.expansions, _inner(config, s))
        for b, i in enumerate(numbers):
            deep = [d for d in depths if config.base_depths[s] + d > b]
            when = {f"d.{s + 1}": deep} if len(deep) < len(depths) else {}
            choices[f"e.{i}"] = Choice(config.expansions, when=when, same=same)
    for i, sizes in enumerate(config.channels):
        choices[f"w.{i}"] = Choice(config.width_mults, same=_same(config.width_mults, sizes))
    if config.resolutions:
        choices["r"] = Choice(config.resolutions)
    return choices


def check_distinct(config: ResNetConfig) -> None:
    """Refuse expansions that only some multipliers tell apart, which a space cannot express.

    Raises:
        SpaceError: With the two expansions, and their inner channels.
    """
    for s in range(len(config.widths)):
        for (e, one), (f, other) in pairwise(
            zip(config.expansions, _inner(config, s), strict=True)
        ):
            if one != other and any(a == b for a, b in zip(one, other, strict=True)):
                msg = (
                    f"Expansions {e} and {f} give {list(one)} and {list(other)} inner channels in "
                    f"stage {s}, by width multiplier: the same network at some of them only. "
                    "Take expansions further apart, wider stages or a smaller divisor."
                )
                raise SpaceError(msg)


def resnet_tables(
    config: ResNetConfig, pixels: Sequence[Pixels], dtype: torch.dtype
) -> list[tuple[tuple[str, ...], Any]]:
    """Return pairs of names of choices and a table over their values, the pixels and three costs.

    A block's cost depends on its input, inner and output channels alone, so the sum is exact.
    """
    inside, ends, *stages = config.channels
    mults, sizes = config.width_mults, [(p, output_size(p, config.strides[0])) for p in pixels]
    tables: list[tuple[tuple[str, ...], Any]] = []

    def add(names: tuple[str, ...], shape: tuple[int, ...], modules: Sequence[nn.Module]) -> None:
        rows = [costs(module.to(dtype), sizes) for module in modules]
        tables.append((names, np.array(rows).reshape(*shape, len(sizes), 3)))

    n = len(mults)
    add(
        ("w.0",),
        (n,),
        [conv_norm_act(PLAIN, config.in_channels, c, 3, config.strides[0]) for c in inside],
    )
    sizes = [(b, b) for _, b in sizes]
    most = max(config.depths)
    residual = [
        conv_norm_act(PLAIN, c, c, 3, 1) if d == most else nn.Identity()
        for d in config.depths
        for c in inside
    ]
    add(("d.0", "w.0"), (len(config.depths), n), residual)
    add(("w.0", "w.1"), (n, n), [conv_norm_act(PLAIN, a, b, 3, 1) for a in inside for b in ends])
    sizes = [(b, b) for b in (output_size(b, config.strides[1]) for _, b in sizes)]
    before = ends
    for s, (outs, numbers) in enumerate(zip(stages, config.numbers, strict=True)):
        for b, i in enumerate(numbers):
            stride = 1 if b else config.strides[2 + s]
            sizes = [(x, output_size(x, stride)) for _, x in sizes]
            blocks = [
                Bottleneck(PLAIN, c_in, c, config.mid(c, e), stride, first=not b)
                for w, c in enumerate(outs)
                for c_in in (before if not b else [outs[w]])
                for e in config.expansions
            ]
            width_before = () if b else (f"w.{s + 1}",)  # a stage's input has a width of its own
            shape = (*(n for _ in width_before), n, len(config.expansions))
            add((f"w.{s + 2}", *width_before, f"e.{i}"), shape, blocks)
        before = outs
    sizes = [((1, 1), (1, 1))] * len(sizes)
    last = f"w.{len(stages) + 1}"
    add((last,), (n,), [nn.Linear(c, config.n_classes) for c in before])
    return tables
