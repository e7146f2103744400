# SPDX-License-Identifier: Apache-2.0
"""The elastic encoder-decoder Transformer of HAT, from machine translation to a few words."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet.elasticity.attention import length_of
from lightning_subnet.elasticity.protocol import SubnetMixin
from lightning_subnet.elasticity.sorting import Channels, Values
from lightning_subnet.space.choices import Choice
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure
from lightning_subnet.supernets._blocks.transformer_config import (
    TransformerConfig,
    TransformerShape,
)
from lightning_subnet.supernets._blocks.transformer_layer import (
    ELASTIC,
    PLAIN,
    Costs,
    Kit,
    LayerCache,
    TransformerLayer,
    check_tokens,
    copy_slices,
    feed_channels,
    layer_choices,
    layer_params,
    resize,
    sinusoid,
    subnet_in,
    table_measures,
)
from lightning_subnet.supernets.decoding import beam_search, decode


class Memory:
    """The encoder's outputs for a batch: those of its last layers, and where padding is.

    Args:
        states: Outputs (n, s, channels) of the last layers, the last one last.
        padding: (n, s), true at padding.
    """

    def __init__(self, states: list[torch.Tensor], padding: torch.Tensor) -> None:
        self.states, self.padding = states, padding
        self._sequences: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def last(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last n outputs one behind the other, (batch, n * s, channels), and padding."""
        if n not in self._sequences:
            self._sequences[n] = torch.cat(self.states[-n:], 1), self.padding.repeat(1, n)
        return self._sequences[n]

    def repeat(self, n: int) -> Memory:
        """Return the memory with each row n times in a block."""
        states = [state.repeat_interleave(n, 0) for state in self.states]
        return Memory(states, self.padding.repeat_interleave(n, 0))


class _Trunk(nn.Module):
    """Encoder and decoder of elastic or plain layers; the output layer is the target's table."""

    def __init__(self, config: TransformerConfig, shape: TransformerShape, kit: Kit) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        widest = max(*config.enc_embed, *config.dec_embed)
        separate = config.source_vocab is not None
        width = shape.dec_embed if separate else max(shape.enc_embed, shape.dec_embed)
        self.target = kit.embedding(config.vocab, width, padding_idx=config.pad)
        tables = [self.target]
        self.source: nn.Embedding | None = None
        if config.source_vocab is not None:
            self.source = kit.embedding(
                config.source_vocab, shape.enc_embed, padding_idx=config.pad
            )
            tables.append(self.source)
        for table in tables:
            nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)
            with torch.no_grad():
                table.weight[config.pad].zero_()
        self.register_buffer("positions", sinusoid(config.max_length, widest), persistent=False)
        self.encoder = nn.ModuleList(TransformerLayer(kit, s, config.style) for s in shape.encoder)
        self.decoder = nn.ModuleList(TransformerLayer(kit, s, config.style) for s in shape.decoder)
        if config.norm_first:
            self.encoder_norm = kit.norm(shape.enc_embed)
            self.decoder_norm = kit.norm(shape.dec_embed)
        self.dropout = nn.Dropout(config.dropout)

    def _embed(
        self, table: nn.Embedding, tokens: torch.Tensor, dim: int, start: int = 0
    ) -> torch.Tensor:
        positions: Any = self.positions
        end = start + length_of(tokens, 1)
        x = table(tokens)[..., :dim] * math.sqrt(dim) + positions[start:end, :dim]
        y: torch.Tensor = self.dropout(x)
        return y

    def encode(self, source: torch.Tensor) -> Memory:
        """Return the memory of source tokens (n, s)."""
        check_tokens(source, self.config.max_length)
        padding = source == self.config.pad
        table = self.target if self.source is None else self.source
        x = self._embed(table, source, self.shape.enc_embed)
        states = []
        for layer, _ in zip(self.encoder, self.shape.encoder, strict=False):
            x = layer(x, padding=padding)
            states.append(x)
        states = states[-max(self.shape.attend) :]
        if self.config.norm_first:
            states = [self.encoder_norm(state) for state in states]
        return Memory(states, padding)

    def decode(
        self, target: torch.Tensor, memory: Memory, caches: list[LayerCache] | None = None
    ) -> torch.Tensor:
        """Return the logits of the token behind each position.

        Args:
            target: Target tokens (n, t), which begin with `bos`; with caches, those that are new.
            memory: The memory that `encode` returned.
            caches: Those that `caches()` returned; each call extends them.

        Returns:
            (n, t, vocab).
        """
        start = 0 if caches is None else len(caches[0].past)
        check_tokens(target, self.config.max_length - start)
        x = self._embed(self.target, target, self.shape.dec_embed, start)
        for i, (layer, attend) in enumerate(zip(self.decoder, self.shape.attend, strict=False)):
            states, padding = memory.last(attend)
            cache = None if caches is None else caches[i]
            x = layer(x, causal=True, memory=states, memory_padding=padding, cache=cache)
        if self.config.norm_first:
            x = self.decoder_norm(x)
        return F.linear(x, self.target.weight[:, : self.shape.dec_embed])

    def caches(self) -> list[LayerCache]:
        """Return empty caches, one for each decoder layer."""
        return [LayerCache() for _ in self.shape.decoder]

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return logits (n, t, vocab) of source tokens (n, s) and target tokens (n, t)."""
        return self.decode(target, self.encode(source))

    @torch.no_grad()
    def generate(
        self, source: torch.Tensor, n_steps: int | None = None, *, stop: bool = True
    ) -> torch.Tensor:
        """Decode greedily, with a cache; put the network in eval mode before.

        Args:
            source: Source tokens (n, s).
            n_steps: The most tokens; None: `target_length`.
            stop: Whether `eos` ends a sequence.

        Returns:
            Target tokens without `bos`, (n, at most n_steps), with `pad` behind `eos`.
        """
        memory, caches, config = self.encode(source), self.caches(), self.config
        return decode(
            lambda new: self.decode(new, memory, caches)[:, -1],
            source.new_full((len(source), 1), config.bos),
            config.target_length if n_steps is None else n_steps,
            stop=config.eos if stop else None,
            pad=config.pad,
        )

    @torch.no_grad()
    def beam(
        self,
        source: torch.Tensor,
        n_steps: int | None = None,
        *,
        beam: int = 4,
        length_penalty: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode by beam search, with a cache; put the network in eval mode before.

        Args:
            source: Source tokens (n, s).
            n_steps: The most tokens; None: `target_length`.
            beam: How many sequences go on in each step.
            length_penalty: The power of its length that the score of a sequence is divided by.

        Returns:
            Target tokens without `bos`, (n, at most n_steps), with `pad` behind `eos`; and scores
            (n,), as in `decoding.beam_search`.
        """
        memory, caches, config = self.encode(source).repeat(beam), self.caches(), self.config

        def reorder(rows: torch.Tensor) -> None:
            for cache in caches:  # the memory is the same for all of a beam
                cache.past.reorder(rows)

        return beam_search(
            lambda new: self.decode(new, memory, caches)[:, -1],
            reorder,
            source.new_full((len(source), 1), config.bos),
            config.target_length if n_steps is None else n_steps,
            beam=beam,
            stop=config.eos,
            pad=config.pad,
            length_penalty=length_penalty,
        )


class Transformer(_Trunk):
    """One subnet as an ordinary network.

    Args:
        config: The sizes of the super-network that it comes from.
        shape: Its own.
    """

    def __init__(self, config: TransformerConfig, shape: TransformerShape) -> None:
        super().__init__(config, shape, PLAIN)


class ElasticTransformer(SubnetMixin, _Trunk):
    """The super-network: embeddings, depths, and of every layer the heads and the feed-forward.

    The choices are `enc_embed`, `dec_embed`, `enc_depth`, `dec_depth`; `enc_ffn.<i>` and
    `enc_heads.<i>` of encoder layers; `dec_ffn.<i>`, `dec_heads.<i>`, `cross_heads.<i>` and
    `attend.<i>` (to how many of the last encoder layers it attends) of decoder layers. A layer's
    choices exist only while the network is deep enough. At its defaults the space is HAT's.

    Args:
        config: The sizes.

    References:
        Wang et al., HAT: Hardware-Aware Transformers for Efficient Natural Language Processing, ACL
        2020, sections 2.1 (arbitrary encoder-decoder attention, heterogeneous layers) and 4.1.

    Example:
        >>> net = ElasticTransformer.tiny().eval()
        >>> net.activate(net.search_space().smallest)
        >>> source, target = torch.randint(3, 20, (2, 6)), torch.ones(2, 1, dtype=torch.long)
        >>> net(source, target).shape, net.generate(source, 5, stop=False).shape
        (torch.Size([2, 1, 20]), torch.Size([2, 5]))
    """

    _space: SearchSpace | None = None

    def __init__(self, config: TransformerConfig | None = None) -> None:
        config = config or TransformerConfig()
        super().__init__(config, config.whole, ELASTIC)

    @classmethod
    def tiny(cls, **changes: Any) -> ElasticTransformer:
        """Return a size for tests: a vocabulary of 20, at most 2 and 3 layers."""
        sizes: dict[str, Any] = {"vocab": 20, "max_length": 16, "qkv": 16, "norm_first": True}
        sizes |= {"source_length": 7, "target_length": 9, "enc_embed": (16, 24), "heads": (2, 4)}
        sizes |= {"dec_embed": (16, 24), "enc_depths": (2,), "dec_depths": (1, 2, 3)}
        sizes |= {"ffn": (16, 32, 48), "attend": (1, 2), "dropout": 0.0}
        return cls(TransformerConfig(**{**sizes, **changes}))

    @classmethod
    def small(cls, **changes: Any) -> ElasticTransformer:
        """Return a size for short sentences and a CPU: 3 encoder and 1 to 3 decoder layers."""
        sizes: dict[str, Any] = {"vocab": 4000, "max_length": 128, "qkv": 96, "norm_first": True}
        sizes |= {"source_length": 16, "target_length": 16, "enc_embed": (64, 96)}
        sizes |= {"dec_embed": (64, 96), "enc_depths": (3,), "dec_depths": (1, 2, 3)}
        sizes |= {"ffn": (96, 192, 288), "heads": (2, 4)}
        return cls(TransformerConfig(**{**sizes, **changes}))

    @classmethod
    def hat_wmt14(cls, **changes: Any) -> ElasticTransformer:
        """Return HAT's size for WMT14 English-German, which is that of the defaults."""
        return cls(TransformerConfig(**changes))

    def search_space(self) -> SearchSpace:
        """Return the space: embeddings and depths first, as the layers exist under them."""
        if self._space is None:
            config = self.config
            encoder = {"enc_ffn": config.ffn, "enc_heads": config.heads}
            decoder = {"dec_ffn": config.ffn, "dec_heads": config.heads}
            decoder |= {"cross_heads": config.heads, "attend": config.attend}
            self._space = SearchSpace(
                {
                    "enc_embed": Choice(config.enc_embed),
                    "dec_embed": Choice(config.dec_embed),
                    "enc_depth": Choice(config.enc_depths),
                    "dec_depth": Choice(config.dec_depths),
                    **layer_choices("enc_depth", config.enc_depths, encoder),
                    **layer_choices("dec_depth", config.dec_depths, decoder),
                }
            )
        return self._space

    def activate(self, subnet: Subnet) -> None:
        """Put a subnet in force.

        Raises:
            InvalidSubnetError: A value that the network was not built with; nothing changes then.
        """
        shape = self.config.shape(subnet_in(self.search_space(), subnet))
        self.shape = shape
        for layers, specs in ((self.encoder, shape.encoder), (self.decoder, shape.decoder)):
            for layer, spec in zip(layers, specs, strict=False):
                resize(layer, spec)

    def exact_measures(self) -> list[Measure]:
        """Return `macs`, `params` and `size_mb` as tables over layers, for thousands of subnets.

        `macs` is for one pair of `source_length` and `target_length` tokens in one forward pass, as
        in training; `count_macs(Decoding(...), source)` counts a decoding token by token. Shared
        embeddings count once, with as many dimensions as the wider of encoder and decoder has.
        """
        config = self.config
        s, t, normed = config.source_length, config.target_length, config.norm_first
        heads = config.heads[0]  # of no influence, as all of them divide the same channels

        def encoder_layer(dim: int, ffn: int) -> Costs:
            spec = config.encoder_layer(dim, ffn, heads)
            return spec.macs(s), layer_params(spec)

        def decoder_layer(dim: int, memory: int, ffn: int, attend: int) -> Costs:
            spec = config.decoder_layer(dim, memory, ffn, heads, heads)
            return spec.macs(t, attend * s), layer_params(spec)

        def ends(enc: int, dec: int) -> Costs:
            wide = max(enc, dec) if config.source_vocab is None else dec
            tables = config.vocab * wide + (config.source_vocab or 0) * enc
            return t * dec * config.vocab, tables + normed * 2 * (enc + dec)

        parts: list[Any] = [(("enc_embed", "dec_embed"), ends)]
        parts += [
            (("enc_embed", f"enc_ffn.{i}"), encoder_layer) for i in range(max(config.enc_depths))
        ]
        parts += [
            (("dec_embed", "enc_embed", f"dec_ffn.{i}", f"attend.{i}"), decoder_layer)
            for i in range(max(config.dec_depths))
        ]
        return table_measures(self.search_space(), parts, (0, 0), self)

    def sortable_channels(self, keep: Values) -> list[Channels]:
        """Return the feed-forward channels of all layers, for `sort_channels`.

        Heads divide the same channels anew, so that these have no order.
        """
        values = dict[str, Any](keep)
        parts = (("enc_ffn", self.encoder), ("dec_ffn", self.decoder))
        return [
            feed_channels(layer, values[f"{name}.{i}"])
            for name, layers in parts
            for i, layer in enumerate(layers)
        ]

    def extract(self, subnet: Subnet) -> Transformer:
        """Return a subnet as an ordinary network with a copy of its weights."""
        shape = self.config.shape(subnet_in(self.search_space(), subnet))
        with torch.device("meta"):
            plain = Transformer(self.config, shape)
        positions: Any = self.positions
        plain.positions = positions.clone()
        return copy_slices(plain, self)
