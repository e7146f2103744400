# SPDX-License-Identifier: Apache-2.0
"""Once-for-all ResNet50: elastic depth, expansion and width, from ImageNet to 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet.elasticity.extraction import plain_state, with_settings
from lightning_subnet.elasticity.layers import ElasticLinear, ElasticSequential
from lightning_subnet.elasticity.protocol import SubnetMixin, activated
from lightning_subnet.elasticity.sorting import Channels, Values, inputs, outputs
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.additive import Term, additive_measure
from lightning_subnet.study.measures import Measure
from lightning_subnet.supernets._blocks.bottleneck import (
    Bottleneck,
    Shortcut,
    bottleneck_channels,
    conv_norm_act,
)
from lightning_subnet.supernets._blocks.checkpoints import (
    check_names,
    check_value,
    from_ofa_resnets,
    load_weights,
)
from lightning_subnet.supernets._blocks.input_sizes import image_size
from lightning_subnet.supernets._blocks.mbconv import ELASTIC, PLAIN
from lightning_subnet.supernets._blocks.resnet_space import (
    ResNetConfig,
    check_distinct,
    resnet_choices,
    resnet_tables,
)


class _Trunk(nn.Module):
    """Stem, stages and classifier; their layers are elastic or plain."""

    def __init__(
        self, config: ResNetConfig, stem: list[nn.Module], stages: list[nn.Module], last: nn.Module
    ) -> None:
        super().__init__()
        self.config = config
        *inside, end = stem
        elastic = isinstance(last, ElasticLinear)
        self.stem = (ElasticSequential if elastic else nn.Sequential)(*inside)
        self.stem_end = end
        self.pool = nn.MaxPool2d(3, config.strides[1], 1) if config.strides[1] > 1 else None
        self.stages = nn.ModuleList(stages)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = last
        self.resolution: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, n_classes) of images (n, in_channels, height, width)."""
        if self.resolution is not None and x.shape[-2:] != (self.resolution, self.resolution):
            size = (self.resolution, self.resolution)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        x = self.stem_end(self.stem(x))
        x = x if self.pool is None else self.pool(x)
        for stage in self.stages:
            x = stage(x)
        logits: torch.Tensor = self.classifier(self.dropout(x.mean((2, 3))))
        return logits


class ResNet(_Trunk):
    """One subnet as an ordinary network.

    Args:
        config: The sizes of the super-network that it comes from.
        expansions: Expansion ratio of each block, by stage.
        width_mults: Width multiplier within the stem, at its end and of each stage.
        residual_stem: Whether the stem has its residual convolution.
        resolution: Pixels that images are resized to; None leaves them.
    """

    def __init__(
        self,
        config: ResNetConfig,
        expansions: Sequence[Sequence[float]],
        width_mults: Sequence[float],
        *,
        residual_stem: bool = True,
        resolution: int | None = None,
    ) -> None:
        inside, c, *outs = (config.at(i, w) for i, w in enumerate(width_mults))
        stem: list[nn.Module] = [
            conv_norm_act(PLAIN, config.in_channels, inside, 3, config.strides[0])
        ]
        if residual_stem:
            stem.append(Shortcut(conv_norm_act(PLAIN, inside, inside, 3, 1)))
        stem.append(conv_norm_act(PLAIN, inside, c, 3, 1))
        stages: list[nn.Module] = []
        for es, c_out, stride in zip(expansions, outs, config.strides[2:], strict=True):
            blocks = []
            for b, e in enumerate(es):
                mid, step = config.mid(c_out, e), 1 if b else stride
                blocks.append(Bottleneck(PLAIN, c, c_out, mid, step, first=not b))
                c = c_out
            stages.append(nn.Sequential(*blocks))
        super().__init__(config, stem, stages, nn.Linear(c, config.n_classes))
        self.resolution = resolution


class ElasticResNet(SubnetMixin, _Trunk):
    """The super-network: depth of stem and stages, expansion of every block, width everywhere.

    The choices are those of the original. `d.0` keeps or leaves the stem's residual convolution
    (all but its last value leave it), `d.<stage + 1>` is the number of blocks beyond the base
    depth; `e.<block>` exists only while its stage is deep enough; `w.0` and `w.1` are the widths
    within the stem and at its end, `w.<stage + 2>` those of the stages. With
    `resolutions=(128, 160, ...)`, `r` is the number of pixels that the network resizes images to,
    as its first step: macs and latency follow it, and nothing else has to know. At its defaults the
    space has 117^3 * 1053 * 2 * 2 * 3^5 distinct subnets: the stem has 24 channels inside at two
    of the three multipliers.

    Args:
        config: The sizes.

    Raises:
        SpaceError: Two expansions are the same network at some multipliers and not at others.

    References:
        Cai et al., Once-for-All: Train One Network and Specialize it for Efficient Deployment, ICLR
        2020; ResNet50 is that of its authors' package. The design without elasticity: He et al.,
        Bag of Tricks for Image Classification, CVPR 2019, section 4 (ResNet-D).

    Example:
        >>> net = ElasticResNet.tiny(n_classes=10)
        >>> net.activate(net.search_space().smallest)
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    _space: SearchSpace | None = None

    def __init__(self, config: ResNetConfig | None = None) -> None:
        config = config or ResNetConfig()
        check_distinct(config)
        inside, c, *outs = (max(sizes) for sizes in config.channels)
        stem: list[nn.Module] = [
            conv_norm_act(ELASTIC, config.in_channels, inside, 3, config.strides[0]),
            Shortcut(conv_norm_act(ELASTIC, inside, inside, 3, 1)),
            conv_norm_act(ELASTIC, inside, c, 3, 1),
        ]
        stages: list[nn.Module] = []
        for numbers, c_out, stride in zip(config.numbers, outs, config.strides[2:], strict=True):
            mid, blocks = config.mid(c_out, max(config.expansions)), []
            for b in range(len(numbers)):
                step = 1 if b else stride
                blocks.append(Bottleneck(ELASTIC, c, c_out, mid, step, first=not b))
                c = c_out
            stages.append(ElasticSequential(*blocks))
        super().__init__(config, stem, stages, ElasticLinear(c, config.n_classes))
        self.resolution = max(config.resolutions, default=None)

    @classmethod
    def tiny(cls, **changes: Any) -> ElasticResNet:
        """Return the size for one-channel images of 8 x 8 pixels."""
        sizes = {"in_channels": 1, "image_size": 8, "stem": 16, "widths": (32, 64), "divisor": 4}
        sizes |= {"base_depths": (1, 1), "strides": (1, 1, 1, 2), "expansions": (0.25, 0.5, 1.0)}
        return cls(ResNetConfig(**{**sizes, "width_mults": (0.5, 1.0), **changes}))

    @classmethod
    def small(cls, **changes: Any) -> ElasticResNet:
        """Return the size for images of 32 x 32 pixels."""
        sizes = {"n_classes": 10, "image_size": 32, "stem": 32, "widths": (64, 128, 256)}
        sizes |= {"base_depths": (1, 1, 1), "strides": (1, 1, 1, 2, 2), "divisor": 4}
        sizes |= {"expansions": (0.25, 0.375, 0.5), "width_mults": (0.5, 0.75, 1.0)}
        return cls(ResNetConfig(**{**sizes, **changes}))

    def load_ofa(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load the state dict of the original's `OFAResNets`, of the same size.

        Raises:
            SpaceError: Another layout or another size; the message has the first mismatch.
        """
        numbers = [len(stage) for stage in self.config.numbers]
        load_weights(self, from_ofa_resnets(state, numbers))

    @property
    def blocks(self) -> list[Bottleneck]:
        """The blocks of all stages, at full depth."""
        stages: list[Any] = [*self.stages]  # sequences of blocks
        return [block for stage in stages for block in stage]

    def search_space(self) -> SearchSpace:
        """Return the space: depths first, as the blocks exist under them."""
        if self._space is not None:
            return self._space
        self._space = SearchSpace(resnet_choices(self.config))
        return self._space

    def activate(self, subnet: Subnet) -> None:
        """Put a subnet in force.

        Raises:
            InvalidSubnetError: A value that the network was not built with; nothing changes then.
        """
        self._check(subnet)
        config, parts = self.config, [self.stem, self.stem_end, *self.stages]
        widths: list[Any] = [subnet[f"w.{i}"] for i in range(len(parts))]
        outs = [config.at(i, w) for i, w in enumerate(widths)]
        stem: Any = self.stem
        stem.active_depth = 2 if subnet["d.0"] == max(config.depths) else 1
        end: Any = self.stem_end
        for conv, out in ((stem[0][0], outs[0]), (stem[1].body[0], outs[0]), (end[0], outs[1])):
            conv.active_out = out
        stages: list[Any] = [*self.stages]
        for s, (stage, out) in enumerate(zip(stages, outs[2:], strict=True)):
            extra: Any = subnet[f"d.{s + 1}"]
            stage.active_depth = config.base_depths[s] + extra
            for i, block in zip(config.numbers[s], stage, strict=True):
                expansion: Any = subnet[f"e.{i}"]
                mid = config.mid(out, expansion)
                block.conv1[0].active_out = block.conv2[0].active_out = mid
                block.conv3[0].active_out = out
                if block.downsample is not None:
                    block.downsample[1].active_out = out
        if config.resolutions:
            pixels: Any = subnet["r"]
            self.resolution = pixels

    def _check(self, subnet: Subnet) -> None:
        """Refuse values that the network was not built with; only blocks that exist count."""
        config = self.config
        check_names(type(self).__name__, self.search_space(), subnet)
        check_value(subnet, "d.0", config.depths)
        for s, numbers in enumerate(config.numbers):
            check_value(subnet, f"d.{s + 1}", config.depths)
            extra: Any = subnet[f"d.{s + 1}"]
            for i in numbers[: config.base_depths[s] + extra]:
                check_value(subnet, f"e.{i}", config.expansions)
        for i in range(len(config.widths) + 2):
            check_value(subnet, f"w.{i}", config.width_mults)
        if config.resolutions:
            check_value(subnet, "r", config.resolutions)

    def exact_measures(self, example_input: Any = None) -> list[Measure]:
        """Return `macs`, `params` and `size_mb` as tables over blocks, for thousands of subnets.

        `size_mb` counts parameters and buffers in their types, in 10^6 bytes.

        Args:
            example_input: What `macs` is for: images, which are resized if there is a resolution.
                None: one image of `image_size`.
        """
        config, dtype = self.config, next(self.parameters()).dtype
        n, size = 1, (config.image_size, config.image_size)
        if example_input is not None:
            n, size = image_size(self, example_input)
        pixels = [(r, r) for r in config.resolutions] or [size]
        with torch.device("meta"):  # shapes are all that is needed
            tables = resnet_tables(config, pixels, dtype)
        for _, table in tables:
            table[..., 0] *= n
        units = (("macs", "MAC"), ("params", ""), ("size_mb", "MB"))
        by_resolution = ("r",) if config.resolutions else ()
        return [
            additive_measure(
                name,
                self.search_space(),
                [
                    Term((*names, *by_resolution), (t if by_resolution else t[..., 0, :])[..., at])
                    for names, t in tables
                ],
                unit=unit,
            )
            for at, (name, unit) in enumerate(units)
        ]

    def sortable_channels(self, keep: Values) -> list[Channels]:
        """Return all channels but those of images and classes, for `sort_channels`."""
        config, values = self.config, dict[str, Any](keep)
        stem: Any = self.stem
        end: Any = self.stem_end
        parts: list[Any] = [*self.stages]  # sequences of blocks
        stages = [[*part] for part in parts]
        first = [[b[0].conv1[0], b[0].downsample[1]] for b in stages]
        # What shortcuts add up are the same channels: the layers that write them and that read them
        streams: list[Any] = [
            ([*stem[0][:2], *stem[1].body[:2]], [stem[1].body[0], end[0]]),
            (end[:2], first[0]),
        ]
        for blocks, following in zip(stages, [*first[1:], [self.classifier]], strict=True):
            writes = [*blocks[0].downsample[1:], *(layer for b in blocks for layer in b.conv3)]
            streams.append((writes, [*(b.conv1[0] for b in blocks[1:]), *following]))
        groups = []
        for i, (writes, reads) in enumerate(streams):
            widths = [config.at(i, w) for w in values[f"w.{i}"]]
            groups.append(Channels([*outputs(*writes), *inputs(*reads)], inputs(*reads), widths))
        for s, (numbers, blocks) in enumerate(zip(config.numbers, stages, strict=True)):
            outs = [config.at(s + 2, w) for w in values[f"w.{s + 2}"]]
            for i, block in zip(numbers, blocks, strict=True):
                mids = [config.mid(out, e) for out in outs for e in values[f"e.{i}"]]
                groups += bottleneck_channels(block, mids)
        return groups

    def extract(self, subnet: Subnet) -> ResNet:
        """Return a subnet as an ordinary network with a copy of its weights."""
        config, values = self.config, subnet.grouped()
        depths = [base + d for base, d in zip(config.base_depths, values["d"][1:], strict=True)]
        with torch.device("meta"):  # no initial weights to draw and throw away
            plain = ResNet(
                config,
                [
                    [values["e"][i] for i in numbers[:depth]]
                    for numbers, depth in zip(config.numbers, depths, strict=True)
                ],
                values["w"],
                residual_stem=values["d"][0] == max(config.depths),
                resolution=values.get("r"),
            )
        size = config.image_size
        image = next(self.parameters()).new_zeros(1, config.in_channels, size, size)
        with activated(self, subnet):
            plain.load_state_dict(plain_state(self, image), assign=True)
        return with_settings(plain, self)
