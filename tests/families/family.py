# SPDX-License-Identifier: Apache-2.0
"""A family: a super-network as its project has it, in an ordinary LightningModule, on real data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

N_TRAIN, N_VAL, BATCH = 96, 40, 16
CLASSES, VOCAB, LENGTH = 10, 20, 16
PAD, START = 17, 18  # after the 17 grey values of a digit


@dataclass(frozen=True)
class Family:
    """A family of super-networks.

    Args:
        name: Its name in the matrix.
        build: Returns a LightningModule around the network, with the same weights at each call.
        data: Returns the datasets of training and validation.
        code: What its user writes: one to three lines.
        source: The paper, and the project whose methods the network has.
        tolerance: The largest difference of outputs of a file, relative to their scale.
    """

    name: str
    build: Callable[[], L.LightningModule]
    data: Callable[[], tuple[Dataset, Dataset]]
    code: str
    source: str
    tolerance: float = 1e-4

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        """Return the loaders of training and validation."""
        train, val = self.data()
        generator = torch.Generator().manual_seed(0)
        return (
            DataLoader(train, batch_size=BATCH, shuffle=True, generator=generator),
            DataLoader(val, batch_size=BATCH),
        )


# LightningModules


class Lit(L.LightningModule):
    """An ordinary LightningModule: it knows its network, loss and metrics, and no subnets."""

    def __init__(self, net: nn.Module, example_input: Any = None) -> None:
        super().__init__()
        self.net = net
        self.example_input_array = example_input

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.net(*args, **named)

    def logits_and_targets(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self(batch[0]), batch[1]

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(*self.logits_and_targets(batch))

    def validation_step(self, batch: Any, _: int) -> None:
        logits, targets = self.logits_and_targets(batch)
        self.log("val_loss", F.cross_entropy(logits, targets), batch_size=len(targets))
        self.log("val_acc", (logits.argmax(1) == targets).float().mean(), batch_size=len(targets))


class LitLanguage(Lit):
    """The loss of the next token; batches are tensors of tokens."""

    def logits_and_targets(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = batch[0]
        return self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()


class LitTranslation(Lit):
    """The loss of the next token of a target; batches are (source, target)."""

    def logits_and_targets(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = batch
        return self(source, target)[:, :-1].flatten(0, 1), target[:, 1:].flatten()


class LitText(Lit):
    """Classes of texts; batches are dicts, and the network returns an object with its logits."""

    def logits_and_targets(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        return self(**inputs).logits, batch["labels"]


# Data: real digits, as images and as texts of grey values


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    n = N_TRAIN + N_VAL
    images = torch.tensor(data.images[:n], dtype=torch.float32)
    return images[:, None], torch.tensor(data.target[:n])


def split(*tensors: torch.Tensor) -> tuple[Dataset, Dataset]:
    """Return datasets of training and validation, each of tuples."""
    return (
        TensorDataset(*(x[:N_TRAIN] for x in tensors)),
        TensorDataset(*(x[N_TRAIN:] for x in tensors)),
    )


def images(channels: int = 1, size: int = 8) -> tuple[Dataset, Dataset]:
    """Return images (channels, size, size) and their classes."""
    x, y = _digits()
    x = F.interpolate(x / 8 - 1, size=size, mode="bilinear").expand(-1, channels, -1, -1)
    return split(x.contiguous(), y)


def _texts() -> torch.Tensor:
    """Return digits of 4 × 4 pixels as texts (n, 16) of grey values from 0 to 16."""
    return F.avg_pool2d(_digits()[0], 2).round().long().flatten(1)


def texts() -> tuple[Dataset, Dataset]:
    """Return texts (16), whose next token is to be told."""
    return split(_texts())


def translations() -> tuple[Dataset, Dataset]:
    """Return texts with padding at their end, and the same backwards after a token that starts."""
    source = _texts()[:, :7].clone()
    source[::2, -2:] = PAD
    target = torch.cat([torch.full_like(source[:, :1], START), source.flip(1)], 1)
    return split(source, target)


class Labelled(Dataset):
    """Texts of several lengths with their masks and labels, as dicts."""

    def __init__(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        lengths = LENGTH - torch.arange(len(tokens)) % 6
        self.mask = (torch.arange(LENGTH)[None] < lengths[:, None]).long()
        self.tokens = torch.where(self.mask.bool(), tokens, torch.full_like(tokens, PAD))
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.tokens[i],
            "attention_mask": self.mask[i],
            "labels": self.labels[i],
        }


def labelled_texts() -> tuple[Dataset, Dataset]:
    """Return texts with padding and their classes, as dicts."""
    tokens, labels = _texts(), _digits()[1]
    return (
        Labelled(tokens[:N_TRAIN], labels[:N_TRAIN]),
        Labelled(tokens[N_TRAIN:], labels[N_TRAIN:]),
    )


# Weights


def shaken(net: nn.Module) -> nn.Module:
    """Return a network with no weight or statistic at its initial value, so that none hides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            scale = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(noise, alpha=0.3 * scale if scale > 0 else 0.1)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return net


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network with the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(build())
