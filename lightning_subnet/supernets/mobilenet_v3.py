# SPDX-License-Identifier: Apache-2.0
"""Once-for-all MobileNetV3: elastic kernels, expansion and depth, from ImageNet to 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.elasticity.extraction import plain_state, with_settings
from lightning_subnet.elasticity.layers import ElasticSequential
from lightning_subnet.elasticity.protocol import SubnetMixin, activated
from lightning_subnet.elasticity.sorting import Channels, Values
from lightning_subnet.errors import SpaceError
from lightning_subnet.space.choices import Choice
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.additive import Term, additive_measure
from lightning_subnet.study.measures import Measure
from lightning_subnet.supernets._blocks.checkpoints import (
    check_names,
    check_value,
    from_ofa_mobilenet_v3,
    load_weights,
)
from lightning_subnet.supernets._blocks.input_sizes import image_size
from lightning_subnet.supernets._blocks.mbconv import (
    ACTIVATIONS,
    ELASTIC,
    PLAIN,
    BlockSpec,
    MBConv,
    Pixels,
    make_divisible,
    mbconv_channels,
    output_size,
    plain_conv,
)


@dataclass(frozen=True)
class MobileNetV3Config:
    """The sizes of a MobileNetV3 super-network; the defaults are those of ImageNet at 224 pixels.

    Args:
        n_classes: Outputs.
        in_channels: Channels of the images.
        image_size: Their height and width in pixels, for the exact counts.
        width_mult: Multiplies all channels, which stay multiples of 8.
        stem: Channels of the first convolution and of the first block.
        widths: Channels of the stages.
        strides: Strides of the stem and then of each stage.
        activations: Of each stage.
        se: Whether the blocks of a stage squeeze and excite.
        head: Channels of the last two layers.
        kernels: Kernel sizes that a block may have.
        expansions: Expansion ratios that a block may have.
        depths: Numbers of blocks that a stage may have.
        dropout: Before the classifier.
    """

    n_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    width_mult: float = 1.0
    stem: int = 16
    widths: tuple[int, ...] = (24, 40, 80, 112, 160)
    strides: tuple[int, ...] = (2, 2, 2, 2, 1, 2)
    activations: tuple[str, ...] = ("relu", "relu", "h_swish", "h_swish", "h_swish")
    se: tuple[bool, ...] = (False, True, False, True, True)
    head: tuple[int, int] = (960, 1280)
    kernels: tuple[int, ...] = (3, 5, 7)
    expansions: tuple[float, ...] = (3, 4, 6)
    depths: tuple[int, ...] = (2, 3, 4)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        n = len(self.widths)
        if (len(self.strides), len(self.activations), len(self.se)) != (n + 1, n, n):
            msg = (
                f"{n} stages need {n + 1} strides, {n} activations and {n} se, not "
                f"{len(self.strides)}, {len(self.activations)} and {len(self.se)}."
            )
            raise SpaceError(msg)
        for activation in self.activations:
            if activation not in ACTIVATIONS:
                msg = f"activation {activation!r} is not one of {listed(ACTIVATIONS)}."
                raise SpaceError(msg + did_you_mean(activation, ACTIVATIONS))
        for name in ("kernels", "expansions", "depths"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                msg = f"{name}={values!r} must be one or more positive numbers."
                raise SpaceError(msg)

    def scaled(self, channels: int) -> int:
        """Return channels times the width multiplier, divisible by 8."""
        return make_divisible(channels * self.width_mult)

    @property
    def stages(self) -> list[list[BlockSpec]]:
        """The blocks of each stage at full depth."""
        c_in, stages = self.scaled(self.stem), []
        for width, stride, act, se in zip(
            self.widths, self.strides[1:], self.activations, self.se, strict=True
        ):
            c_out = self.scaled(width)
            stages.append(
                [
                    BlockSpec(c_out if b else c_in, c_out, 1 if b else stride, act, se)
                    for b in range(max(self.depths))
                ]
            )
            c_in = c_out
        return stages


class _Trunk(nn.Module):
    """Stem, stages and head; the stages' layers are elastic or plain."""

    def __init__(self, config: MobileNetV3Config, stages: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        c = config.scaled(config.stem)
        last, (wide, mixed) = config.scaled(config.widths[-1]), map(config.scaled, config.head)
        self.stem = nn.Sequential(
            plain_conv(config.in_channels, c, 3, stride=config.strides[0]),
            nn.BatchNorm2d(c),
            nn.Hardswish(),
        )
        self.first = MBConv(BlockSpec(c, c, 1, "relu", se=False, expands=False), PLAIN, [3], c)
        self.stages = nn.ModuleList(stages)
        self.expand = nn.Sequential(plain_conv(last, wide, 1), nn.BatchNorm2d(wide), nn.Hardswish())
        self.mix = nn.Sequential(plain_conv(wide, mixed, 1), nn.Hardswish())
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(mixed, config.n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, n_classes) of images (n, in_channels, height, width)."""
        x = self.first(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        x = self.mix(self.expand(x).mean((2, 3), keepdim=True))
        logits: torch.Tensor = self.classifier(self.dropout(x.flatten(1)))
        return logits


def _costs(module: nn.Module, size: Pixels) -> npt.NDArray[np.float64]:
    """Return MACs, parameters and megabytes of a module for one image of this size."""
    macs = 0
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            # The means of a channel are one pixel.
            inside = (1, 1) if name.startswith("se.") else size
            size = output_size(size, layer.stride[0])
            macs += layer.weight.numel() * prod(output_size(inside, layer.stride[0]))
        elif isinstance(layer, nn.Linear):
            macs += layer.weight.numel()
    tensors = [*module.parameters(), *module.buffers()]
    params = sum(p.numel() for p in module.parameters())
    return np.array([macs, params, sum(t.numel() * t.element_size() for t in tensors) / 1e6])


class MobileNetV3(_Trunk):
    """One subnet as an ordinary network.

    Args:
        config: The sizes of the super-network that it comes from.
        kernels: Kernel size of each block, by stage.
        expansions: Expansion ratio of each block, by stage.
    """

    def __init__(
        self,
        config: MobileNetV3Config,
        kernels: Sequence[Sequence[int]],
        expansions: Sequence[Sequence[float]],
    ) -> None:
        stages = [
            nn.Sequential(
                *(
                    MBConv(spec, PLAIN, [k], make_divisible(round(spec.c_in * e)))
                    for spec, k, e in zip(specs, ks, es, strict=False)
                )
            )
            for specs, ks, es in zip(config.stages, kernels, expansions, strict=True)
        ]
        super().__init__(config, list(stages))


class ElasticMobileNetV3(SubnetMixin, _Trunk):
    """The super-network: kernel size and expansion of every block, depth of every stage.

    The choices are `d.<stage>`, `ks.<block>` and `e.<block>`, as in the original; a block exists
    only while its stage is deep enough. At its defaults the space has 7371^5 distinct subnets.

    Args:
        config: The sizes.

    References:
        Cai et al., Once-for-All: Train One Network and Specialize it for Efficient Deployment, ICLR
        2020, sections 3.2 and 3.3.

    Example:
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> net.activate(net.search_space().smallest)
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    _space: SearchSpace | None = None

    def __init__(self, config: MobileNetV3Config | None = None) -> None:
        config = config or MobileNetV3Config()
        widest = max(config.expansions)
        super().__init__(
            config,
            [
                ElasticSequential(
                    *(
                        MBConv(s, ELASTIC, config.kernels, make_divisible(round(s.c_in * widest)))
                        for s in specs
                    )
                )
                for specs in config.stages
            ],
        )

    @classmethod
    def tiny(cls, **changes: Any) -> ElasticMobileNetV3:
        """Return the size for one-channel images of 8 x 8 pixels."""
        sizes = {"in_channels": 1, "image_size": 8, "widths": (16, 24), "strides": (1, 1, 2)}
        sizes |= {"activations": ("relu", "h_swish"), "se": (False, True), "head": (96, 128)}
        sizes |= {"kernels": (3, 5), "depths": (1, 2, 3), "expansions": (1, 2, 4)}
        return cls(MobileNetV3Config(**{**sizes, **changes}))

    @classmethod
    def small(cls, **changes: Any) -> ElasticMobileNetV3:
        """Return the size for images of 32 x 32 pixels."""
        sizes = {"n_classes": 10, "image_size": 32, "widths": (24, 40, 80), "strides": (1, 1, 2, 2)}
        sizes |= {"activations": ("relu", "h_swish", "h_swish"), "se": (False, True, True)}
        sizes |= {"head": (320, 512)}
        return cls(MobileNetV3Config(**{**sizes, **changes}))

    def load_ofa(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load the state dict of the original's `OFAMobileNetV3`, of the same size.

        Raises:
            SpaceError: Another layout or another size; the message has the first mismatch.
        """
        load_weights(self, from_ofa_mobilenet_v3(state, max(self.config.depths)))

    @property
    def blocks(self) -> list[MBConv]:
        """The elastic blocks of all stages, at full depth."""
        stages: list[Any] = [*self.stages]  # sequences of blocks
        return [block for stage in stages for block in stage]

    def search_space(self) -> SearchSpace:
        """Return the space: depths first, as the blocks exist under them."""
        if self._space is not None:
            return self._space
        config, most = self.config, max(self.config.depths)
        choices: dict[str, Choice] = {
            f"d.{s}": Choice(config.depths) for s in range(len(config.widths))
        }
        for name, values in (("ks", config.kernels), ("e", config.expansions)):
            for s in range(len(config.widths)):
                for b in range(most):
                    deep = [d for d in config.depths if d > b]
                    when = {f"d.{s}": deep} if len(deep) < len(config.depths) else {}
                    choices[f"{name}.{s * most + b}"] = Choice(values, when=when)
        self._space = SearchSpace(choices)
        return self._space

    def activate(self, subnet: Subnet) -> None:
        """Put a subnet in force.

        Raises:
            InvalidSubnetError: A value that the network was not built with; nothing changes then.
        """
        self._check(subnet)
        stages: list[Any] = [*self.stages]
        blocks: list[Any] = [*self.blocks]
        for s, stage in enumerate(stages):
            stage.active_depth = subnet[f"d.{s}"]
        for i, block in enumerate(blocks):
            mid = make_divisible(round(block.c_in * subnet[f"e.{i}"]))
            block.expand[0].active_out = mid
            block.depthwise[0].active_kernel = subnet[f"ks.{i}"]
            if block.se is not None:
                block.se.reduce.active_out = make_divisible(mid // 4)
                block.se.expand.active_out = mid

    def _check(self, subnet: Subnet) -> None:
        """Refuse values that the network was not built with; only blocks that exist count."""
        config, most = self.config, max(self.config.depths)
        check_names(type(self).__name__, self.search_space(), subnet)
        for s in range(len(config.widths)):
            check_value(subnet, f"d.{s}", config.depths)
            depth: Any = subnet[f"d.{s}"]
            for i in range(s * most, s * most + depth):
                check_value(subnet, f"ks.{i}", config.kernels)
                check_value(subnet, f"e.{i}", config.expansions)

    def exact_measures(self, example_input: Any = None) -> list[Measure]:
        """Return `macs`, `params` and `size_mb` as tables over blocks, for thousands of subnets.

        `size_mb` counts parameters and buffers in their types, in 10^6 bytes.

        Args:
            example_input: What `macs` is for: images. None: one image of `image_size`.
        """
        config, dtype = self.config, next(self.parameters()).dtype
        n, size = 1, (config.image_size, config.image_size)
        if example_input is not None:
            n, size = image_size(self, example_input)
        with torch.device("meta"):  # shapes are all that is needed
            trunk = _Trunk(config, []).to(dtype)
            fixed = _costs(trunk.stem, size)
            size = output_size(size, config.strides[0])
            fixed = fixed + _costs(trunk.first, size)
            tables = []
            for spec in (spec for stage in config.stages for spec in stage):
                mids = [make_divisible(round(spec.c_in * e)) for e in config.expansions]
                tables.append(
                    [
                        [_costs(MBConv(spec, PLAIN, [k], m).to(dtype), size) for m in mids]
                        for k in config.kernels
                    ]
                )
                size = output_size(size, spec.stride)
            fixed = fixed + _costs(trunk.expand, size)
            fixed = fixed + _costs(nn.Sequential(trunk.mix, trunk.classifier), (1, 1))
        units = (("macs", "MAC", n), ("params", "", 1), ("size_mb", "MB", 1))
        return [
            additive_measure(
                name,
                self.search_space(),
                [
                    Term((f"ks.{i}", f"e.{i}"), np.array(table)[..., at] * times)
                    for i, table in enumerate(tables)
                ],
                constant=fixed[at] * times,
                unit=unit,
            )
            for at, (name, unit, times) in enumerate(units)
        ]

    def sortable_channels(self, keep: Values) -> list[Channels]:
        """Return the inner channels of all blocks, for `sort_channels`."""
        groups = []
        for i, block in enumerate(self.blocks):
            ratios: Any = keep[f"e.{i}"]
            mids = [make_divisible(round(block.c_in * ratio)) for ratio in ratios]
            groups += mbconv_channels(block, mids)
        return groups

    def extract(self, subnet: Subnet) -> MobileNetV3:
        """Return a subnet as an ordinary network with a copy of its weights."""
        values, most = subnet.grouped(), max(self.config.depths)
        ks, e = (
            [values[name][s * most :][:d] for s, d in enumerate(values["d"])]
            for name in ("ks", "e")
        )
        plain = MobileNetV3(self.config, ks, e)
        size = self.config.image_size
        image = next(self.parameters()).new_zeros(1, self.config.in_channels, size, size)
        with activated(self, subnet):
            plain.load_state_dict(plain_state(self, image), assign=True)
        return with_settings(plain, self)
