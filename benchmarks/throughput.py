# SPDX-License-Identifier: Apache-2.0
"""How fast the Trainer-driven evaluator measures subnets (C of the benchmark protocol).

    python -m benchmarks.throughput [--parts speed growth scores checks] [--subnets 40] [--whole 5]

On a small elastic MobileNetV3 (digits, 719 images) and on the ResNet-56 of
examples/bring_your_own.py (CIFAR-10, 1,000 images):

Speed: for each of the same random subnets, one after the other in one process: (a) the evaluator,
(b) the naive loop `trainer.validate(model, datamodule=dm)` with two workers, (c) a bare loop
`for batch in cached_batches: model(batch)` that computes no metric. Recalibration is off for all
three and reported by itself.
Growth: 500 evaluations in a row; of memory, threads and open files after the first hundred.
Scores: searches of the same 20 random subnets with `score="network"`, `"extracted"` and each
runtime that is installed, in turns of five evaluations; seconds per evaluation, recalibration,
extraction and conversion included, and the median ratio to `"network"`, subnet by subnet.
Checks: searches of 100 validations of the ResNet-56 with `checks=True` and without, whole calls of
`fit` in turns (with, without, without, with); the share of time that the checks add.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import psutil
import torch
from torch.utils.data import DataLoader

from benchmarks.training import QUIET, digits
from lightning_subnet import Subnet, SubnetSearch
from lightning_subnet.supernets import ElasticMobileNetV3
from lightning_subnet.training import Source, TrainerEvaluator

HERE = Path(__file__).resolve().parent
RUNTIMES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino",)}
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
    calibrated = Source(data)
    with TrainerEvaluator(model, calibrated, trainer=L.Trainer(**QUIET)) as evaluator:
        evaluator.evaluate(subnets[0])
        with_ = [seconds(lambda s=s: evaluator.evaluate(s)) for s in subnets]
    label = f"recalibration on {calibrated.calibration_images} images, s"
    out[label] = np.median(with_) - np.median(t["evaluator"])
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


def searched(
    model: Any, data: Any, budget: int, storage: str | None, **settings: Any
) -> tuple[Any, float]:
    """Search random subnets, the same whatever the settings; return the result, and the seconds."""
    search = SubnetSearch(
        objectives={"val_acc": "max", "macs": "min"},
        strategy="random",
        budget=budget,
        storage=storage,
        name="throughput",
        trainer=L.Trainer(**QUIET),
        verify_front=False,
        **settings,
    )
    start = time.perf_counter()
    result = search.fit(model, data, progress=False)
    return result, time.perf_counter() - start


def scores(model: Any, data: Any, budget: int = 20, turn: int = 5) -> dict[str, Any]:
    """Return the seconds per evaluation of each way to score, and its ratios to `"network"`."""
    ways = [
        "network",
        "extracted",
        *(r for r, needs in RUNTIMES.items() if all(map(find_spec, needs))),
    ]
    histories = {}
    with tempfile.TemporaryDirectory() as folder:
        for done in range(turn, budget + 1, turn):
            for way in ways:  # a storage each: no value is taken from another search
                storage = f"sqlite:///{folder}/{way}.db"
                histories[way] = searched(model, data, done, storage, score=way)[0].history
    subnets = [e.subnet for e in histories["network"]]
    out: dict[str, Any] = {}
    for way, history in histories.items():
        if not history.ok.all() or [e.subnet for e in history] != subnets:
            raise SystemExit(f"score={way!r} evaluated other subnets, or failed: {history[-1]}")
        t = np.array([e.seconds for e in history])
        out[f"{way}, s"] = np.median(t)
        if way != "network":
            ratios = t / np.array([e.seconds for e in histories["network"]])
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            out[f"{way} / network"] = middle
            out[f"{way} / network, quartiles"] = f"{low:.2f}-{high:.2f}"
            gap = history.column("val_acc") - histories["network"].column("val_acc")
            out[f"{way} - network, largest difference of accuracies"] = np.abs(gap).max()
    return out


def checks(model: Any, data: Any, budget: int, rounds: int = 2) -> dict[str, Any]:
    """Return the CPU seconds of searches with the checks and without, and the share that they add.

    Each search has a model of its own, as what a model has passed is not checked again.
    """
    searched(model, data, 3, None, checks=False)  # warms up
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(rounds):
        for on in (True, False) if i % 2 == 0 else (False, True):
            own, start = copy.deepcopy(model), time.process_time()
            searched(own, data, budget, None, checks=on)
            times[on].append(time.process_time() - start)
    added = np.array(times[True]) / np.array(times[False]) - 1
    return {
        "validations": budget,
        "with checks, CPU s": np.mean(times[True]),
        "without, CPU s": np.mean(times[False]),
        "share that checks add": np.mean(added),
        "share by round": " ".join(f"{share:.4f}" for share in added),
    }


def networks() -> dict[str, tuple[Any, Any]]:
    """Return what is measured, by name: the module and its data."""
    both = {"small MobileNetV3": (ElasticMobileNetV3.tiny(n_classes=10, dropout=0.0), Digits())}
    if DATA.is_dir():
        both["ResNet-56"] = (searchable(pretrained()), Cifar10(1000))
    return {name: (LitClassifier(net), data) for name, (net, data) in both.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["speed", "growth", "scores", "checks"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--subnets", type=int, default=40, help="of the small network")
    parser.add_argument("--whole", type=int, default=5, help="subnets of the ResNet-56")
    parser.add_argument("--scored", type=int, default=20, help="subnets of each way to score")
    parser.add_argument("--validations", type=int, default=100, help="of each search with checks")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    there = networks()
    print(f"{torch.get_num_threads()} threads")
    args.out.mkdir(exist_ok=True)

    def told(table: pd.DataFrame | pd.Series, name: str) -> None:
        print(table.to_string(float_format="{:.3g}".format), flush=True)
        table.to_csv(args.out / f"{name}.csv")

    if "speed" in args.parts:
        columns = {}
        for name, (model, data) in there.items():
            n = args.subnets if name == "small MobileNetV3" else args.whole
            columns[name] = measured(model, data, model.net.search_space().sample(n, rng=0))
        told(pd.DataFrame(columns), "throughput")
    if "growth" in args.parts:
        model, data = there["small MobileNetV3"]
        subnets = model.net.search_space().sample(args.subnets, rng=0)
        increase = growth(model, data, subnets)
        told(pd.Series(increase, name="growth over 400 evaluations"), "throughput_growth")
    if "scores" in args.parts:
        columns = {name: scores(*pair, args.scored) for name, pair in there.items()}
        told(pd.DataFrame(columns), "throughput_scores")
    if "checks" in args.parts and "ResNet-56" in there:
        added = checks(*there["ResNet-56"], args.validations)
        told(pd.Series(added, name="ResNet-56"), "throughput_checks")


if __name__ == "__main__":
    main()
