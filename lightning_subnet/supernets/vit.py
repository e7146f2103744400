# SPDX-License-Identifier: Apache-2.0
"""The elastic Vision Transformer: depth, and heads and feed-forward channels of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_subnet.elasticity.attention import length_of
from lightning_subnet.elasticity.protocol import SubnetMixin
from lightning_subnet.elasticity.sorting import Channels, Values
from lightning_subnet.errors import ElasticityError, SpaceError
from lightning_subnet.space.choices import Choice
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure
from lightning_subnet.supernets._blocks.input_sizes import image_size
from lightning_subnet.supernets._blocks.transformer_layer import (
    ELASTIC,
    PLAIN,
    Costs,
    Kit,
    LayerSpec,
    Style,
    TransformerLayer,
    check_positive,
    copy_slices,
    feed_channels,
    head_channels,
    layer_choices,
    layer_params,
    resize,
    subnet_in,
    table_measures,
)


@dataclass(frozen=True)
class ViTConfig:
    """The sizes of an elastic Vision Transformer; the defaults are those of ViT-B/16.

    Args:
        n_classes: Outputs.
        in_channels: Channels of the images.
        image_size: Their height and width in pixels: one number for both, or the pair.
        patch_size: Height and width of a patch, which divides those of the images.
        embed: The embedding dimension.
        head_dim: Channels of one head; queries have `head_dim` times as many channels as heads.
        depths: Numbers of layers.
        heads: Heads that a layer may have.
        ffn: Channels inside the feed-forward part that a layer may have.
        dropout: Of attention weights, of the feed-forward part and of what is added.

    Raises:
        SpaceError: The sizes do not fit together.
    """

    n_classes: int = 1000
    in_channels: int = 3
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    embed: int = 768
    head_dim: int = 64
    depths: tuple[int, ...] = (10, 11, 12)
    heads: tuple[int, ...] = (6, 8, 10, 12)
    ffn: tuple[int, ...] = (1024, 2048, 3072)
    dropout: float = 0.0
    style: Style = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = ["n_classes", "in_channels", "patch_size", "embed", "head_dim"]
        names += ["depths", "heads", "ffn"]
        check_positive(**{name: getattr(self, name) for name in names})
        sides = self.image
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides)
        if not whole or len(sides) != 2:  # noqa: PLR2004 - height and width
            msg = f"image_size={self.image_size!r} must be a positive integer, or a pair of them."
            raise SpaceError(msg)
        if any(pixels % self.patch_size for pixels in sides):
            msg = (
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}. "
                "Take a divisor, so that patches cover the image."
            )
            raise SpaceError(msg)
        object.__setattr__(self, "style", Style(dropout=self.dropout))

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the images."""
        size: Any = self.image_size
        return tuple(size) if isinstance(size, tuple | list) else (size, size)

    @property
    def tokens(self) -> int:
        """Patches of an image, and one for the class."""
        height, width = self.image
        return (height // self.patch_size) * (width // self.patch_size) + 1

    def layer(self, heads: int, ffn: int) -> LayerSpec:
        """Return the sizes of a layer."""
        return LayerSpec(self.embed, heads, ffn, heads * self.head_dim)

    def shape(self, values: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
        """Return the layers of a subnet, from its values by name."""
        return tuple(
            self.layer(values[f"heads.{i}"], values[f"ffn.{i}"]) for i in range(values["depth"])
        )


class _Trunk(nn.Module):
    """Patches, elastic or plain layers, and a linear classifier of the first token."""

    def __init__(self, config: ViTConfig, shape: tuple[LayerSpec, ...], kit: Kit) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        patch = config.patch_size
        self.patches = nn.Conv2d(config.in_channels, config.embed, patch, patch)
        self.first = nn.Parameter(torch.zeros(1, 1, config.embed))
        self.positions = nn.Parameter(0.02 * torch.randn(1, config.tokens, config.embed))
        self.layers = nn.ModuleList(TransformerLayer(kit, s, config.style) for s in shape)
        self.norm = nn.LayerNorm(config.embed)
        self.classifier = nn.Linear(config.embed, config.n_classes)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, n_classes) of images (n, in_channels, height, width).

        Raises:
            ElasticityError: The images are of another size than the positions, or not a batch.
        """
        self._check(x)
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.dropout(x)
        for layer, _ in zip(self.layers, self.shape, strict=False):
            x = layer(x)
        logits: torch.Tensor = self.classifier(self.norm(x[:, 0]))
        return logits

    def _check(self, x: torch.Tensor) -> None:
        """Refuse images of another size: as many patches in another shape would run."""
        expected = (self.config.in_channels, *self.config.image)
        given = tuple(length_of(x, i) for i in range(1, x.ndim))
        if given != expected:
            msg = (
                f"Images are {('n', *given)}, but this network is made for {('n', *expected)}. "
                "Resize them, or build the network with their image_size and in_channels."
            ).replace("'n'", "n")
            raise ElasticityError(msg)


class ViT(_Trunk):
    """One subnet as an ordinary network.

    Args:
        config: The sizes of the super-network that it comes from.
        shape: Its layers.
    """

    def __init__(self, config: ViTConfig, shape: tuple[LayerSpec, ...]) -> None:
        super().__init__(config, shape, PLAIN)


class ElasticViT(SubnetMixin, _Trunk):
    """The super-network: depth; of every layer the heads and the feed-forward channels.

    The choices are `depth`, and `heads.<i>` and `ffn.<i>` of each layer, which exist only while the
    network is deep enough. A head keeps its channels, so fewer heads are a narrower attention.

    Args:
        config: The sizes.

    References:
        Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021 (ViT-B/16); Sridhar et al.,
        DyNAS, arXiv:2202.12934 (the space).

    Example:
        >>> net = ElasticViT.small()
        >>> net.activate(net.search_space().smallest)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    _space: SearchSpace | None = None

    def __init__(self, config: ViTConfig | None = None) -> None:
        config = config or ViTConfig()
        whole = (config.layer(max(config.heads), max(config.ffn)),) * max(config.depths)
        super().__init__(config, whole, ELASTIC)

    @classmethod
    def tiny(cls, **changes: Any) -> ElasticViT:
        """Return the size for one-channel images of 8 x 8 pixels."""
        sizes: dict[str, Any] = {"n_classes": 10, "in_channels": 1, "image_size": 8}
        sizes |= {"patch_size": 2, "embed": 32, "head_dim": 8, "depths": (1, 2, 3)}
        sizes |= {"heads": (1, 2, 4), "ffn": (16, 32, 64)}
        return cls(ViTConfig(**{**sizes, **changes}))

    @classmethod
    def small(cls, **changes: Any) -> ElasticViT:
        """Return the size for images of 32 x 32 pixels, in patches of 4 x 4."""
        sizes: dict[str, Any] = {"n_classes": 10, "image_size": 32, "patch_size": 4, "embed": 128}
        sizes |= {"head_dim": 32, "depths": (3, 4, 5, 6), "heads": (2, 3, 4)}
        sizes |= {"ffn": (128, 256, 384), "dropout": 0.1}
        return cls(ViTConfig(**{**sizes, **changes}))

    def search_space(self) -> SearchSpace:
        """Return the space: the depth first, as the layers exist under it."""
        if self._space is None:
            config = self.config
            layers = {"heads": config.heads, "ffn": config.ffn}
            self._space = SearchSpace(
                {
                    "depth": Choice(config.depths),
                    **layer_choices("depth", config.depths, layers),
                }
            )
        return self._space

    def activate(self, subnet: Subnet) -> None:
        """Put a subnet in force.

        Raises:
            InvalidSubnetError: A value that the network was not built with; nothing changes then.
        """
        self.shape = self.config.shape(subnet_in(self.search_space(), subnet))
        for layer, spec in zip(self.layers, self.shape, strict=False):
            resize(layer, spec)

    def exact_measures(self, example_input: Any = None) -> list[Measure]:
        """Return `macs`, `params` and `size_mb` as tables over layers, for thousands of subnets.

        Args:
            example_input: What `macs` is for: images of `image_size`. None: one of them.
        """
        config, n = self.config, 1
        if example_input is not None:
            n, _ = image_size(self, example_input)

        def layer(heads: int, ffn: int) -> Costs:
            spec = config.layer(heads, ffn)
            return spec.macs(config.tokens), layer_params(spec)

        patch = config.in_channels * config.patch_size**2 * config.embed
        classes = config.embed * config.n_classes
        tokens = (config.tokens + 1) * config.embed  # positions, and the class token
        macs = (config.tokens - 1) * patch + classes
        params = patch + config.embed + tokens + 2 * config.embed + classes + config.n_classes
        parts = [((f"heads.{i}", f"ffn.{i}"), layer) for i in range(max(config.depths))]
        return table_measures(self.search_space(), parts, (macs, params), self, rows=n)

    def sortable_channels(self, keep: Values) -> list[Channels]:
        """Return feed-forward channels and heads of all layers, for `sort_channels`."""
        values, groups = dict[str, Any](keep), []
        for i, layer in enumerate(self.layers):
            groups.append(feed_channels(layer, values[f"ffn.{i}"]))
            groups.append(head_channels(layer, self.config.head_dim, values[f"heads.{i}"]))
        return groups

    def extract(self, subnet: Subnet) -> ViT:
        """Return a subnet as an ordinary network with a copy of its weights."""
        shape = self.config.shape(subnet_in(self.search_space(), subnet))
        with torch.device("meta"):
            plain = ViT(self.config, shape)
        return copy_slices(plain, self)
