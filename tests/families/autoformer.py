# SPDX-License-Identifier: Apache-2.0
"""A vision transformer with the methods of AutoFormer's (microsoft/Cream).

`set_sample_config({"layer_num": ..., "embed_dim": [...], "num_heads": [...], "mlp_ratio": [...]})`;
layers keep slices of their weights in dicts and attributes; rows of q, k and v are interleaved;
relative positions in two dimensions are learned tables, for keys and for values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import Choice, SearchSpace, Subnet
from lightning_subnet.supernets import from_hat
from tests.families.family import CLASSES, Family, Lit, images, seeded
from tests.families.hat import LayerNormSuper, LinearSuper

HEAD = 4  # channels of a head; 64 in the paper


class QkvSuper(nn.Linear):
    """Every third row is of q, of k and of v."""

    def __init__(self, super_in_dim: int, super_out_dim: int) -> None:
        super().__init__(super_in_dim, super_out_dim)
        self.samples: dict[str, torch.Tensor] = {}

    def set_sample_config(self, sample_in_dim: int, sample_out_dim: int) -> None:
        weight = self.weight[:, :sample_in_dim]
        self.samples["weight"] = torch.cat([weight[i:sample_out_dim:3] for i in range(3)])
        self.samples["bias"] = self.bias[:sample_out_dim]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.samples["weight"], self.samples["bias"])


class RelativePosition2DSuper(nn.Module):
    """Vectors of (query, key) by the distance of their patches, up and to the side."""

    def __init__(self, units: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.table_v = nn.Parameter(0.02 * torch.randn(2 * max_distance + 2, units))
        self.table_h = nn.Parameter(0.02 * torch.randn(2 * max_distance + 2, units))
        self.sample_table_v: torch.Tensor | None = None
        self.sample_table_h: torch.Tensor | None = None

    def set_sample_config(self, sample_head_dim: int) -> None:
        self.sample_table_v = self.table_v[:, :sample_head_dim]
        self.sample_table_h = self.table_h[:, :sample_head_dim]

    def forward(self, n: int) -> torch.Tensor:
        assert self.sample_table_v is not None
        assert self.sample_table_h is not None
        side = int((n - 1) ** 0.5)  # without the class token
        place = torch.arange(n - 1, device=self.table_v.device)
        numbers = []
        for coordinate in (place // side, place % side):
            distance = coordinate[None] - coordinate[:, None]
            clipped = distance.clamp(-self.max_distance, self.max_distance)
            number = clipped + self.max_distance + 1  # 0 is for the class token
            numbers.append(F.pad(number, (1, 0, 1, 0)).long())
        return self.sample_table_v[numbers[0]] + self.sample_table_h[numbers[1]]


class AttentionSuper(nn.Module):
    def __init__(self, super_embed_dim: int, super_heads: int) -> None:
        super().__init__()
        self.qkv = QkvSuper(super_embed_dim, 3 * HEAD * super_heads)
        self.proj = LinearSuper(HEAD * super_heads, super_embed_dim)
        self.rel_pos_embed_k = RelativePosition2DSuper(HEAD, 2)
        self.rel_pos_embed_v = RelativePosition2DSuper(HEAD, 2)

    def set_sample_config(self, sample_heads: int, sample_embed_dim: int) -> None:
        self.sample_num_heads, inner = sample_heads, HEAD * sample_heads
        self.sample_scale = HEAD**-0.5
        self.qkv.set_sample_config(sample_embed_dim, 3 * inner)
        self.proj.set_sample_config(inner, sample_embed_dim)
        self.rel_pos_embed_k.set_sample_config(HEAD)
        self.rel_pos_embed_v.set_sample_config(HEAD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        heads = self.sample_num_heads
        qkv = self.qkv(x).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q @ k.transpose(-2, -1)) * self.sample_scale
        rows = q.permute(2, 0, 1, 3).reshape(n, heads * b, -1)
        near = (rows @ self.rel_pos_embed_k(n).transpose(2, 1)).transpose(1, 0)
        scores = (scores + near.reshape(b, heads, n, n) * self.sample_scale).softmax(-1)
        y = (scores @ v).transpose(1, 2).reshape(b, n, -1)
        rows = scores.permute(2, 0, 1, 3).reshape(n, b * heads, -1)
        near = (rows @ self.rel_pos_embed_v(n)).transpose(1, 0).reshape(b, heads, n, -1)
        return self.proj(y + near.transpose(2, 1).reshape(b, n, -1))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.attn = AttentionSuper(dim, heads)
        self.attn_layer_norm, self.ffn_layer_norm = LayerNormSuper(dim), LayerNormSuper(dim)
        self.fc1, self.fc2 = LinearSuper(dim, int(dim * ratio)), LinearSuper(int(dim * ratio), dim)

    def set_sample_config(
        self, is_identity_layer: bool, dim: int = 0, ratio: float = 0, heads: int = 0
    ) -> None:
        self.is_identity_layer = is_identity_layer
        if is_identity_layer:
            return
        inner = int(dim * ratio)
        self.attn_layer_norm.set_sample_config(dim)
        self.ffn_layer_norm.set_sample_config(dim)
        self.attn.set_sample_config(heads, dim)
        self.fc1.set_sample_config(dim, inner)
        self.fc2.set_sample_config(inner, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_identity_layer:
            return x
        x = x + self.attn(self.attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_layer_norm(x))))


class PatchembedSuper(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, embed_dim, kernel_size=2, stride=2)
        self.sampled_weight: torch.Tensor | None = None
        self.sampled_bias: torch.Tensor | None = None

    def set_sample_config(self, sample_embed_dim: int) -> None:
        self.sampled_weight = self.proj.weight[:sample_embed_dim, ...]
        self.sampled_bias = self.proj.bias[:sample_embed_dim, ...]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.sampled_weight is not None
        x = F.conv2d(x, self.sampled_weight, self.sampled_bias, stride=2)
        return x.flatten(2).transpose(1, 2)


class VisionTransformerSuper(nn.Module):
    def __init__(self, dim: int = 24, heads: int = 4, ratio: float = 4.0, depth: int = 3) -> None:
        super().__init__()
        self.patch_embed_super = PatchembedSuper(dim)
        self.blocks = nn.ModuleList(EncoderLayer(dim, heads, ratio) for _ in range(depth))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, dim))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.norm, self.head = LayerNormSuper(dim), LinearSuper(dim, CLASSES)

    def set_sample_config(self, config: dict[str, Any]) -> None:
        self.sample_embed_dim = config["embed_dim"]
        self.sample_layer_num = config["layer_num"]
        self.patch_embed_super.set_sample_config(self.sample_embed_dim[0])
        for i, block in enumerate(self.blocks):
            if i >= self.sample_layer_num:
                block.set_sample_config(is_identity_layer=True)
                continue
            block.set_sample_config(
                is_identity_layer=False,
                dim=self.sample_embed_dim[i],
                ratio=config["mlp_ratio"][i],
                heads=config["num_heads"][i],
            )
        self.norm.set_sample_config(self.sample_embed_dim[-1])
        self.head.set_sample_config(self.sample_embed_dim[-1], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed_super(x)
        first = self.cls_token[..., : self.sample_embed_dim[0]].expand(x.shape[0], -1, -1)
        x = torch.cat((first, x), 1) + self.pos_embed[..., : self.sample_embed_dim[0]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


DEPTHS = (1, 2, 3)


def space() -> SearchSpace:
    """Return the space: one width, a depth, and heads and ratio of each layer."""
    choices: dict[str, Any] = {"embed_dim": [16, 20, 24], "layer_num": list(DEPTHS)}
    for name, values in (("num_heads", [2, 3, 4]), ("mlp_ratio", [3.0, 3.5, 4.0])):
        for i in range(max(DEPTHS)):
            deep = [d for d in DEPTHS if d > i]
            when = {"layer_num": deep} if len(deep) < len(DEPTHS) else {}
            choices[f"{name}.{i}"] = Choice(values, when=when)
    return SearchSpace(choices)


def config(subnet: Subnet) -> dict[str, Any]:
    """Return what AutoFormer calls a configuration."""
    values = subnet.grouped()
    return {**values, "embed_dim": [values["embed_dim"]] * values["layer_num"]}


def vision_transformer() -> Lit:
    return Lit(from_hat(seeded(VisionTransformerSuper), space(), config=config))


FAMILIES = [
    Family(
        "AutoFormer",
        vision_transformer,
        images,
        "net = from_hat(net, space, config=lambda s: {**s.grouped(),\n"
        '               "embed_dim": [s["embed_dim"]] * s["layer_num"]})',
        "Chen et al., AutoFormer, ICCV 2021; microsoft/Cream",
    )
]
