# SPDX-License-Identifier: Apache-2.0
"""Super-networks without `extract`, each in the way that some package or paper slices weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class HatLinear(nn.Linear):
    """HAT: the slice is an attribute, taken when a configuration is set."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.samples: dict[str, torch.Tensor] = {}

    def set_sample_config(self, n: int, m: int) -> None:
        self.samples["weight"] = self.weight[:m, :n]
        self.samples["bias"] = self.bias[:m]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.samples["weight"], self.samples["bias"])


class HatNet(SubnetMixin, nn.Module):
    """A decoder with tied embeddings whose slices are kept, and layers that are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.positions = nn.Parameter(torch.randn(12, 16))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc1": HatLinear(16, 32), "fc2": HatLinear(32, 16)}) for _ in range(3)
        )
        self.norm = nn.LayerNorm(16)
        self.drop = nn.Dropout(0.2)
        self.tied: torch.Tensor | None = None
        self.depth, self.width = 3, 16

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=[8, 12, 16], hidden=[8, 16, 32], depth=[1, 2, 3])

    def activate(self, subnet: Subnet) -> None:
        self.depth, self.width = subnet["depth"], subnet["width"]
        self.tied = self.embed.weight[:, : self.width]
        for layer in self.layers:
            layer["fc1"].set_sample_config(self.width, subnet["hidden"])
            layer["fc2"].set_sample_config(subnet["hidden"], self.width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        w = self.width
        x = F.embedding(tokens, self.tied) * math.sqrt(w)
        x = x + self.positions[: tokens.shape[1], :w]
        if mask is not None:
            x = x.masked_fill(mask[..., None], 0.0)
        for layer in self.layers[: self.depth]:
            x = x + self.drop(layer["fc2"](layer["fc1"](x).relu()))
        x = F.layer_norm(x, (w,), self.norm.weight[:w], self.norm.bias[:w])
        return F.linear(x, self.tied)


class WhittleLinear(nn.Linear):
    """whittle: sizes of the sub-network are attributes of each layer."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.sub_network_in_features, self.sub_network_out_features = n, m

    def set_sub_network(self, n: int, m: int) -> None:
        self.sub_network_in_features, self.sub_network_out_features = n, m

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, m = self.sub_network_in_features, self.sub_network_out_features
        return F.linear(x, self.weight[:m, :n], self.bias[:m])


class WhittleNet(SubnetMixin, nn.Module):
    """A language model with a causal mask, heads of its own and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.qkv = WhittleLinear(16, 48)
        self.proj = WhittleLinear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.register_buffer("causal", torch.ones(12, 12).tril()[None, None])
        self.width, self.heads = 16, 4

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=[8, 16], heads=[1, 2, 4])

    def activate(self, subnet: Subnet) -> None:
        self.width, self.heads = subnet["width"], subnet["heads"]
        self.qkv.set_sub_network(self.width, 12 * self.heads)
        self.proj.set_sub_network(4 * self.heads, self.width)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        b, t = tokens.shape
        x = self.embed(tokens)[..., : self.width]
        q, k, v = (
            y.view(b, t, self.heads, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1)
        )
        attention = q @ k.transpose(-2, -1) / 2.0
        attention = attention.masked_fill(self.causal[:, :, :t, :t] == 0, float("-inf"))
        y = (attention.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1)
        x = x + self.proj(y)
        return {"logits": F.linear(x, self.head.weight[:, : self.width]), "hidden": x}


class SwitchableBatchNorm2d(nn.Module):
    """Slimmable networks: one BatchNorm for each width."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm2d(n) for n in widths)
        self.at = len(widths) - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn[self.at](x)


class UniversalBatchNorm2d(nn.BatchNorm2d):
    """Universally slimmable networks: statistics of each width, one weight and bias."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths[-1], affine=True, track_running_stats=False)
        self.bn = nn.ModuleList(nn.BatchNorm2d(n, affine=False) for n in widths)
        self.widths = widths

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = x.shape[1]
        own = self.bn[self.widths.index(c)]
        return F.batch_norm(
            x, own.running_mean, own.running_var, self.weight[:c], self.bias[:c], self.training,
            0.1, self.eps,
        )  # fmt: skip


class SlimmableNet(SubnetMixin, nn.Module):
    """Convolutions in channels_last of which the first channels run."""

    widths = (4, 6, 8)

    def __init__(self, norm: Callable[[Sequence[int]], nn.Module] = SwitchableBatchNorm2d) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm(self.widths)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8).to(memory_format=torch.channels_last)
        self.last = nn.Linear(8, 5)
        self.width = 8

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=self.widths)

    def activate(self, subnet: Subnet) -> None:
        self.width = subnet["width"]
        if isinstance(self.norm, SwitchableBatchNorm2d):
            self.norm.at = self.widths.index(self.width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = self.width
        x = F.conv2d(x, self.first.weight[:w], self.first.bias[:w], padding=1)
        x = self.norm(x).relu()
        x = F.conv2d(x, self.deep.weight[:w], self.deep.bias[:w], padding=1, groups=w)
        x = x.mean((2, 3))
        return F.linear(x, self.last.weight[:, :w], self.last.bias), x


class AutoFormerNet(SubnetMixin, nn.Module):
    """Interleaved rows of q, k and v, kept as attributes; relative positions from tables."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(9, 4))
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.head = nn.Linear(16, 5)
        self.samples: dict[str, torch.Tensor] = {}
        self.width, self.heads = 16, 4

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=[8, 12, 16], heads=[2, 3, 4])

    def activate(self, subnet: Subnet) -> None:
        self.width, self.heads = w, h = subnet["width"], subnet["heads"]
        inner = self.qkv.weight[:, :w]
        self.samples = {
            "weight": torch.cat([inner[i : 12 * h : 3] for i in range(3)], dim=0),
            "bias": torch.cat([self.qkv.bias[i : 12 * h : 3] for i in range(3)]),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, w, h = x.shape[0], self.width, self.heads
        x = F.conv2d(x, self.patch.weight[:w], self.patch.bias[:w], stride=4)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls[..., :w].expand(b, -1, -1), x], dim=1)
        n = x.shape[1]
        qkv = F.linear(x, self.samples["weight"], self.samples["bias"])
        q, k, v = qkv.reshape(b, n, 3, h, 4).permute(2, 0, 3, 1, 4)
        at = torch.arange(n, device=x.device)
        far = (at[None] - at[:, None]).clamp(-4, 4) + 4
        relative = F.embedding(far, self.table[:, :h]).permute(2, 0, 1)
        attention = (q @ k.transpose(-2, -1) / 2.0 + relative).softmax(-1)
        x = x + F.linear(
            (attention @ v).transpose(1, 2).reshape(b, n, -1),
            self.proj.weight[:w, : 4 * h], self.proj.bias[:w],
        )  # fmt: skip
        return F.linear(x[:, 0], self.head.weight[:, :w], self.head.bias)


class DynaBertNet(SubnetMixin, nn.Module):
    """Heads by slicing, neurons by index, layers that are skipped; a mask by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attend": nn.MultiheadAttention(16, 4, batch_first=True),
                    "up": nn.Linear(16, 32),
                    "down": nn.Linear(32, 16),
                    "norm": nn.LayerNorm(16),
                }
            )
            for _ in range(3)
        )
        self.pooler = nn.Linear(16, 3)
        self.register_buffer(
            "order", torch.randperm(32, generator=torch.Generator().manual_seed(1))
        )
        self.depth, self.neurons = 3, 32

    def search_space(self) -> SearchSpace:
        return SearchSpace(depth=[1, 2, 3], neurons=[8, 16, 32])

    def activate(self, subnet: Subnet) -> None:
        self.depth, self.neurons = subnet["depth"], subnet["neurons"]

    def forward(
        self, tokens: torch.Tensor, *, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.embed(tokens)
        hidden = None if attention_mask is None else attention_mask == 0
        for i, layer in enumerate(self.layers):
            if i >= self.depth:
                continue
            x = x + layer["attend"](x, x, x, key_padding_mask=hidden, need_weights=False)[0]
            index = self.order[: self.neurons]
            up = F.linear(
                layer["norm"](x), layer["up"].weight.index_select(0, index), layer["up"].bias[index]
            )
            x = x + F.linear(F.gelu(up), layer["down"].weight[:, index], layer["down"].bias)
        return self.pooler(x[:, 0])


class OfaNet(SubnetMixin, nn.Module):
    """Small kernels are the middle of the large one, times a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 8, 5, groups=8, bias=False)
        self.matrix = nn.Parameter(torch.eye(9) + torch.randn(9, 9) / 10)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.kernel, self.width = 5, 8

    def search_space(self) -> SearchSpace:
        return SearchSpace(kernel=[3, 5], width=[4, 8])

    def activate(self, subnet: Subnet) -> None:
        self.kernel, self.width = subnet["kernel"], subnet["width"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.width
        x = F.conv2d(x, self.stem.weight[:w], self.stem.bias[:w])
        weight = self.conv.weight[:w]
        if self.kernel == 3:
            middle = weight[:, :, 1:4, 1:4]
            weight = (middle.reshape(-1, 9) @ self.matrix).view(w, 1, 3, 3)
        x = F.conv2d(x, weight, padding=self.kernel // 2, groups=w)
        x = F.batch_norm(
            x, self.norm.running_mean[:w], self.norm.running_var[:w], self.norm.weight[:w],
            self.norm.bias[:w], self.training,
        )  # fmt: skip
        return F.linear(x.mean((2, 3)), self.head.weight[:, :w], self.head.bias)


def universal() -> SlimmableNet:
    return SlimmableNet(UniversalBatchNorm2d)


FAMILIES: dict[str, tuple[Callable[[], Any], Any]] = {
    "hat": (HatNet, TOKENS),
    "hat with a mask": (HatNet, (TOKENS, TOKENS > 15)),
    "whittle": (WhittleNet, TOKENS),
    "slimmable": (SlimmableNet, IMAGES),
    "universally slimmable": (universal, IMAGES),
    "autoformer": (AutoFormerNet, IMAGES),
    "dynabert": (
        DynaBertNet, {"tokens": TOKENS, "attention_mask": torch.ones_like(TOKENS).tril()},
    ),
    "ofa": (OfaNet, IMAGES),
}  # fmt: skip


def made(family: str) -> tuple[Any, Any]:
    """Return a network in eval mode with weights and statistics that differ, and its example."""
    make, example = FAMILIES[family]
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for name, x in [*net.named_parameters(), *net.named_buffers()]:
            if x.is_floating_point() and "causal" not in name:
                x.normal_().abs_() if "var" in name else x.normal_()
    net.activate(net.search_space().largest)
    return net.eval(), example
