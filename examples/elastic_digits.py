# SPDX-License-Identifier: Apache-2.0
"""A small elastic network in plain torch, and the handwritten digits that ship with scikit-learn.

Two stages of up to three residual blocks. How many blocks of a stage run (depth) and how many
hidden channels a block has may vary; a subnet uses the first of each, by slicing.
"""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_subnet import Choice, SearchSpace, Subnet, SubnetMixin

STAGES, BLOCKS, CHANNELS = 2, 3, 16
HIDDEN = [2, 4, 8, 16]


class ElasticBlock(nn.Module):
    """x + conv(relu(conv(norm(x)))), of which the first `hidden` channels run."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.expand = nn.Conv2d(channels, hidden, 3, padding=1)
        self.project = nn.Conv2d(hidden, channels, 3, padding=1)
        self.hidden = hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.hidden
        y = F.conv2d(self.norm(x), self.expand.weight[:h], self.expand.bias[:h], padding=1)
        return x + F.conv2d(y.relu(), self.project.weight[:, :h], self.project.bias, padding=1)


class ElasticDigits(SubnetMixin, L.LightningModule):
    """The super-network: trained with one random subnet per step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(ElasticBlock(CHANNELS * (s + 1), HIDDEN[-1]) for _ in range(BLOCKS))
            for s in range(STAGES)
        )
        self.downsample = nn.Conv2d(CHANNELS, 2 * CHANNELS, 2, stride=2)
        self.head = nn.Linear(2 * CHANNELS, 10)
        self.depth = [BLOCKS] * STAGES
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def search_space(self) -> SearchSpace:
        choices: dict = {f"depth.{s}": list(range(1, BLOCKS + 1)) for s in range(STAGES)}
        for s in range(STAGES):
            for b in range(BLOCKS):
                runs = {f"depth.{s}": list(range(max(b + 1, 1), BLOCKS + 1))}
                choices[f"hidden.{s * BLOCKS + b}"] = Choice(HIDDEN, when=runs if b else {})
        return SearchSpace(choices)

    def activate(self, subnet: Subnet) -> None:
        self.depth = [subnet[f"depth.{s}"] for s in range(STAGES)]
        for i, block in enumerate(block for stage in self.stages for block in stage):
            block.hidden = subnet[f"hidden.{i}"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for s, stage in enumerate(self.stages):
            x = self.downsample(x) if s else x
            for block in stage[: self.depth[s]]:
                x = block(x)
        return self.head(x.mean(dim=(2, 3)))

    def on_fit_start(self) -> None:
        self.space, self.rng = self.search_space(), np.random.default_rng(0)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        self.activate(self.space.sample(1, self.rng)[0])
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DigitsData(L.LightningDataModule):
    """1,797 scans of 8 x 8 pixels: 1,078 to train on, 719 to validate on, always the same."""

    def setup(self, stage: str) -> None:
        digits = load_digits()
        x = torch.tensor(digits.images[:, None] / 16 - 0.5, dtype=torch.float32)
        y = torch.tensor(digits.target)
        train, val = train_test_split(range(len(y)), test_size=0.4, random_state=0, stratify=y)
        self.train, self.val = (TensorDataset(x[rows], y[rows]) for rows in (train, val))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=256)
