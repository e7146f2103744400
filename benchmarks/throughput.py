# SPDX-License-Identifier: Apache-2.0
"""How fast the Trainer-driven evaluator measures subnets (C of the benchmark protocol).

    python -m benchmarks.throughput [--subnets 40] [--whole 5]

For each of the same random subnets, one after the other in one process: (a) the evaluator, (b) the
naive loop `trainer.validate(model, datamodule=dm)` with two workers, (c) a bare loop
`for batch in cached_batches: model(batch)` that computes no metric. Recalibration is off for all
three and reported by itself. On a small elastic MobileNetV3 (digits, 719 images) and on the
ResNet-56 of examples/bring_your_own.py (CIFAR-10, 1,000 images). Then 500 evaluations in a row:
growth of memory, threads and open files after the first hundred.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import psutil
import torch
from torch.utils.data import DataLoader

from benchmarks.training import QUIET, digits
from lightning_subnet import Subnet
from lightning_subnet.supernets import ElasticMobileNetV3
from lightning_subnet.training import Source, TrainerEvaluator

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
from bring_your_own import DATA, Cifar10, LitClassifier, pretrained, searchable  # noqa: E402 - examples are no package


class Digits(L.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.train, self.val = digits(0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=128)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=256)


class TwoWorkers(L.LightningDataModule):
    """The same data, loaded as a user would load it."""

    def __init__(self, data: L.LightningDataModule) -> None:
        super().__init__()
        self.data = data

    def setup(self, stage: str) -> None:
        self.data.setup(stage)

    def val_dataloader(self) -> DataLoader:
        loader = self.data.val_dataloader()
        return DataLoader(
            loader.dataset, batch_size=loader.batch_size, num_workers=2, persistent_workers=True
        )


def seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def measured(model: Any, data: L.LightningDataModule, subnets: list[Subnet]) -> dict[str, Any]:
    """Return subnets per second of the three ways, and the evaluator's ratios to the others."""
    trainer, naive_data = L.Trainer(**QUIET), TwoWorkers(data)
    data.setup("fit")
    batches = list(data.val_dataloader())

    def naive(subnet: Subnet) -> None:
        model.net.activate(subnet)
        trainer.validate(model, datamodule=naive_data, verbose=False)

    def bare(subnet: Subnet) -> None:
        model.net.activate(subnet)
        model.eval()
        with torch.inference_mode():
            for batch in batches:
                model(batch[0])

    times: dict[str, list[float]] = {"evaluator": [], "naive": [], "bare": []}
    source = Source(data, calibration_images=0)
    for i, subnet in enumerate([subnets[0], *subnets]):  # the first warms up
        model.eval()
        with TrainerEvaluator(model, source, trainer=L.Trainer(**QUIET)) as evaluator:
            evaluator.evaluate(subnets[-1])
            row = {"evaluator": seconds(lambda s=subnet: evaluator.evaluate(s))}
            row["bare"] = seconds(lambda s=subnet: bare(s))
        row["naive"] = seconds(lambda s=subnet: naive(s))
        for name, value in row.items():
            if i:
                times[name].append(value)
    t = {name: np.array(values) for name, values in times.items()}
    out: dict[str, Any] = {f"{name}, subnets/s": 1 / np.median(v) for name, v in t.items()}
    for other, label in (("naive", "speed / naive"), ("bare", "speed / bare")):
        low, middle, high = np.quantile(t[other] / t["evaluator"], [0.25, 0.5, 0.75])
        out[label] = middle
        out[f"{label}, quartiles"] = f"{low:.2f}-{high:.2f}"
    calibrated = Source(data, calibration_images=256)
    with TrainerEvaluator(model, calibrated, trainer=L.Trainer(**QUIET)) as evaluator:
        evaluator.evaluate(subnets[0])
        with_ = [seconds(lambda s=s: evaluator.evaluate(s)) for s in subnets]
    out["recalibration on 256 images, s"] = np.median(with_) - np.median(t["evaluator"])
    return out


def growth(model: Any, data: L.LightningDataModule, subnets: list[Subnet]) -> dict[str, float]:
    """Return the growth of the process by 500 evaluations, after the first hundred."""
    process = psutil.Process()

    def state() -> np.ndarray:
        gc.collect()
        return np.array(
            [process.memory_info().rss / 2**20, process.num_threads(), process.num_fds()]
        )

    with TrainerEvaluator(model, Source(data), trainer=L.Trainer(**QUIET)) as evaluator:
        for i in range(500):
            evaluator.evaluate(subnets[i % len(subnets)])
            if i == 99:
                before = state()
        increase = state() - before
    return dict(zip(("memory, MiB", "threads", "open files"), increase, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subnets", type=int, default=40, help="of the small network")
    parser.add_argument("--whole", type=int, default=5, help="subnets of the ResNet-56")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    columns = {}
    small = LitClassifier(ElasticMobileNetV3.tiny(n_classes=10, dropout=0.0))
    subnets = small.net.search_space().sample(args.subnets, rng=0)
    columns["small MobileNetV3"] = measured(small, Digits(), subnets)
    if DATA.is_dir():
        resnet = LitClassifier(searchable(pretrained()))
        space = resnet.net.search_space()
        columns["ResNet-56"] = measured(resnet, Cifar10(1000), space.sample(args.whole, rng=0))
    table = pd.DataFrame(columns)
    increase = pd.Series(growth(small, Digits(), subnets), name="growth over 400 evaluations")
    print(f"{torch.get_num_threads()} threads")
    print(table.to_string(float_format="{:.3g}".format))
    print(increase.to_string())
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    table.to_csv(out / "throughput.csv")
    increase.to_csv(out / "throughput_growth.csv")


if __name__ == "__main__":
    main()
