# SPDX-License-Identifier: Apache-2.0
"""The elastic decoder-only Transformer: a GPT of which embedding, depth and every layer vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet.elasticity.attention import length_of
from lightning_subnet.elasticity.protocol import SubnetMixin
from lightning_subnet.elasticity.sorting import Channels, Values
from lightning_subnet.errors import ElasticityError, SpaceError
from lightning_subnet.space.choices import Choice
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure
from lightning_subnet.supernets._blocks.input_sizes import token_sizes
from lightning_subnet.supernets._blocks.transformer_layer import (
    ELASTIC,
    PLAIN,
    Costs,
    Kit,
    LayerCache,
    LayerSpec,
    Style,
    TransformerLayer,
    check_divides,
    check_positive,
    check_tokens,
    copy_slices,
    feed_channels,
    head_channels,
    layer_choices,
    layer_params,
    look_up,
    resize,
    subnet_in,
    table_measures,
)
from lightning_subnet.supernets.decoding import decode, sampler


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of an elastic GPT; the defaults are those of HW-GPT-Bench's small one.

    Args:
        vocab: Tokens.
        context: The most positions; `macs` is for so many where no input is given.
        embed: Embedding dimensions.
        depths: Numbers of layers.
        heads: Heads of the queries that a layer may have.
        head_dim: Channels of one head, so that fewer heads are a narrower attention. None: the
            heads divide the embedding among them, so each number of heads divides each embedding.
        kv_heads: Heads of keys and values that a layer may have (grouped queries), each a divisor
            of all `heads`. Empty: as many as of queries, and no choice.
        mlp_ratios: Channels inside a feed-forward part, as multiples of the embedding.
        bias: Whether linear layers have biases; of two values, a choice for all of them.
        dropout: Of attention weights, of the feed-forward part and of what is added.

    Raises:
        SpaceError: The sizes do not fit together.

    References:
        Sukthanker et al., HW-GPT-Bench, NeurIPS 2024, section 3 (the space of GPT-S).
    """

    vocab: int = 50_257
    context: int = 1024
    embed: tuple[int, ...] = (192, 384, 768)
    depths: tuple[int, ...] = (10, 11, 12)
    heads: tuple[int, ...] = (4, 8, 12)
    head_dim: int | None = 64
    kv_heads: tuple[int, ...] = ()
    mlp_ratios: tuple[int, ...] = (2, 3, 4)
    bias: tuple[bool, ...] = (False, True)
    dropout: float = 0.0
    style: Style = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = ("vocab", "context", "embed", "depths", "heads", "mlp_ratios")
        check_positive(**{name: getattr(self, name) for name in names})
        if self.head_dim is None:
            check_divides("heads", self.heads, "embed", self.embed)
        else:
            check_positive(head_dim=self.head_dim)
        if self.kv_heads:
            check_positive(kv_heads=self.kv_heads)
            check_divides("kv_heads", self.kv_heads, "heads", self.heads)
        if self.bias not in ((False, True), (False,), (True,)):
            msg = f"bias={self.bias!r} must be (False, True), (False,) or (True,)."
            raise SpaceError(msg)
        object.__setattr__(self, "style", Style(dropout=self.dropout))

    def layer(self, embed: int, heads: int, kv_heads: int, ratio: int, bias: bool) -> LayerSpec:
        """Return the sizes of a layer; `kv_heads=0`: as many as heads."""
        qkv = embed if self.head_dim is None else heads * self.head_dim
        return LayerSpec(embed, heads, ratio * embed, qkv, kv_heads=kv_heads, bias=bias)

    def shape(self, values: Mapping[str, Any]) -> GPTShape:
        """Return the sizes of a subnet, from its values by name."""
        return GPTShape(
            values["embed"],
            tuple(
                self.layer(
                    values["embed"],
                    values[f"heads.{i}"],
                    values[f"kv_heads.{i}"] if self.kv_heads else 0,
                    values[f"mlp.{i}"],
                    values["bias"],
                )
                for i in range(values["depth"])
            ),
        )

    @property
    def whole(self) -> GPTShape:
        """The sizes that all subnets are slices of."""
        embed, kv = max(self.embed), max(self.kv_heads, default=0)
        # Channels of keys and values are most where heads are widest, and that of queries where
        # heads of a width of their own are most.
        heads = min(self.heads) if self.head_dim is None else max(self.heads)
        layer = self.layer(embed, heads, kv, max(self.mlp_ratios), any(self.bias))
        return GPTShape(embed, (layer,) * max(self.depths))


@dataclass(frozen=True, slots=True)
class GPTShape:
    """The sizes of one subnet.

    Args:
        embed: The embedding dimension.
        layers: The sizes of the layers.
    """

    embed: int
    layers: tuple[LayerSpec, ...]


class _Trunk(nn.Module):
    """Tables, elastic or plain layers, and the table of tokens again as output layer."""

    def __init__(self, config: GPTConfig, shape: GPTShape, kit: Kit) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.tokens = kit.embedding(config.vocab, shape.embed)
        self.positions = kit.embedding(config.context, shape.embed)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=shape.embed**-0.5)
        self.layers = nn.ModuleList(TransformerLayer(kit, s, config.style) for s in shape.layers)
        self.norm = kit.norm(shape.embed)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: torch.Tensor, caches: list[LayerCache] | None = None) -> torch.Tensor:
        """Return the logits of the token behind each position.

        Args:
            tokens: (n, t); with caches, those that are new.
            caches: Those that `caches()` returned; each call extends them.

        Returns:
            (n, t, vocab).
        """
        start = 0 if caches is None else len(caches[0].past)
        check_tokens(tokens, self.config.context, start)
        at = torch.arange(start, start + length_of(tokens, 1), device=tokens.device)
        x = self.dropout(look_up(self.tokens, tokens) + self.positions(at))
        for i, (layer, _) in enumerate(zip(self.layers, self.shape.layers, strict=False)):
            x = layer(x, causal=True, cache=None if caches is None else caches[i])
        return F.linear(self.norm(x), self.tokens.weight[:, : self.shape.embed])

    def caches(self) -> list[LayerCache]:
        """Return empty caches, one for each layer."""
        return [LayerCache() for _ in self.shape.layers]

    @torch.no_grad()
    def generate(
        self,
        prompt: torch.Tensor,
        n_steps: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop: int | bool = False,
    ) -> torch.Tensor:
        """Go on from a prompt, with a cache; put the network in eval mode before.

        Args:
            prompt: Tokens (n, t).
            n_steps: Tokens to add; with the prompt no more than `context` and one.
            temperature: 0 takes the likeliest token, 1 draws by probability.
            generator: Where the randomness comes from; None: torch's own.
            stop: A token that ends a sequence; False: none does.

        Returns:
            The new tokens (n, n_steps), or fewer if all sequences have ended.

        Raises:
            ElasticityError: There are more tokens than positions, or no step.
        """
        longest = self.config.context + 1 - n_steps
        if prompt.ndim == 2 and prompt.shape[1] > longest:  # noqa: PLR2004 - rows and positions
            msg = (
                f"{prompt.shape[1]} tokens and {n_steps} more need more than the "
                f"{self.config.context} positions of this network. "
                f"Keep the last {max(longest, 0)} of the prompt, or take fewer steps."
            )
            raise ElasticityError(msg)
        caches = self.caches()
        return decode(
            lambda new: self(new, caches)[:, -1],
            prompt,
            n_steps,
            pick=sampler(temperature, generator),
            stop=None if stop is False else int(stop),
        )


class GPT(_Trunk):
    """One subnet as an ordinary network.

    Args:
        config: The sizes of the super-network that it comes from.
        shape: Its own.
    """

    def __init__(self, config: GPTConfig, shape: GPTShape) -> None:
        super().__init__(config, shape, PLAIN)


class ElasticGPT(SubnetMixin, _Trunk):
    """The super-network: embedding, depth and bias; of every layer the heads and the MLP ratio.

    The choices are `embed`, `depth`, `bias`, and `heads.<i>`, `kv_heads.<i>` (with grouped queries)
    and `mlp.<i>` of each layer, which exist only while the network is deep enough.

    Args:
        config: The sizes.

    References:
        Sukthanker et al., HW-GPT-Bench, NeurIPS 2024; Ainslie et al., GQA, EMNLP 2023.

    Example:
        >>> net = ElasticGPT.tiny(vocab=30).eval()
        >>> net.activate(net.search_space().smallest)
        >>> prompt = torch.randint(30, (2, 5))
        >>> net(prompt).shape, net.generate(prompt, 4).shape
        (torch.Size([2, 5, 30]), torch.Size([2, 4]))
    """

    _space: SearchSpace | None = None

    def __init__(self, config: GPTConfig | None = None) -> None:
        config = config or GPTConfig()
        super().__init__(config, config.whole, ELASTIC)
        self.activate(self.search_space().largest)  # the room for keys and values may be wider

    @classmethod
    def tiny(cls, **changes: Any) -> ElasticGPT:
        """Return a size for the 65 characters of tinyshakespeare, 64 at a time, on a CPU."""
        sizes: dict[str, Any] = {"vocab": 65, "context": 64, "embed": (48, 72, 96)}
        sizes |= {
            "head_dim": None,
            "depths": (2, 3, 4),
            "heads": (2, 4),
            "kv_heads": (1, 2),
            "mlp_ratios": (1, 2, 4),
        }
        return cls(GPTConfig(**{**sizes, **changes}))

    def search_space(self) -> SearchSpace:
        """Return the space: embedding and depth first, as the layers exist under them."""
        if self._space is None:
            config = self.config
            layers = {"heads": config.heads, "kv_heads": config.kv_heads, "mlp": config.mlp_ratios}
            layers = {name: values for name, values in layers.items() if values}
            self._space = SearchSpace(
                {
                    "embed": Choice(config.embed),
                    "depth": Choice(config.depths),
                    "bias": Choice(config.bias),
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
        tables: list[Any] = [self.tokens, self.positions]
        for table in tables:
            table.active_out = self.shape.embed
        for layer, spec in zip(self.layers, self.shape.layers, strict=False):
            resize(layer, spec)

    def exact_measures(self, example_input: Any = None) -> list[Measure]:
        """Return `macs`, `params` and `size_mb` as tables over layers, for thousands of subnets.

        Args:
            example_input: What `macs` is for: tokens (n, t) in one forward pass, as in training.
                None: `context` tokens.
        """
        config, n = self.config, 1
        length = config.context
        if example_input is not None:
            ((n, length),) = token_sizes(self, example_input, 1)
        grouped = bool(config.kv_heads)

        def layer(embed: int, bias: bool, ratio: int, heads: int = 0, kv_heads: int = 0) -> Costs:
            spec = config.layer(embed, heads or config.heads[0], kv_heads, ratio, bias)
            return spec.macs(length), layer_params(spec)

        def ends(embed: int) -> Costs:
            tables = (config.vocab + config.context) * embed
            return length * embed * config.vocab, tables + 2 * embed

        parts: list[Any] = [(("embed",), ends)]
        for i in range(max(config.depths)):
            names = ["embed", "bias", f"mlp.{i}"]
            if grouped or config.head_dim is not None:  # else all heads cost the same
                names.append(f"heads.{i}")
            if grouped:
                names.append(f"kv_heads.{i}")
            parts.append((names, layer))
        return table_measures(self.search_space(), parts, (0, 0), self, rows=n)

    def sortable_channels(self, keep: Values) -> list[Channels]:
        """Return feed-forward channels, and heads if each keeps its own, for `sort_channels`.

        Grouped queries are regrouped when heads change, so that their heads have no order.
        """
        values, config, groups = dict[str, Any](keep), self.config, []
        for i, layer in enumerate(self.layers):
            widths = [ratio * n for n in values["embed"] for ratio in values[f"mlp.{i}"]]
            groups.append(feed_channels(layer, widths))
            if config.head_dim is not None and not config.kv_heads:
                groups.append(head_channels(layer, config.head_dim, values[f"heads.{i}"]))
        return groups

    def extract(self, subnet: Subnet) -> GPT:
        """Return a subnet as an ordinary network with a copy of its weights."""
        shape = self.config.shape(subnet_in(self.search_space(), subnet))
        with torch.device("meta"):
            plain = GPT(self.config, shape)
        return copy_slices(plain, self)
