# SPDX-License-Identifier: Apache-2.0
"""Random networks are never wrong in silence: what is elastic is what the whole network says."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lightning_subnet.errors import ElasticityError
from tests.elasticity.channels.checks import check

SIZES = (4, 6, 8)
STEPS = (
    "linear", "norm", "relu", "residual", "concatenate", "gate", "split", "chunk", "scale",
    "heads", "mean", "permute", "skip",
)  # fmt: skip


class Random(nn.Module):
    """A chain of steps, some of which use earlier results."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList()
        n, earlier = 5, [5]
        for kind, size in steps:
            layer, n = self._layer(kind, size, n, earlier)
            self.layers.append(layer)
            earlier.append(n)
        self.head = nn.Linear(n, 3)

    def _layer(  # noqa: PLR0911 - a line per kind of step
        self, kind: str, size: int, n: int, earlier: list[int]
    ) -> tuple[nn.Module, int]:
        if kind == "linear":
            return nn.Linear(n, size), size
        if kind == "norm":
            return nn.BatchNorm1d(n), n
        if kind == "residual":
            return nn.Sequential(nn.Linear(n, size), nn.ReLU(), nn.Linear(size, n)), n
        if kind == "gate":
            return nn.Sequential(nn.Linear(n, n), nn.Sigmoid()), n
        if kind == "split":
            return nn.Linear(n // 2, n // 2), n // 2 * 2
        if kind == "chunk":
            return nn.Linear(n, 2 * size), size
        if kind == "scale":
            return nn.Embedding(1, n), n
        if kind == "heads":
            return nn.Linear(n, 8), 8
        if kind == "concatenate":
            return nn.Identity(), n + earlier[size % len(earlier)]
        return nn.Identity(), n

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: PLR0912 - a line per kind of step
        earlier = [x]
        for (kind, size), layer in zip(self.steps, self.layers, strict=True):
            if kind == "residual":
                x = x + layer(x)
            elif kind == "gate":
                x = x * layer(x)
            elif kind == "split":
                half = x.shape[-1] // 2
                x = torch.cat([layer(x[:, :half]), x[:, half : 2 * half]], -1)
            elif kind == "chunk":
                one, two = layer(x).chunk(2, -1)
                x = one.tanh() * two
            elif kind == "scale":
                x = x * layer.weight[0]
            elif kind == "heads":
                y = layer(x).view(len(x), 2, -1)
                x = (y.softmax(-1) * y).flatten(1)
            elif kind == "concatenate":
                x = torch.cat([x, earlier[size % len(earlier)]], -1)
            elif kind == "mean":
                x = x - x.mean(-1, keepdim=True)
            elif kind == "permute":
                x = x.flip(-1)
            elif kind == "skip":
                x = x + earlier[-1]
            elif kind == "relu":
                x = x.relu()
            else:
                x = layer(x)
            earlier.append(x)
        return self.head(x)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(SIZES)), min_size=2, max_size=7),
    st.booleans(),
)
def test_random_networks(steps: list[tuple[str, int]], streams: bool) -> None:
    torch.manual_seed(0)
    net = Random([("linear", 8), *steps, ("linear", 6)])
    try:
        check(net, torch.randn(3, 5), n_subnets=1, streams=streams)
    except ElasticityError as error:
        assert "nothing that may vary" in str(error)  # noqa: PT017 - which is an answer too
