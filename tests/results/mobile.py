# SPDX-License-Identifier: Apache-2.0
"""A search over a small MobileNetV3, run once for the tests of all that is made of its front."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import Latency, SearchResult, SubnetSearch
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import Digits, quiet_trainer


class LitMobile(L.LightningModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or ElasticMobileNetV3.tiny(n_classes=10, depths=(1, 2), widths=(8, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.reshape(-1, 1, 8, 8))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=3e-3)


@cache
def searched() -> tuple[LitMobile, SearchResult]:
    """Return the model and the result, which no test may change."""
    torch.manual_seed(0)
    model = LitMobile()
    search = SubnetSearch(
        objectives={"val_acc": "max", "macs": "min", "latency_ms": "min"}, name="digits",
        measures=[Latency(seconds=0.05)], strategy="random", budget=4, storage=None,
        trainer=quiet_trainer(), verify_front=False,
    )  # fmt: skip
    return model, search.fit(model, Digits(), progress=False)
