# SPDX-License-Identifier: Apache-2.0
"""Training a super-network with SubnetSampling: what a step costs, and what the sandwich is worth.

    python -m benchmarks.training [--seeds 3] [--epochs 40] [--cost]

Cost: seconds of a sandwich step with k subnets, divided by those of plain training steps of the
same k subnets, one after the other, in the same process (processor time of one thread; median of
interleaved blocks); memory at its peak, of all that is allocated and of the whole process, divided
by that of plain steps of the largest subnet; and the time to activate a subnet of the full
MobileNetV3.
Quality: a small elastic MobileNetV3 on scikit-learn's digits, trained with the sandwich rule, with
or without in-place distillation, or with independent random subnets, for the same number of samples
passed forward and backward; accuracy of the smallest, the median (mean of nine around the median
MACs) and the largest subnet after recalibration. Two comparisons have equal optimizer steps too:
four subnets per step of 64 images (sandwich or random), and one random subnet per step of 64 images
against a sandwich of four on 16 images. `benchmarks.supernets` does the same on photographs.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import accumulate
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

from lightning_subnet import SearchSpace, Subnet, SubnetSampling, recalibrate
from lightning_subnet.supernets import ElasticMobileNetV3
from lightning_subnet.training.sampling_rules import step_subnets, uniform

HERE = Path(__file__).resolve().parent
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
DISTILLED = "sandwich + distillation"


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


# What is shared with benchmarks.supernets


def rules(seed: int, images: int, epochs: int) -> dict[str, tuple[SubnetSampling, int, int]]:
    """Return by label: the callback, the images per optimizer step, and the epochs.

    All pass 4 * epochs times the training data forward and backward.
    """
    fewer = images // 4
    return {
        DISTILLED: (SubnetSampling(distill=True, seed=seed), images, epochs),
        "sandwich": (SubnetSampling(seed=seed), images, epochs),
        "four random": (SubnetSampling("random", n_random=4, seed=seed), images, epochs),
        f"{DISTILLED}, {fewer} images": (SubnetSampling(distill=True, seed=seed), fewer, epochs),
        "one random": (SubnetSampling("random", n_random=1, seed=seed), images, 4 * epochs),
    }


def accuracy(
    model: Any, train: TensorDataset, test: TensorDataset, subnet: Subnet | None = None
) -> float:
    """Recalibrate on the first 1,024 training images, and return the accuracy of a subnet."""
    if subnet is not None:
        model.net.activate(subnet)
    recalibrate(model.net, train.tensors[0][:1024].split(128))
    model.eval()
    x, y = test.tensors
    with torch.no_grad():
        right = torch.cat([model(part) for part in x.split(1000)]).argmax(1) == y
    return right.float().mean().item()


def macs_of(net: Any) -> Any:
    """Return the table of exact MACs of a network."""
    return {m.name: m for m in net.exact_measures()}["macs"]


def three_sizes(net: Any, value: Callable[[Subnet], float]) -> dict[str, float]:
    """Return a value of the smallest, of nine subnets around the median MACs, of the largest."""
    space = net.search_space()
    X = space.sample_indices(1001, 0)
    middle = space.from_indices(X[np.argsort(macs_of(net)(X))[460:541:10]])
    return {
        "smallest": value(space.smallest),
        "median": float(np.mean([value(s) for s in middle])),
        "largest": value(space.largest),
    }


def quality(seeds: int, epochs: int) -> pd.DataFrame:
    """Train with each rule."""
    rows = []
    for seed in range(seeds):
        train, test = digits(seed)
        for label, (sampling, images, times) in rules(seed, 64, epochs).items():
            L.seed_everything(seed, verbose=False)
            loader = DataLoader(train, batch_size=images, shuffle=True)
            model = LitDigits(steps=len(loader) * times)
            start = time.perf_counter()
            L.Trainer(max_epochs=times, callbacks=[sampling], **QUIET).fit(model, loader)
            seconds = time.perf_counter() - start
            row = {"training": label, "seed": seed, "steps": len(loader) * times}
            row["seconds"] = round(seconds, 1)
            row |= three_sizes(model.net, partial(accuracy, model, train, test))
            rows.append(row)
            print(row, flush=True)
    return pd.DataFrame(rows)


# Cost


class Activate(L.Callback):
    """One given subnet per step, in turn."""

    def __init__(self, subnets: list[Subnet]) -> None:
        self.subnets = subnets

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        module.net.activate(self.subnets[trainer.global_step])


class Stopwatch(L.Callback):
    """Processor seconds from the first step to the last."""

    def on_train_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.process_time() - self.start


def one_epoch(net: ElasticMobileNetV3, steps: int, callback: L.Callback | None) -> float:
    """Train for some steps on one batch of 32 images; return the seconds of the steps."""
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = (images, torch.arange(32) % 10)
    watch = Stopwatch()
    callbacks = [watch] if callback is None else [watch, callback]
    trainer = L.Trainer(max_epochs=1, callbacks=callbacks, **QUIET)
    trainer.fit(LitDigits(steps, net), DataLoader([batch] * steps, batch_size=None))
    return watch.seconds


def sandwiches(space: SearchSpace, steps: int, seed: int) -> list[Subnet]:
    """Return the subnets that `SubnetSampling(n_random=2, seed=seed)` trains, one after another."""
    draw, largest = uniform(space, seed), space.largest
    return [
        subnet
        for step in range(steps)
        for subnet in step_subnets("sandwich", largest, space, draw, step=step, n_random=2)
    ]


def cost(blocks: int = 9, steps: int = 2) -> dict[str, float]:
    """Return the ratio of sandwich steps to plain steps of the same subnets."""
    torch.manual_seed(0)
    net = ElasticMobileNetV3.small()
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for block in range(blocks + 1):
        seconds: dict[Any, float] = {}
        subnets = sandwiches(net.search_space(), steps, block)
        labels = [False, True, "plain"]  # without distillation, with it
        for label in labels if block % 2 else labels[::-1]:
            if label == "plain":
                seconds[label] = one_epoch(net, len(subnets), Activate(subnets))
            else:
                sampling = SubnetSampling(n_random=2, distill=label is True, seed=block)
                seconds[label] = one_epoch(net, steps, sampling)
        for distilled, values in ratios.items():
            if block:  # the first warms up
                values.append(seconds[distilled] / seconds["plain"])
    row = {}
    for distilled, values in ratios.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        label = f"{DISTILLED if distilled else 'sandwich'} / plain, time"
        row |= {label: median, f"{label}, lower quartile": low, f"{label}, upper quartile": high}
    return row


def allocated(distill: bool | None) -> int:
    """Return the bytes at the peak of two steps, by the allocator; None: plain, of the largest.

    So weights, gradients, the states of the optimizer, activations and whatever else there is.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        _two_steps(distill)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def resident(distill: bool | None) -> int:
    """Return the KiB by which two steps raise the peak of the process; for a new one."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    before = _high_water()
    _two_steps(distill)
    return _high_water() - before


def _high_water() -> int:
    """Return the KiB of this process at their peak (Linux); ru_maxrss is also of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def _two_steps(distill: bool | None) -> None:
    torch.manual_seed(0)
    net = ElasticMobileNetV3.small()
    one_epoch(net, 2, None if distill is None else SubnetSampling(distill=distill))


def memory() -> dict[str, float]:
    """Return the peak of training with the callback over that of training the largest subnet."""
    row, context = {}, multiprocessing.get_context("spawn")
    for label, peak in (("allocated", allocated), ("resident", resident)):
        peaks = {}
        for distill in (None, False, True):
            if peak is allocated:
                peaks[distill] = peak(distill)
                continue
            with context.Pool(1) as pool:
                peaks[distill] = pool.apply(peak, (distill,))
        for distill, name in ((False, "sandwich"), (True, DISTILLED)):
            row[f"{name} / largest alone, memory {label}"] = peaks[distill] / peaks[None]
    return row


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
    parser.add_argument("--cost", action="store_true", help="nothing but the cost")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    figures = {**cost(), **memory(), **activation()}
    print(pd.Series(figures).to_string(float_format="{:.3f}".format))
    pd.Series(figures, name="value").to_csv(out / "training_cost.csv")
    if args.cost:
        return
    frame = quality(args.seeds, args.epochs)
    frame.to_csv(out / "training_quality.csv", index=False)
    means = frame.groupby("training", sort=False)[
        ["steps", "smallest", "median", "largest", "seconds"]
    ]
    print(means.agg(["mean", "std"]).round(4).to_string())


if __name__ == "__main__":
    main()
