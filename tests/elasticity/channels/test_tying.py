# SPDX-License-Identifier: Apache-2.0
"""Groups of several layers whose sizes the network's code takes to be equal; what outputs count."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from lightning_subnet.elasticity.channels.results import results
from lightning_subnet.supernets.elasticizing import elasticize


class Attention(nn.Module):
    """Takes a bias, or makes one without values, which fits its own number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.inner_dim = 4, 32
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
        self.o = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> Any:
        q, k, v = (
            part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        if bias is None:
            bias = torch.zeros(1, self.n_heads, x.shape[1], x.shape[1])
        weights = (q @ k.mT + bias).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).flatten(2)), bias


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return self.last(x)


def test_heads_that_share_a_bias_are_one_choice() -> None:
    x = torch.randn(2, 5, 16)
    net = elasticize(Net(), x, depth=False)
    assert net.search_space().values == {"heads.layers.0": (1, 2, 3, 4)}
    for subnet in net.search_space():
        net.activate(subnet)
        part = net.extract(subnet)
        torch.testing.assert_close(net(x), part(x))
        heads = subnet["heads.layers.0"]
        for layer in part.layers:
            assert (layer.n_heads, layer.inner_dim) == (heads, 8 * heads)
            assert layer.q.weight.shape == (8 * heads, 16)


class ModelOutput(OrderedDict):  # as that of transformers
    pass


def test_states_beside_logits_of_a_task_are_no_results() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert list(results(ModelOutput(logits=x, encoder_last_hidden_state=y))) == ["logits"]
    assert list(results(ModelOutput(loss=x, logits=x, past_key_values=(y,)))) == ["loss", "logits"]
    assert list(results(ModelOutput(last_hidden_state=x))) == ["last_hidden_state"]
    assert list(results({"logits": x, "embedding": y})) == ["logits", "embedding"]  # one's own
