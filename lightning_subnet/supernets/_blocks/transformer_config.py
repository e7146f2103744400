# SPDX-License-Identifier: Apache-2.0
"""The sizes of an encoder-decoder Transformer: of the super-network, and of one subnet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.errors import SpaceError
from lightning_subnet.supernets._blocks.transformer_layer import (
    LayerSpec,
    Style,
    check_divides,
    check_positive,
)

POSITIONS = ("paper", "fairseq")


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of an elastic Transformer; the defaults are HAT's for WMT14 English-German.

    Args:
        vocab: Tokens of the target language and, without `source_vocab`, of both, which then share
            a table.
        source_vocab: Tokens of the source language, which then has a table of its own.
        max_length: The most positions of either.
        source_length: Tokens of the source that `macs` is for where no input is given.
        target_length: And of the target, all in one forward pass.
        enc_embed: Embedding dimensions that the encoder may have.
        dec_embed: And the decoder.
        enc_depths: Numbers of encoder layers.
        dec_depths: Numbers of decoder layers.
        ffn: Channels inside the feed-forward part that a layer may have.
        heads: Heads that an attention may have.
        attend: To how many of the last encoder layers a decoder layer may attend.
        qkv: Channels that the heads of each attention divide among them.
        norm_first: Whether layers normalise their inputs (easier to train) or their sums (HAT).
        dropout: As in `torch.nn.Transformer`.
        pad: The token of padding.
        bos: The token that a target begins with; with fairseq's positions it may be `eos`.
        eos: The token that it ends with.
        tied: Whether the output layer is the target's table; else it has weights of its own.
        positions: `"paper"`: sine and cosine alternate, and the first position is 0. `"fairseq"`:
            all sines, then all cosines, in a table as wide as its side; the first token that is not
            padding is at `pad + 1`, and padding has no position.

    Raises:
        SpaceError: The sizes do not fit together.

    References:
        Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.5, and fairseq's
        `SinusoidalPositionalEmbedding` (that of tensor2tensor).
    """

    vocab: int = 32_768
    source_vocab: int | None = None
    max_length: int = 1024
    source_length: int = 30
    target_length: int = 30
    enc_embed: tuple[int, ...] = (512, 640)
    dec_embed: tuple[int, ...] = (512, 640)
    enc_depths: tuple[int, ...] = (6,)
    dec_depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    ffn: tuple[int, ...] = (1024, 2048, 3072)
    heads: tuple[int, ...] = (4, 8)
    attend: tuple[int, ...] = (1, 2, 3)
    qkv: int = 512
    norm_first: bool = False
    dropout: float = 0.1
    pad: int = 0
    bos: int = 1
    eos: int = 2
    tied: bool = True
    positions: str = "paper"
    style: Style = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = ["vocab", "max_length", "source_length", "target_length", "enc_embed", "dec_embed"]
        names += ["enc_depths", "dec_depths", "ffn", "heads", "attend", "qkv"]
        check_positive(**{name: getattr(self, name) for name in names})
        if self.source_vocab is not None:
            check_positive(source_vocab=self.source_vocab)
        check_divides("heads", self.heads, "qkv", [self.qkv])
        if max(self.attend) > min(self.enc_depths):
            msg = (
                f"attend={self.attend!r} needs {max(self.attend)} encoder layers; the shallowest "
                f"encoder has {min(self.enc_depths)}."
            )
            raise SpaceError(msg)
        if self.positions not in POSITIONS:
            msg = f"positions={self.positions!r} is not one of {listed(POSITIONS)}."
            raise SpaceError(msg + did_you_mean(str(self.positions), POSITIONS))
        special = (self.pad, self.bos, self.eos)
        n_special = 2 if self.positions == "fairseq" and self.bos == self.eos else 3
        if len(set(special)) < n_special or not all(0 <= t < self.vocab for t in special):
            msg = f"pad, bos and eos are {special}: three tokens of the {self.vocab} are needed."
            raise SpaceError(msg)
        if max(self.source_length, self.target_length) > self.max_length:
            msg = (
                f"source_length={self.source_length} and target_length={self.target_length} must "
                f"fit into max_length={self.max_length}."
            )
            raise SpaceError(msg)
        style = Style(norm_first=self.norm_first, activation="relu", dropout=self.dropout)
        object.__setattr__(self, "style", style)

    def encoder_layer(self, dim: int, ffn: int, heads: int) -> LayerSpec:
        """Return the sizes of an encoder layer."""
        return LayerSpec(dim, heads, ffn, self.qkv)

    def decoder_layer(
        self, dim: int, memory: int, ffn: int, heads: int, cross_heads: int
    ) -> LayerSpec:
        """Return the sizes of a decoder layer."""
        return LayerSpec(dim, heads, ffn, self.qkv, memory=memory, cross_heads=cross_heads)

    def shape(self, values: Mapping[str, Any]) -> TransformerShape:
        """Return the sizes of a subnet, from its values by name."""
        enc, dec = values["enc_embed"], values["dec_embed"]
        return TransformerShape(
            enc,
            dec,
            tuple(
                self.encoder_layer(enc, values[f"enc_ffn.{i}"], values[f"enc_heads.{i}"])
                for i in range(values["enc_depth"])
            ),
            tuple(
                self.decoder_layer(
                    dec,
                    enc,
                    values[f"dec_ffn.{i}"],
                    values[f"dec_heads.{i}"],
                    values[f"cross_heads.{i}"],
                )
                for i in range(values["dec_depth"])
            ),
            tuple(values[f"attend.{i}"] for i in range(values["dec_depth"])),
        )

    @property
    def whole(self) -> TransformerShape:
        """The largest subnet."""
        enc, dec, heads = max(self.enc_embed), max(self.dec_embed), max(self.heads)
        ffn, n_enc, n_dec = max(self.ffn), max(self.enc_depths), max(self.dec_depths)
        return TransformerShape(
            enc,
            dec,
            (self.encoder_layer(enc, ffn, heads),) * n_enc,
            (self.decoder_layer(dec, enc, ffn, heads, heads),) * n_dec,
            (max(self.attend),) * n_dec,
        )


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """The sizes of one subnet.

    Args:
        enc_embed: The embedding dimension of the encoder.
        dec_embed: That of the decoder.
        encoder: The sizes of its layers.
        decoder: Those of the decoder's.
        attend: To how many of the last encoder layers each decoder layer attends.
    """

    enc_embed: int
    dec_embed: int
    encoder: tuple[LayerSpec, ...]
    decoder: tuple[LayerSpec, ...]
    attend: tuple[int, ...]
