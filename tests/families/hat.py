# SPDX-License-Identifier: Apache-2.0
"""A Transformer with the methods of HAT's (mit-han-lab/hardware-aware-transformers).

`set_sample_config(config)` goes down to layers that keep slices of their weights until the next
call, in dicts (`self.samples["weight"]`); layers beyond the depth are identities; q, k and v are
one matrix, cut by number; the decoder may see more than one layer of the encoder.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet.supernets import from_hat
from tests.families.family import PAD, VOCAB, Family, LitTranslation, seeded, translations

QKV = 16


class LinearSuper(nn.Linear):
    def __init__(self, super_in_dim: int, super_out_dim: int) -> None:
        super().__init__(super_in_dim, super_out_dim)
        self.samples: dict[str, torch.Tensor] = {}

    def set_sample_config(self, sample_in_dim: int, sample_out_dim: int) -> None:
        self.samples["weight"] = self.weight[:, :sample_in_dim][:sample_out_dim, :]
        self.samples["bias"] = self.bias[:sample_out_dim]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.samples["weight"], self.samples["bias"])


class LayerNormSuper(nn.LayerNorm):
    def __init__(self, super_embed_dim: int) -> None:
        super().__init__(super_embed_dim)
        self.samples: dict[str, torch.Tensor] = {}

    def set_sample_config(self, sample_embed_dim: int) -> None:
        self.sample_embed_dim = sample_embed_dim
        self.samples["weight"] = self.weight[:sample_embed_dim]
        self.samples["bias"] = self.bias[:sample_embed_dim]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.sample_embed_dim,)
        return F.layer_norm(x, shape, self.samples["weight"], self.samples["bias"], self.eps)


class EmbeddingSuper(nn.Embedding):
    """One table for both parts, each with a slice of its own."""

    def __init__(self, rows: int, super_embed_dim: int, padding_idx: int) -> None:
        super().__init__(rows, super_embed_dim, padding_idx)
        self.samples: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "decoder": {}}

    def set_sample_config(self, sample_embed_dim: int, part: str) -> None:
        self.samples[part]["weight"] = self.weight[..., :sample_embed_dim]

    def forward(self, tokens: torch.Tensor, part: str = "encoder") -> torch.Tensor:
        return F.embedding(tokens, self.samples[part]["weight"], self.padding_idx)


class MultiheadAttentionSuper(nn.Module):
    def __init__(self, super_embed_dim: int, super_kv_dim: int | None = None) -> None:
        super().__init__()
        self.one_matrix = super_kv_dim is None
        if super_kv_dim is None:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * QKV, super_embed_dim))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(QKV, super_embed_dim))
            self.k_proj_weight = nn.Parameter(torch.empty(QKV, super_kv_dim))
            self.v_proj_weight = nn.Parameter(torch.empty(QKV, super_kv_dim))
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * QKV))
        self.out_proj = LinearSuper(QKV, super_embed_dim)

    def set_sample_config(
        self, sample_q_embed_dim: int, sample_attention_heads: int, sample_kv_dim: int = 0
    ) -> None:
        self.sample_q_dim = sample_q_embed_dim
        self.sample_kv_dim = sample_kv_dim or sample_q_embed_dim
        self.num_heads, self.head_dim = sample_attention_heads, QKV // sample_attention_heads
        self.out_proj.set_sample_config(QKV, sample_q_embed_dim)

    def _projected(self, x: torch.Tensor, number: int) -> torch.Tensor:
        rows = slice(number * QKV, (number + 1) * QKV)
        if self.one_matrix:
            weight = self.in_proj_weight[rows, : self.sample_q_dim]
        else:
            own = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[number]
            weight = own[..., : self.sample_kv_dim if number else self.sample_q_dim]
        return F.linear(x, weight, self.in_proj_bias[rows])

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        length, batch, _ = query.shape
        q = self._projected(query, 0) * self.head_dim**-0.5
        q, k, v = (
            x.contiguous().view(-1, batch * self.num_heads, self.head_dim).transpose(0, 1)
            for x in (q, self._projected(key, 1), self._projected(key, 2))
        )
        scores = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            scores = scores + mask[None]
        if padding is not None:
            scores = scores.view(batch, self.num_heads, length, -1)
            scores = scores.masked_fill(padding[:, None, None], float("-inf"))
            scores = scores.view(batch * self.num_heads, length, -1)
        y = torch.bmm(scores.softmax(-1), v)
        return self.out_proj(y.transpose(0, 1).contiguous().view(length, batch, QKV))


class Layer(nn.Module):
    """A layer of the encoder; with `kv_dim` one of the decoder."""

    def __init__(self, dim: int, ffn: int, kv_dim: int | None = None) -> None:
        super().__init__()
        self.self_attn = MultiheadAttentionSuper(dim)
        self.self_attn_layer_norm = LayerNormSuper(dim)
        self.cross = kv_dim is not None
        if kv_dim is not None:
            self.encoder_attn = MultiheadAttentionSuper(dim, kv_dim)
            self.encoder_attn_layer_norm = LayerNormSuper(dim)
        self.fc1, self.fc2 = LinearSuper(dim, ffn), LinearSuper(ffn, dim)
        self.final_layer_norm = LayerNormSuper(dim)

    def set_sample_config(
        self, is_identity_layer: bool, dim: int = 0, ffn: int = 0, heads: int = 0,
        ende_heads: int = 0, kv_dim: int = 0,
    ) -> None:  # fmt: skip
        self.is_identity_layer = is_identity_layer
        if is_identity_layer:
            return
        self.self_attn.set_sample_config(dim, heads)
        self.self_attn_layer_norm.set_sample_config(dim)
        if self.cross:
            self.encoder_attn.set_sample_config(dim, ende_heads, kv_dim)
            self.encoder_attn_layer_norm.set_sample_config(dim)
        self.fc1.set_sample_config(dim, ffn)
        self.fc2.set_sample_config(ffn, dim)
        self.final_layer_norm.set_sample_config(dim)

    def forward(
        self, x: torch.Tensor, padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None, memory: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if self.is_identity_layer:
            return x
        own = None if self.cross else padding
        x = self.self_attn_layer_norm(x + self.self_attn(x, x, own, mask))
        if memory is not None:
            x = self.encoder_attn_layer_norm(x + self.encoder_attn(x, memory, padding))
        return self.final_layer_norm(x + self.fc2(self.fc1(x).relu()))


def positions(length: int, dim: int) -> torch.Tensor:
    half = dim // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class TransformerSuperModel(nn.Module):
    table: torch.Tensor

    def __init__(
        self, dim: int = 24, ffn: int = 32, layers: int = 3, *, by_value: bool = False
    ) -> None:
        super().__init__()
        self.by_value = by_value
        self.embed_tokens = EmbeddingSuper(VOCAB, dim, PAD)
        self.encoder = nn.ModuleList(Layer(dim, ffn) for _ in range(2))
        self.decoder = nn.ModuleList(Layer(dim, ffn, kv_dim=dim) for _ in range(layers))
        self.register_buffer("table", positions(16, dim), persistent=False)

    def set_sample_config(self, config: dict[str, Any]) -> None:
        encoder, decoder = config["encoder"], config["decoder"]
        self.sample_encoder_dim = encoder["encoder_embed_dim"]
        self.sample_decoder_dim = decoder["decoder_embed_dim"]
        self.sample_ende_attn = decoder["decoder_arbitrary_ende_attn"]
        self.embed_tokens.set_sample_config(self.sample_encoder_dim, "encoder")
        self.embed_tokens.set_sample_config(self.sample_decoder_dim, "decoder")
        for part, own, layers in (
            ("encoder", encoder, self.encoder),
            ("decoder", decoder, self.decoder),
        ):
            for i, layer in enumerate(layers):
                if i >= own[f"{part}_layer_num"]:
                    layer.set_sample_config(is_identity_layer=True)
                    continue
                cross: dict[str, int] = {}
                if part == "decoder":
                    heads = own["decoder_ende_attention_heads"][i]
                    cross = {"ende_heads": heads, "kv_dim": self.sample_encoder_dim}
                layer.set_sample_config(
                    is_identity_layer=False,
                    dim=own[f"{part}_embed_dim"],
                    ffn=own[f"{part}_ffn_embed_dim"][i],
                    heads=own[f"{part}_self_attention_heads"][i],
                    **cross,
                )

    def _embedded(self, tokens: torch.Tensor, dim: int, part: str) -> torch.Tensor:
        x = math.sqrt(dim) * self.embed_tokens(tokens, part=part)
        return (x + self.table[: tokens.size(1), :dim]).transpose(0, 1)

    def forward(self, src_tokens: torch.Tensor, prev_output_tokens: torch.Tensor) -> torch.Tensor:
        padding: Any = src_tokens.eq(PAD)
        if self.by_value and not padding.any():  # as fairseq saves work
            padding = None
        x = self._embedded(src_tokens, self.sample_encoder_dim, "encoder")
        states = []
        for layer in self.encoder:
            x = layer(x, padding)
            states.append(x)
        n = prev_output_tokens.size(1)
        future = torch.full((n, n), float("-inf"), device=x.device).triu(1)
        y = self._embedded(prev_output_tokens, self.sample_decoder_dim, "decoder")
        for i, layer in enumerate(self.decoder):
            more = self.sample_ende_attn[i] if i < len(self.sample_ende_attn) else -1
            seen, hidden = x, padding
            if more == 1:  # and the layer before the last
                seen = torch.cat([x, states[-2]])
                hidden = None if padding is None else torch.cat([padding, padding], 1)
            y = layer(y, hidden, future, seen)
        return F.linear(y.transpose(0, 1), self.embed_tokens.samples["decoder"]["weight"])


CHOICES = {  # as get_all_choices(args) has them: the largest first
    "encoder": {
        "encoder_embed_dim": [24, 16],
        "encoder_layer_num": [2],
        "encoder_ffn_embed_dim": [32, 24, 16],
        "encoder_self_attention_heads": [4, 2],
    },
    "decoder": {
        "decoder_embed_dim": [24, 16],
        "decoder_layer_num": [3, 2, 1],
        "decoder_ffn_embed_dim": [32, 24, 16],
        "decoder_self_attention_heads": [4, 2],
        "decoder_ende_attention_heads": [4, 2],
        "decoder_arbitrary_ende_attn": [-1, 1],
    },
}


def transformer(*, by_value: bool = False) -> LitTranslation:
    net = from_hat(seeded(lambda: TransformerSuperModel(by_value=by_value)), CHOICES)
    example = (torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))
    return LitTranslation(net, example)


_SOURCE = "Wang et al., HAT, ACL 2020; mit-han-lab/hardware-aware-transformers"
_CODE = "net = from_hat(net, get_all_choices(args))"

FAMILIES = [
    Family("HAT", transformer, translations, _CODE, _SOURCE),
    Family("HAT, mask by value", lambda: transformer(by_value=True), translations, _CODE, _SOURCE),
]
