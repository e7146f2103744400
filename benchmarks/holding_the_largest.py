# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning a trained network as a super-network: what its largest subnet loses meanwhile.

    python -m benchmarks.holding_the_largest [--seeds 3] [--steps 50 200] [--batch 32] [--rate 0.01]

A CIFAR-10 ResNet-20 that others have trained (91.7 %) becomes elastic in its inner widths
(`Elasticize`, sorted by L1), and is trained by `SubnetSampling` with SGD and momentum on crops and
flips of 10,000 images. After each number of steps: accuracy on 2,000 test images of the largest
subnet and of those with .75, .5 and .25 of every width, statistics renewed on 1,024 training images
with the training's augmentation. The rules differ in what subnets learn from (labels, the logits of
the largest, or those of the original) and in how much the others count beside the largest
(`others_weight`). One seed of one rule takes about 3 minutes of an idle core for 200 steps.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.data import RESULTS, ROOT, data_folder
from benchmarks.training import QUIET
from lightning_subnet import Elasticize, SubnetSampling, recalibrate

OUT = RESULTS / "holding_the_largest.csv"
WIDTHS = (1, 0.75, 0.5, 0.25)
MEAN, STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Rule = Callable[[nn.Module, int], list[Any]]
RULES: dict[str, Rule] = {
    "labels": lambda _, seed: [SubnetSampling(seed=seed)],
    "labels, others as one": lambda _, seed: [SubnetSampling(seed=seed, others_weight=1 / 3)],
    "largest teaches": lambda _, seed: [SubnetSampling(seed=seed, distill=True)],
    "largest teaches, others as one": lambda _, seed: [
        SubnetSampling(seed=seed, distill=True, others_weight=1 / 3)
    ],
    "original teaches, others as 3": lambda net, seed: [
        SubnetSampling(seed=seed, distill=net, others_weight=1)
    ],
    "original teaches (default)": lambda net, seed: [SubnetSampling(seed=seed, distill=net)],
    "original teaches, and labels": lambda net, seed: [
        SubnetSampling(seed=seed, distill=net, label_weight=1)
    ],
}


def trained_network() -> nn.Module:
    sys.path.insert(0, str(ROOT / "examples"))
    from bring_your_own import pretrained

    return pretrained(data_folder(), 20).eval()


class Crops(Dataset):
    """Training images as the network was trained: cropped out of a black frame, and flipped."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = F.pad(images, (4, 4, 4, 4)), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        top, left, flip = torch.randint(9, ()), torch.randint(9, ()), torch.rand(()) < 1 / 2
        image = self.images[i, :, top : top + 32, left : left + 32]
        return normalised(image.flip(-1) if flip else image), self.labels[i]


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (images - mean) / std


class LitNet(L.LightningModule):
    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=1e-4)


def accuracies(net: Any, train: Crops, test: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Return the accuracy of the largest subnet and narrower ones, in percent."""
    net = copy.deepcopy(net)
    torch.manual_seed(0)
    images = torch.stack([train[int(i)][0] for i in torch.randperm(len(train))[:1024]])
    row, space = {}, net.search_space()
    for place, width in enumerate(WIDTHS):
        values = {name: v[max(0, len(v) - 1 - place)] for name, v in space.values.items()}
        net.activate(space.subnet(values))
        recalibrate(net, images.split(128))
        net.eval()
        with torch.no_grad():
            right = torch.cat([net(part) for part in test[0].split(500)]).argmax(1) == test[1]
        row[f"{width:g}"] = 100 * right.float().mean().item()
    return row


class Watch(L.Callback):
    """Notes accuracies after some steps."""

    def __init__(self, steps: list[int], train: Crops, test: Any) -> None:
        self.steps, self.data, self.rows = steps, (train, test), []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            with torch.random.fork_rng():
                row = accuracies(pl_module.net, *self.data)
            self.rows.append({"steps": trainer.global_step, **row})


def run(label: str, seed: int, steps: list[int], batch: int, rate: float) -> list[dict[str, Any]]:
    data = np.load(data_folder() / "cifar10_small.npz")
    x, x_test = (
        torch.from_numpy(data[f"{name}_x"]).permute(0, 3, 1, 2).float() / 255
        for name in ("train", "test")
    )
    train = Crops(x, torch.from_numpy(data["train_y"]).long())
    test = (normalised(x_test), torch.from_numpy(data["test_y"]).long())
    net = trained_network()
    teacher = copy.deepcopy(net)
    L.seed_everything(seed, verbose=False)
    watch = Watch(steps, train, test)
    model = LitNet(net, rate).train()
    model.example_input_array = torch.zeros(2, 3, 32, 32)
    elastic = Elasticize(widths=(0.25, 0.5, 0.75, 1), depth=False)
    callbacks = [elastic, *RULES[label](teacher, seed), watch]
    trainer = L.Trainer(max_steps=max(steps), max_epochs=-1, callbacks=callbacks, **QUIET)
    trainer.fit(model, DataLoader(train, batch_size=batch, shuffle=True))
    return [{"rule": label, "seed": seed, "batch": batch, "rate": rate, **r} for r in watch.rows]


def report(frame: pd.DataFrame) -> None:
    """Print the mean and the standard deviation over seeds."""
    widths = [f"{width:g}" for width in WIDTHS]
    groups = frame.groupby(["batch", "rate", "steps", "rule"], sort=False)[widths]
    mean, spread = groups.mean(), groups.std().fillna(0)
    table = mean.map("{:.1f}".format) + " ± " + spread.map("{:.1f}".format)
    table["seeds"] = groups.size()
    print(table.to_string(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|example_input_array).*")
    pd.set_option("display.width", 200)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for label in args.rules:
            rows += run(label, seed, args.steps, args.batch, args.rate)
            print(rows[-1], file=sys.stderr, flush=True)
            pd.DataFrame(rows).to_csv(OUT, index=False, float_format="%.2f")
    report(pd.DataFrame(rows))


if __name__ == "__main__":
    main()
