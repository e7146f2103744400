# SPDX-License-Identifier: Apache-2.0
"""Training a super-network with SubnetSampling: what a step costs, and what the sandwich is worth.

    python -m benchmarks.training [--seeds 3] [--epochs 40]

Cost: seconds and peak memory of a sandwich step with k subnets, divided by plain training steps of
the same k subnets, one after the other, in the same process (median of blocks, interleaved); and
the time to activate a subnet of the full MobileNetV3.
Quality: a small elastic MobileNetV3 on scikit-learn's digits, trained with the sandwich rule, with
or without in-place distillation, or with independent random subnets, for the same number of samples
passed forward and backward; accuracy of the smallest, the median (mean of nine around the median
MACs) and the largest subnet after recalibration. Two comparisons have equal optimizer steps too:
four subnets per step of 64 images (sandwich or random), and one random subnet per step of 64 images
against a sandwich of four on 16 images.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import Subnet, SubnetSampling, recalibrate
from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3

HERE = Path(__file__).resolve().parent
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class LitDigits(L.LightningModule):
    def __init__(self, steps: int, net: ElasticMobileNetV3 | None = None) -> None:
        super().__init__()
        self.net = net or ElasticMobileNetV3.tiny(n_classes=10, dropout=0.0)
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1.5e-2, total_steps=self.steps + 1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    data = load_digits()
    x = torch.tensor(data.images[:, None] / 16 - 0.5, dtype=torch.float32)
    y = torch.tensor(data.target)
    rows = train_test_split(range(len(y)), test_size=0.4, random_state=seed, stratify=y)
    train, test = (TensorDataset(x[r], y[r]) for r in rows)
    return train, test


def accuracy(model: LitDigits, subnet: Subnet, train: TensorDataset, test: TensorDataset) -> float:
    model.net.activate(subnet)
    recalibrate(model.net, train.tensors[0][:1024].split(128))
    model.eval()
    with torch.no_grad():
        right = model(test.tensors[0]).argmax(1) == test.tensors[1]
    return right.float().mean().item()


def quality(seeds: int, epochs: int) -> pd.DataFrame:
    """Train with each rule; every run passes `4 * epochs` times the training data."""
    rows = []
    for seed in range(seeds):
        train, test = digits(seed)
        rules = {  # callback, images per step, epochs
            "sandwich + distillation": (SubnetSampling(distill=True, seed=seed), 64, epochs),
            "sandwich": (SubnetSampling(seed=seed), 64, epochs),
            "four random": (SubnetSampling("random", n_random=4, seed=seed), 64, epochs),
            "sandwich + distillation, 16 images": (
                SubnetSampling(distill=True, seed=seed),
                16,
                epochs,
            ),
            "one random": (SubnetSampling("random", n_random=1, seed=seed), 64, 4 * epochs),
        }
        for label, (sampling, images, times) in rules.items():
            L.seed_everything(seed, verbose=False)
            loader = DataLoader(train, batch_size=images, shuffle=True)
            model = LitDigits(steps=len(loader) * times)
            start = time.perf_counter()
            L.Trainer(max_epochs=times, callbacks=[sampling], **QUIET).fit(model, loader)
            seconds = time.perf_counter() - start
            space = model.net.search_space()
            macs = {m.name: m for m in model.net.exact_measures()}["macs"]
            X = space.sample_indices(1001, 0)
            middle = space.from_indices(X[np.argsort(macs(X))[460:541:10]])
            row = {"training": label, "seed": seed, "steps": len(loader) * times}
            row["seconds"] = round(seconds, 1)
            row["smallest"] = accuracy(model, space.smallest, train, test)
            row["median"] = float(np.mean([accuracy(model, s, train, test) for s in middle]))
            row["largest"] = accuracy(model, space.largest, train, test)
            rows.append(row)
            print(row, flush=True)
    return pd.DataFrame(rows)


def cost(blocks: int = 7, steps: int = 6) -> dict[str, float]:
    """Return the ratio of a sandwich step to plain steps of the same subnets, and of the memory."""
    torch.manual_seed(0)
    net = ElasticMobileNetV3.small()
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    data = DataLoader(TensorDataset(x, y), batch_size=32)
    ratios = []
    for block in range(blocks + 1):
        sampling = SubnetSampling(n_random=2, seed=block)
        sampling._part = net
        subnets = [sampling.subnets(t) for t in range(steps)]
        shared = LitDigits(steps, net)
        seconds = {}
        for label in ("sandwich", "plain") if block % 2 else ("plain", "sandwich"):
            start = time.perf_counter()
            if label == "sandwich":
                trainer = L.Trainer(max_epochs=steps, callbacks=[sampling], **QUIET)
                trainer.fit(shared, data)
            else:
                flat = [s for step in subnets for s in step]
                plain = Activate(flat)
                model = LitDigits(len(flat), net)
                L.Trainer(max_epochs=len(flat), callbacks=[plain], **QUIET).fit(model, data)
            seconds[label] = time.perf_counter() - start
        if block:  # the first warms up
            ratios.append(seconds["sandwich"] / seconds["plain"])
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {"sandwich / plain, time": median, "lower quartile": low, "upper quartile": high}


class Activate(L.Callback):
    """One given subnet per step, in turn."""

    def __init__(self, subnets: list[Subnet]) -> None:
        self.subnets = subnets

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        module.net.activate(self.subnets[trainer.global_step])


class SavedBytes:
    """Bytes that autograd keeps for backward passes: the most alive at one time."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        size = tensor.nbytes
        self.alive += size
        self.peak = max(self.peak, self.alive)
        return Kept(tensor, size, self)


class Kept:
    def __init__(self, tensor: torch.Tensor, size: int, count: SavedBytes) -> None:
        self.tensor, self.size, self.count = tensor, size, count

    def __del__(self) -> None:
        self.count.alive -= self.size


def memory() -> dict[str, float]:
    """Return the activations kept by a sandwich step over those of a plain step of the largest."""
    torch.manual_seed(0)
    data = DataLoader(
        TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(10, (32,))), batch_size=32
    )
    peaks = {}
    for label in ("plain", "sandwich"):
        net = ElasticMobileNetV3.small()
        calls = [SubnetSampling(n_random=2, distill=True)] if label == "sandwich" else []
        counter = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda kept: kept.tensor):
            L.Trainer(max_steps=2, callbacks=calls, **QUIET).fit(LitDigits(2, net), data)
        peaks[label] = counter.peak
    return {"sandwich / largest alone, activations": peaks["sandwich"] / peaks["plain"]}


def activation() -> dict[str, float]:
    net = ElasticMobileNetV3()
    subnets = net.search_space().sample(500, 0)
    times = []
    for subnet in subnets:
        start = time.perf_counter()
        net.activate(subnet)
        times.append(time.perf_counter() - start)
    return {"activate a subnet of the full MobileNetV3, ms": float(np.median(times)) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    figures = {**cost(), **memory(), **activation()}
    print(pd.Series(figures).to_string(float_format="{:.3f}".format))
    frame = quality(args.seeds, args.epochs)
    frame.to_csv(out / "training_quality.csv", index=False)
    pd.Series(figures, name="value").to_csv(out / "training_cost.csv")
    means = frame.groupby("training", sort=False)[
        ["steps", "smallest", "median", "largest", "seconds"]
    ]
    print(means.agg(["mean", "std"]).round(4).to_string())


if __name__ == "__main__":
    main()
