# SPDX-License-Identifier: Apache-2.0
"""The elastic encoder-decoder Transformer of HAT, from machine translation to a few words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.elasticity.attention import length_of
from lightning_subnet.elasticity.protocol import SubnetMixin
from lightning_subnet.elasticity.sorting import Channels, Values
from lightning_subnet.errors import ElasticityError, SpaceError
from lightning_subnet.space.choices import Choice
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure
from lightning_subnet.supernets._blocks.hat import FAIRSEQ, HAT_TASKS, load_hat
from lightning_subnet.supernets._blocks.input_sizes import token_sizes
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
    fairseq_places,
    fairseq_sinusoid,
    feed_channels,
    layer_choices,
    layer_params,
    look_up,
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
    """Encoder and decoder of elastic or plain layers, tables, and an output layer."""

    def __init__(self, config: TransformerConfig, shape: TransformerShape, kit: Kit) -> None:
        super().__init__()
        self.config, self.shape = config, shape
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
        for name, places in _places(config).items():
            self.register_buffer(name, places, persistent=False)
        self.encoder = nn.ModuleList(TransformerLayer(kit, s, config.style) for s in shape.encoder)
        self.decoder = nn.ModuleList(TransformerLayer(kit, s, config.style) for s in shape.decoder)
        if config.norm_first:
            self.encoder_norm = kit.norm(shape.enc_embed)
            self.decoder_norm = kit.norm(shape.dec_embed)
        self.output: nn.Linear | None = None
        if not config.tied:
            self.output = kit.linear(shape.dec_embed, config.vocab, bias=False)
            nn.init.normal_(self.output.weight, std=shape.dec_embed**-0.5)
        self.dropout = nn.Dropout(config.dropout)

    def _embed(
        self, table: nn.Embedding, tokens: torch.Tensor, dim: int, places: Any, start: int | None
    ) -> torch.Tensor:
        """Return the vectors of tokens plus those of their places, which `places` has in rows.

        With a start, the number of tokens before, each token counts as one, as in fairseq's
        incremental decoding; without it fairseq's padding does not count.
        """
        counts = self.config.positions == "paper"
        if counts or start is not None:
            first = (start or 0) + (0 if counts else self.config.pad + 1)
            at = places[first : first + length_of(tokens, 1), :dim]
        else:
            at = F.embedding(fairseq_places(tokens, self.config.pad), places[:, :dim])
        x = look_up(table, tokens)[..., :dim] * math.sqrt(dim) + at
        y: torch.Tensor = self.dropout(x)
        return y

    def encode(self, source: torch.Tensor) -> Memory:
        """Return the memory of source tokens (n, s)."""
        check_tokens(source, self.config.max_length)
        padding = source == self.config.pad
        table = self.target if self.source is None else self.source
        x = self._embed(table, source, self.shape.enc_embed, self.positions, None)
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
        start = None if caches is None else len(caches[0].past)
        check_tokens(target, self.config.max_length, start or 0)
        if not torch._C._is_tracing() and target.shape[0] != memory.padding.shape[0]:
            msg = (
                f"The source has {memory.padding.shape[0]} sequences, and the target "
                f"{target.shape[0]}. Both are (n, length), of the same n."
            )
            raise ElasticityError(msg)
        places = getattr(self, "target_positions", self.positions)
        x = self._embed(self.target, target, self.shape.dec_embed, places, start)
        for i, (layer, attend) in enumerate(zip(self.decoder, self.shape.attend, strict=False)):
            states, padding = memory.last(attend)
            cache = None if caches is None else caches[i]
            x = layer(x, causal=True, memory=states, memory_padding=padding, cache=cache)
        if self.config.norm_first:
            x = self.decoder_norm(x)
        if self.output is not None:
            logits: torch.Tensor = self.output(x)
            return logits
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

    @classmethod
    def hat(cls, task: str, **changes: Any) -> ElasticTransformer:
        """Return the network that HAT's SuperTransformers of a task fit, for `load_hat`.

        Sizes and lists are those of its configurations; positions and special tokens are fairseq's:
        `pad=1`, and a target begins with the token that ends it, `bos=eos=2`.

        Args:
            task: `"wmt14.en-de"`, `"wmt14.en-fr"`, `"wmt19.en-de"` or `"iwslt14.de-en"`.
            changes: Of `TransformerConfig`. `vocab` is the length of the (joint) dictionary, 32,768
                in `"wmt14.en-de"`; for `"iwslt14.de-en"` it is the target's, and `source_vocab` is
                the source's.

        Raises:
            SpaceError: Another task, or its vocabulary is missing.

        Example:
            >>> with torch.device("meta"):
            ...     net = ElasticTransformer.hat("iwslt14.de-en", vocab=6632, source_vocab=8848)
            >>> net.config.ffn, net.config.tied
            ((512, 1024, 2048), False)

        References:
            `configs/<task>/supertransformer` of mit-han-lab/hardware-aware-transformers.
        """
        if task not in HAT_TASKS:
            msg = f"task={task!r} is not one of {listed(HAT_TASKS)}."
            raise SpaceError(msg + did_you_mean(task, HAT_TASKS))
        sizes = {**FAIRSEQ, **HAT_TASKS[task], **changes}
        if missing := [name for name in HAT_TASKS[task] if sizes[name] is None]:
            msg = (
                f"The sizes of {task} are without {listed(missing)}. Pass the lengths of the "
                "dictionaries that the checkpoint was trained with."
            )
            raise SpaceError(msg)
        return cls(TransformerConfig(**sizes))

    def load_hat(self, state: Mapping[str, Any]) -> None:
        """Load a SuperTransformer of HAT's own code, of the same size.

        Subnets then give the logits of HAT's: its choice of -1, 1 or 2 for
        `decoder_arbitrary_ende_attn` is 1, 2 or 3 for `attend`, and other choices have the same
        values in both.

        Args:
            state: The state dict of a `TransformerSuperModel`, or the checkpoint that holds it
                under `"model"`: `torch.load(path, map_location="cpu", weights_only=False)`, as it
                holds an `argparse.Namespace` too.

        Raises:
            SpaceError: It is of another network or size (the message has the first tensor and both
                shapes), or of a variant whose subnets would be others here. Nothing is loaded then.

        Example:
            >>> net = ElasticTransformer.tiny(positions="fairseq", pad=1, bos=2, eos=2)
            >>> net.load_hat({"target.weight": torch.zeros(20, 24)})
            Traceback (most recent call last):
            ...
            lightning_subnet.errors.SpaceError: 'target.weight' is not a name of HAT's ...
        """
        load_hat(self, self.config, state)

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

    def exact_measures(self, example_input: Any = None) -> list[Measure]:
        """Return `macs`, `params` and `size_mb` as tables over layers, for thousands of subnets.

        `macs` is for one forward pass, as in training; `count_macs(Decoding(...), source)` counts a
        decoding token by token. Shared embeddings count once, with as many dimensions as the wider
        of encoder and decoder has.

        Args:
            example_input: What `macs` is for: source (n, s) and target (n, t). None: one pair of
                `source_length` and `target_length` tokens.
        """
        config, n, normed = self.config, 1, self.config.norm_first
        s, t = config.source_length, config.target_length
        if example_input is not None:
            (n, s), (_, t) = token_sizes(self, example_input, 2)
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
            output = 0 if config.tied else config.vocab * dec
            return t * dec * config.vocab, tables + output + normed * 2 * (enc + dec)

        parts: list[Any] = [(("enc_embed", "dec_embed"), ends)]
        parts += [
            (("enc_embed", f"enc_ffn.{i}"), encoder_layer) for i in range(max(config.enc_depths))
        ]
        parts += [
            (("dec_embed", "enc_embed", f"dec_ffn.{i}", f"attend.{i}"), decoder_layer)
            for i in range(max(config.dec_depths))
        ]
        return table_measures(self.search_space(), parts, (0, 0), self, rows=n)

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
        for name, places in self.named_buffers(recurse=False):  # of no state dict
            plain.register_buffer(name, places.clone(), persistent=False)
        return copy_slices(plain, self)


def _places(config: TransformerConfig) -> dict[str, torch.Tensor]:
    """Return the tables of positions by name: one, or two where fairseq's sides differ in width."""
    source, target = max(config.enc_embed), max(config.dec_embed)
    if config.positions == "paper":
        return {"positions": sinusoid(config.max_length, max(source, target))}
    rows = config.max_length + config.pad + 1
    tables = {"positions": fairseq_sinusoid(rows, source, config.pad)}
    if target != source:
        tables["target_positions"] = fairseq_sinusoid(rows, target, config.pad)
    return tables
