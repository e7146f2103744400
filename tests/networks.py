# SPDX-License-Identifier: Apache-2.0
"""Small real super-networks and data for the tests that drive a Trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_subnet import SearchSpace, Subnet, SubnetMixin, SubnetSearch
from lightning_subnet.strategies import RandomSearch

WIDTHS = [4, 8, 16, 32]


class ElasticMlp(SubnetMixin, nn.Module):
    """64 -> width -> 10, the first `width` hidden units run; BatchNorm and dropout stand before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.drop = nn.Dropout(0.1)
        self.first = nn.Linear(64, WIDTHS[-1])
        self.last = nn.Linear(WIDTHS[-1], 10)
        self.width, self.sharpen = WIDTHS[-1], 1

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=WIDTHS, sharpen=[1, 2, 3])

    def activate(self, subnet: Subnet) -> None:
        self.width, self.sharpen = subnet["width"], subnet["sharpen"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.width
        x = self.drop(self.norm(x)) * self.sharpen
        x = F.linear(x, self.first.weight[:w], self.first.bias[:w]).relu()
        return F.linear(x, self.last.weight[:, :w], self.last.bias)


class Count:
    """A number that no search puts back, as it is not an attribute of the module."""

    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class LitMlp(L.LightningModule):
    """An ordinary LightningModule around one elastic child.

    `validations` is a number that it gathers, which a search puts back; `validated` is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = ElasticMlp()
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.validations, self.validated = 0, Count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_validation_epoch_start(self) -> None:
        self.validations += 1
        self.validated.n += 1

    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits() -> TensorDataset:
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    return TensorDataset(x, torch.tensor(data.target))


class Digits(L.LightningDataModule):
    """The digits with an unseeded random_split in setup, as many datamodules have it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.train, self.val, _ = random_split(digits(), [300, 203, 1294])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=50, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        self.calls.append("val_dataloader")
        return DataLoader(self.val, batch_size=50)

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")


def quiet_trainer(**options: Any) -> L.Trainer:
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{**settings, **options})


def search(**settings: Any) -> SubnetSearch:
    """Return a search of six evaluations that is not stored."""
    default = {"objectives": {"val_acc": "max", "macs": "min"}, "budget": 6, "storage": None}
    default |= {"strategy": RandomSearch(batch_size=4), "trainer": quiet_trainer()}
    return SubnetSearch(**{**default, **settings})
