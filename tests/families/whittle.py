# SPDX-License-Identifier: Apache-2.0
"""A GPT with the methods of whittle's.

`set_sub_network(sub_network_n_embd=...)`, `select_sub_network(config)` and `reset_super_network()`;
layers slice or index their weights in `forward`; the tables of the rotary embedding are buffers
that each subnet of another head size replaces.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace
from lightning_subnet.supernets import from_whittle
from tests.families.family import LENGTH, VOCAB, Family, LitLanguage, seeded, texts


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.reset_super_network()

    def set_sub_network(self, inputs: int, outputs: int, indices: list[int] | None = None) -> None:
        self.sub_network_in_features, self.sub_network_out_features = inputs, outputs
        self.sampled_out_indices = indices

    def reset_super_network(self) -> None:
        self.set_sub_network(self.in_features, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows: Any = self.sampled_out_indices
        rows = slice(0, self.sub_network_out_features) if rows is None else rows
        return F.linear(x, self.weight[rows][:, : self.sub_network_in_features], self.bias[rows])


class Embedding(nn.Embedding):
    def __init__(self, rows: int, features: int) -> None:
        super().__init__(rows, features)
        self.reset_super_network()

    def set_sub_network(self, features: int) -> None:
        self.sub_network_embedding_dim = features

    def reset_super_network(self) -> None:
        self.set_sub_network(self.embedding_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.weight[:, : self.sub_network_embedding_dim])


class RMSNorm(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.reset_super_network()

    def set_sub_network(self, features: int) -> None:
        self.sub_network_in_features = features

    def reset_super_network(self) -> None:
        self.set_sub_network(len(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (x * scale) * self.weight[: self.sub_network_in_features]


class Attention(nn.Module):
    """Rows of q, k and v stand one after the other, so a subnet takes them by their numbers."""

    def __init__(self, n_embd: int, n_head: int, head_size: int) -> None:
        super().__init__()
        self.whole = (n_embd, n_head, head_size)
        self.qkv = Linear(n_embd, 3 * n_head * head_size)
        self.proj = Linear(n_head * head_size, n_embd)
        self.reset_super_network()

    def set_sub_network(self, n_embd: int, n_head: int, head_size: int) -> None:
        self.n_head, self.head_size = n_head, head_size
        _, heads, size = self.whole
        rows = [
            part * heads * size + head * size + i
            for part in range(3)
            for head in range(n_head)
            for i in range(head_size)
        ]
        self.qkv.set_sub_network(n_embd, len(rows), rows)
        self.proj.set_sub_network(n_head * head_size, n_embd)

    def reset_super_network(self) -> None:
        self.set_sub_network(*self.whole)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, self.n_head * self.head_size))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat((-other, one), -1) * sin


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, head_size: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = RMSNorm(n_embd), RMSNorm(n_embd)
        self.attn = Attention(n_embd, n_head, head_size)
        self.fc, self.out = Linear(n_embd, 4 * n_embd), Linear(4 * n_embd, n_embd)

    def set_sub_network(self, n_embd: int, inner: int, n_head: int, head_size: int) -> None:
        self.norm_1.set_sub_network(n_embd)
        self.norm_2.set_sub_network(n_embd)
        self.attn.set_sub_network(n_embd, n_head, head_size)
        self.fc.set_sub_network(n_embd, inner)
        self.out.set_sub_network(inner, n_embd)

    def reset_super_network(self) -> None:
        for module in (self.norm_1, self.norm_2, self.attn, self.fc, self.out):
            module.reset_super_network()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm_1(x), cos, sin)
        return x + self.out(F.gelu(self.fc(self.norm_2(x))))


class GPT(nn.Module):
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self, n_embd: int = 24, n_head: int = 4, head_size: int = 8, n_layer: int = 3
    ) -> None:
        super().__init__()
        self.n_embd, self.n_head, self.head_size, self.n_layer = n_embd, n_head, head_size, n_layer
        self.wte = Embedding(VOCAB, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head, head_size) for _ in range(n_layer))
        self.ln_f = RMSNorm(n_embd)
        self.lm_head = Linear(n_embd, VOCAB)
        for name, table in zip(("cos", "sin"), self.rope_cache(head_size), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.reset_super_network()

    def rope_cache(self, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        steps = torch.arange(0, head_size, 2) / head_size
        angles = torch.arange(LENGTH)[:, None] * torch.exp(-steps * math.log(10_000))
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def set_sub_network(
        self,
        sub_network_n_embd: int,
        sub_network_intermediate_size: list[int] | int,
        sub_network_num_heads: list[int] | int,
        sub_network_n_layers: int,
        sub_network_head_size: int | None = None,
        sampled_layer_indices: list[int] | None = None,
    ) -> None:
        size = sub_network_head_size or self.head_size
        self.sub_network_n_layers, self.sub_network_head_size = sub_network_n_layers, size
        self.sampled_layer_indices = sampled_layer_indices
        self.wte.set_sub_network(sub_network_n_embd)
        self.ln_f.set_sub_network(sub_network_n_embd)
        self.lm_head.set_sub_network(sub_network_n_embd, VOCAB)
        for i in range(sub_network_n_layers):  # what lies deeper keeps what was set before
            inner, heads = (
                x[i] if isinstance(x, list) else x
                for x in (sub_network_intermediate_size, sub_network_num_heads)
            )
            self.h[i].set_sub_network(sub_network_n_embd, inner, heads, size)
        self.cos, self.sin = (table.to(self.cos) for table in self.rope_cache(size))

    def select_sub_network(self, config: dict[str, Any]) -> None:
        self.set_sub_network(
            sub_network_n_embd=config["embed_dim"],
            sub_network_intermediate_size=int(config["mlp_ratio"] * config["embed_dim"]),
            sub_network_num_heads=config["num_heads"],
            sub_network_n_layers=config["depth"],
            sub_network_head_size=config.get("head_size"),
        )

    def reset_super_network(self) -> None:
        self.sub_network_n_layers, self.sub_network_head_size = self.n_layer, self.head_size
        self.sampled_layer_indices = None
        for module in (self.wte, *self.h, self.ln_f, self.lm_head):
            module.reset_super_network()
        self.cos, self.sin = (table.to(self.cos) for table in self.rope_cache(self.head_size))

    def forward(self, idx: torch.Tensor, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        assert input_pos is None, "no cache here"
        t = idx.size(1)
        x = self.wte(idx)
        for i in range(self.sub_network_n_layers):
            x = self.h[i](x, self.cos[:t], self.sin[:t])
        return self.lm_head(self.ln_f(x))


SPACE = {
    "embed_dim": [12, 16, 24],
    "mlp_ratio": [1, 2, 4],
    "num_heads": [1, 2, 4],
    "depth": [1, 2, 3],
    "head_size": [4, 8],
}


def gpt() -> LitLanguage:
    return LitLanguage(from_whittle(seeded(GPT), SearchSpace(SPACE)))


FAMILIES = [
    Family(
        "whittle GPT",
        gpt,
        texts,
        "net = from_whittle(net, SearchSpace(embed_dim=[...], mlp_ratio=[...], "
        "num_heads=[...], depth=[...]))",
        "the package whittle, whose GPT has these methods",
    )
]
