# SPDX-License-Identifier: Apache-2.0
"""Small networks of every kind of layer, which know nothing of elasticity."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 3)
    )


def conv(n_in: int, n_out: int, k: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, k, padding=k // 2, bias=False, **options),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
    )


def head(n: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(conv(3, 16), conv(16, 32, stride=2), head(32))


def flattened() -> nn.Module:
    """Each channel is several inputs of the classifier."""
    return nn.Sequential(conv(3, 16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 3))


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), conv(16, 16, groups=16), conv(16, 24, 1), conv(24, 48, groups=24), head(48)
    )


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 16), conv(16, 32, groups=4), conv(32, 16, 1), head(16))


def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
        head(24),
    )  # fmt: skip


def one_group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(1, 16), nn.SiLU(), head(16))


def instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), head(16)
    )


class SqueezeExcite(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(n, 8, 1), nn.Conv2d(8, n, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * self.up(self.down(gate).relu()).sigmoid()


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def inverted_residuals() -> nn.Module:
    def block() -> nn.Module:
        return Residual(
            nn.Sequential(
                conv(8, 32, 1),
                conv(32, 32, groups=32),
                SqueezeExcite(32),
                nn.Conv2d(32, 8, 1, bias=False),
                nn.BatchNorm2d(8),
            )
        )

    return nn.Sequential(conv(3, 8), block(), block(), head(8))


class LayerScale(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((n,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class GatedFFN(nn.Module):
    def __init__(self, n: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(n, inner, bias=False), nn.Linear(n, inner, bias=False)
        self.down, self.scale = nn.Linear(inner, n, bias=False), LayerScale(n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(self.down(F.silu(self.gate(x)) * self.up(x)))


def gated() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), Residual(nn.Sequential(nn.LayerNorm(16), GatedFFN(16, 32))),
        Residual(nn.Sequential(nn.LayerNorm(16), GatedFFN(16, 32))), nn.LayerNorm(16),
        nn.Linear(16, 3),
    )  # fmt: skip


class ChunkedGLU(nn.Module):
    """Gate and value come out of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(6, 48), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.both(x).chunk(2, -1)
        return self.down(F.gelu(gate) * value)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 8), conv(8, 16), conv(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.join2 = conv(32, 16)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join1, self.out = conv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.up2(self.middle(F.max_pool2d(two, 2)))
        x = self.up1(self.join2(torch.cat([x, two], 1)))
        return self.out(self.join1(torch.cat([x, one], 1)))


class DenseNet(nn.Module):
    """The normalisation before each layer sees all channels so far."""

    def __init__(self, normalise: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(16 + 8 * i) if normalise else nn.Identity() for i in range(3)
        )
        self.layers = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.head = head(40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(norm(x).relu())], 1)
        return self.head(x)


class RMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GroupedQueryAttention(nn.Module):
    def __init__(self, n: int = 32, heads: int = 8, kv_heads: int = 4, norms: bool = True) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = heads, kv_heads, n // heads
        self.q = nn.Linear(n, heads * self.head_dim, bias=False)
        self.k = nn.Linear(n, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(n, kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(heads * self.head_dim, n, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if norms else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if norms else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q_norm(self.q(x).view(b, t, self.n_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(b, t, self.n_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x).view(b, t, self.n_kv_heads, self.head_dim).transpose(1, 2)
        each = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class LanguageModel(nn.Module):
    """A decoder whose last layer has the weights of its first."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(
                Residual(nn.Sequential(RMSNorm(32), GroupedQueryAttention())),
                Residual(nn.Sequential(RMSNorm(32), GatedFFN(32, 64))),
            )
            for _ in range(2)
        )
        self.norm, self.head = RMSNorm(32), nn.Linear(32, 20, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class FusedAttention(nn.Module):
    """Queries, keys and values come out of one layer; positions may have a bias for each head."""

    def __init__(self, n: int = 32, heads: int = 4, tokens: int = 5, biased: bool = False) -> None:
        super().__init__()
        self.n_heads, self.head_dim = heads, n // heads
        self.qkv, self.out = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.bias_table = nn.Parameter(torch.randn(2 * tokens - 1, heads)) if biased else None
        places = torch.arange(tokens)
        self.register_buffer("places", places[:, None] - places[None] + tokens - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.n_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        if self.bias_table is not None:
            scores = scores + self.bias_table[self.places].permute(2, 0, 1)
        y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class Tokens(nn.Module):
    """A classifier of sequences around some layer."""

    def __init__(self, inner: nn.Module, n: int = 32) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(6, n), inner, nn.Linear(n, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(x)).mean(1))


def fused_attention() -> nn.Module:
    return Tokens(Residual(nn.Sequential(nn.LayerNorm(32), FusedAttention())))


def position_biases() -> nn.Module:
    return Tokens(Residual(nn.Sequential(nn.LayerNorm(32), FusedAttention(biased=True))))


class TwoInputs(nn.Module):
    """One projection serves both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 16), nn.Linear(4, 16)
        self.shared, self.head = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        one, two = self.shared(self.image(image).relu()), self.shared(self.text(text).relu())
        return self.head(one * two)


class Siamese(nn.Module):
    """The same layers see both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU())
        self.head = nn.Linear(24, 1)

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return self.head((self.body(one) - self.body(two)).abs())


class SharedWeight(nn.Module):
    """Two layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(self.first(x).relu()).relu()).relu())


def pixel_shuffle() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(16, 8, 3),
        nn.ReLU(), nn.Conv2d(8, 2, 1),
    )  # fmt: skip


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 24, 2, stride=2),
        nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 2, 1),
    )  # fmt: skip


def one_dimension() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.ConvTranspose1d(16, 8, 2, 2),
        nn.ReLU(), nn.Conv1d(8, 2, 1),
    )  # fmt: skip


class Einsum(nn.Module):
    READS = {"a": 0, "b": 1}  # noqa: RUF012 - what the tests know of it

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(3, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,oi->bo", torch.einsum("bj,ji->bi", x, self.a).relu(), self.b)


class StandardConv(nn.Conv2d):
    """Its weights have mean 0 and variance 1 in each output channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride)


def standardised() -> nn.Module:
    return nn.Sequential(
        StandardConv(3, 16, 3), nn.ReLU(), StandardConv(16, 24, 3), nn.ReLU(), head(24)
    )


def old_weight_norm() -> nn.Module:
    net = mlp()
    net[0], net[2] = weight_norm(net[0]), weight_norm(net[2])
    return net


def new_weight_norm() -> nn.Module:
    net = mlp()
    net[0] = parametrizations.weight_norm(net[0])
    return net


def spectral_norm() -> nn.Module:
    net = mlp()
    net[2] = parametrizations.spectral_norm(net[2])
    return net


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    net = mlp()
    parametrize.register_parametrization(net[2], "weight", Doubled())
    return net


def prelu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 24, 3), nn.PReLU(), head(24)
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return Tokens(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.rnn = kind(16, 24, batch_first=True, **options)
        self.head = nn.Linear(24 * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.rnn(self.embed(x).relu())
        return self.head(y[:, -1])


class TensorExperts(nn.Module):
    """All experts are computed, and added with the weights of a router."""

    READS = {"up": 1, "down": 1}  # noqa: RUF012 - what the tests know of it

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(6, 16), nn.Linear(16, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 16, 24) / 4)
        self.down = nn.Parameter(torch.randn(4, 24, 16) / 5)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        shares = self.router(x).softmax(-1)
        inner = torch.einsum("bi,eih->beh", x, self.up).relu()
        each = torch.einsum("beh,ehi->bei", inner, self.down)
        return self.head((each * shares[..., None]).sum(1))


class RoutedExperts(nn.Module):
    """Each row goes to the best two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(6, 16), nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        shares, chosen = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, which = (chosen == i).nonzero(as_tuple=True)
            y = y.index_add(0, rows, expert(x[rows]) * shares[rows, which, None])
        return self.head(y)
