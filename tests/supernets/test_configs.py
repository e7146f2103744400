# SPDX-License-Identifier: Apache-2.0
"""Configs say the sizes of what was cut out where they can, and are left alone elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_subnet import elasticize
from lightning_subnet.supernets.configs import put_config_in_step


class Config:
    def __init__(self) -> None:
        self.hidden_size, self.intermediate_size, self.num_heads = 16, 32, 4

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Mlp(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Linear(8, config.hidden_size)
        self.layers = nn.ModuleList(Mlp(config) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def cut(**values: int) -> Any:
    net = elasticize(Model(Config()), torch.randn(2, 8), depth=False)
    space = net.search_space()
    names = dict(zip(space.values, values.values(), strict=True))
    return net.extract(space.subnet(names))


def test_a_config_says_sizes_that_all_layers_have() -> None:
    small = cut(first=8, second=8)
    assert put_config_in_step(small)
    assert vars(small.config) == {"hidden_size": 16, "intermediate_size": 8, "num_heads": 4}
    assert all(layer.config is small.config for layer in small.layers)
    Model(small.config).load_state_dict(small.state_dict())


def test_a_config_that_cannot_say_them_stays() -> None:
    small = cut(first=8, second=16)
    before = small.config
    assert not put_config_in_step(small)
    assert small.config is before
    assert vars(before) == vars(Config())


def test_a_whole_model_needs_nothing() -> None:
    model = Model(Config())
    before = model.config
    assert put_config_in_step(model)
    assert model.config is before
