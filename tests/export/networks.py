# SPDX-License-Identifier: Apache-2.0
"""Networks of each kind that a format must take, or refuse."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import recalibrate
from tests.networks import digits, quiet_trainer


def small() -> nn.Module:
    """Return a network that every format takes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


class Fixed(nn.Module):
    """A network that fixes the size of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).reshape(2, -1)


class Branching(nn.Module):
    """A network that decides by a size, which a trace would freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # a trace makes a constant of the first test, and takes the loop for two rounds
        x = self.layer(x) if x.shape[1] == 3 else x
        return x + torch.stack([x.new_ones(3) for _ in range(int(x.shape[1]))]).sum(0)


class Several(nn.Module):
    """A network of several inputs, one of which is not a tensor, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Any, scale: Any, double: bool = False, rest: Any = None) -> Any:
        y = self.layer(x) * scale * (2 if double else 1)
        return {"x": y, "total": y.sum(), "parts": [x, scale]}


class Ignoring(nn.Module):
    """A network that does not use its first input."""

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Unsupported(nn.Module):
    """A network with an operator that only torch.export has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(self.layer(x)[:, None] * torch.eye(3)).abs()


class Random(nn.Module):
    """Dropout left functional, with its default training=True."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.layer(x), 0.5)


def lively(net: nn.Module, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
    """Give a network weights as after training: at first, much of what goes in makes no odds."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim > 1:
                nn.init.kaiming_normal_(p)
            else:
                nn.init.uniform_(p, -0.5, 0.5) if "bias" in name else nn.init.uniform_(p, 0.5, 1.5)
    if inputs[0].is_floating_point():
        recalibrate(net, list(inputs))
    return net.eval()


def train(module: L.LightningModule, **options: Any) -> tuple[float, L.Trainer]:
    """Train a few steps; return how much the loss fell."""
    x, y = (torch.stack(items)[:256] for items in zip(*digits(), strict=True))
    data = DataLoader(TensorDataset(x, y), batch_size=64)

    def loss() -> float:
        with torch.no_grad():
            return F.cross_entropy(module(x), y).item()

    before = loss()
    trainer = quiet_trainer(max_epochs=3, **options)
    trainer.fit(module, data, data)
    return before - loss(), trainer
