# SPDX-License-Identifier: Apache-2.0
"""The worth of a super-network: against other ways to train one, and its subnets alone.

    python -m benchmarks.supernets [--parts rules alone] [--rules ...] [--searched ...]
                                   [--seeds 0 1] [--epochs 6]
    python -m benchmarks.supernets --report

The elastic ResNet, the images and the recipe of examples/images.py, on one thread; a row is written
as soon as it is finished, and what is there is not made again. Seconds are of the processor
(in rows of commit 3f2bec6 of the clock, on another machine: not to be compared).
Rules, for the same number of samples passed forward and backward, four times the data per epoch of
--epochs: the sandwich rule with in-place distillation (of labels and teacher, as in OFA, and of the
teacher alone, as in BigNAS) and independent random subnets; accuracy of the smallest, the median
(mean of nine around the median MACs) and the largest subnet after recalibration, on 2,000 test
images. There are four subnets per step of 64 images (sandwich or random), one random subnet per
step of 64 and of 32 images, a sandwich of four on 16 images, and the sandwich in turns, two subnets
per step of 32 images; of the last there is one with 1 / 1.4 of the passes too, and one random
subnet of 32 images has one with the multiply-adds (MACs) of the turns: 2.06 times the passes.
Alone: the super-network of a rule (--searched; the sandwich on 64 images) is searched (accuracy of
1,000 images against MACs), and five subnets spread over the front are trained from scratch with the
same recipe and images per step for the same epochs; accuracy of both on the other 1,000 images, and
the seconds of both ways (of the search: of its evaluations). Every network is recalibrated on a
thousand training images as they are, not augmented: `benchmarks.calibration` tells what that costs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from functools import cache, partial
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.data import RESULTS, ROOT, SCRATCH, data_folder
from benchmarks.search_efficiency import commit, write
from benchmarks.training import DISTILLED, QUIET, accuracy, macs_of, rules, three_sizes
from lightning_subnet import Evaluation, SubnetSampling, SubnetSearch, extract

IMAGES, EPOCHS, SEEDS, BUDGET, FEW = 64, 6, [0, 1, 2], 60, 5
VALIDATED = 1000  # and as many test
RULES, ALONE = RESULTS / "supernets_rules.csv", RESULTS / "supernets_alone.csv"
FOLDER = SCRATCH / "supernets"
KEYS = {
    RULES: ["train", "epochs", "training", "seed"],
    ALONE: ["train", "epochs", "training", "seed", "place"],
}
SIZES = ["smallest", "median", "largest"]
TAUGHT = f"{DISTILLED} + labels"
TURNS, ONE = f"turns + distillation + labels, {IMAGES // 2} images", "one random"
FEWER, LONGER = f"{TURNS}, fewer passes", f"{ONE}, {IMAGES // 2} images, MACs of turns"


@cache
def example() -> Any:
    """Return examples/images.py."""
    os.environ.setdefault("LIGHTNING_SUBNET_DATA", str(data_folder()))
    sys.path.insert(0, str(ROOT / "examples"))
    import images

    return images


@cache
def parts(train: int) -> tuple[TensorDataset, ...]:
    """Return images to train on, to validate and to test, and a thousand to recalibrate with."""
    path = data_folder() / "cifar10_small.npz"
    whole, val, test = example().photographs(train, VALIDATED, path)
    calibration = TensorDataset(*whole[:: max(1, train // 1000)])
    return whole, val, test, calibration


def trained(
    net: nn.Module, images: TensorDataset, batch: int, epochs: int, callbacks: list[L.Callback]
) -> tuple[Any, int, float]:
    """Train a network by the recipe of the example; return the module, its steps and seconds."""
    model = example().LitImages(net.to(memory_format=torch.channels_last))  # faster on a CPU
    loader = DataLoader(images, batch, shuffle=True, collate_fn=example().augmented, drop_last=True)
    start = time.process_time()
    trainer = L.Trainer(max_epochs=epochs, limit_val_batches=0, callbacks=callbacks, **QUIET)
    trainer.fit(model, loader)
    return model, trainer.global_step, time.process_time() - start


def done(path: Any, row: dict[str, Any]) -> bool:
    """Return whether a row of these keys is there."""
    if not path.exists():
        return False
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return any(all(r[k] == str(row[k]) for k in row) for r in frame.to_dict("records"))


def ways(seed: int, epochs: int) -> dict[str, tuple[SubnetSampling, int, int]]:
    """Return by label, as `rules` does: the callback, the images per step, and the epochs."""
    shared = rules(seed, IMAGES, epochs)

    def taught(rule: Any) -> SubnetSampling:
        return SubnetSampling(rule, distill=True, label_weight=1, seed=seed)

    half, quarter = IMAGES // 2, IMAGES // 4
    return {
        TURNS: (taught("turns"), half, 2 * epochs),
        FEWER: (taught("turns"), half, round(2 * epochs / 1.4)),
        ONE: shared[ONE],
        f"{ONE}, {half} images": (shared[ONE][0], half, 4 * epochs),
        LONGER: (shared[ONE][0], half, round(4 * epochs * 2.06)),
        TAUGHT: (taught("sandwich"), IMAGES, epochs),
        "four random": shared["four random"],
        DISTILLED: shared[DISTILLED],
        f"{TAUGHT}, {quarter} images": (taught("sandwich"), quarter, epochs),
    }


def macs_passed(sampling: SubnetSampling, net: Any, steps: int, batch: int) -> float:
    """Return the MACs of all passes; a backward pass counts as two forward ones."""
    subnets = [subnet for step in range(steps) for subnet in sampling.subnets(step)]
    return 3 * batch * macs_of(net)(net.search_space().indices(subnets)).sum()


def by_rule(label: str, seed: int, epochs: int, train: int) -> Any:
    """Train a super-network by a rule; keep it, and write its row."""
    sampling, batch, times = ways(seed, epochs)[label]
    images, val, test, calibration = parts(train)
    both = TensorDataset(*(torch.cat(pair) for pair in zip(val.tensors, test.tensors, strict=True)))
    L.seed_everything(seed, verbose=False)
    model, steps, seconds = trained(example().network(), images, batch, times, [sampling])
    row = {"train": train, "epochs": epochs, "training": label, "seed": seed, "steps": steps}
    sizes = three_sizes(model.net, partial(accuracy, model, calibration, both))
    row |= {size: round(value, 5) for size, value in sizes.items()}
    row |= {"seconds": round(seconds, 1), "commit": commit()}
    row["tera_macs"] = round(macs_passed(sampling, model.net, steps, batch) / 1e12, 1)
    path = checkpoint_of(label, seed, epochs, train)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": model.state_dict(), "seconds": seconds}, path)
    write(RULES, pd.DataFrame([row]), KEYS[RULES])
    print(row, file=sys.stderr, flush=True)


def checkpoint_of(label: str, seed: int, epochs: int, train: int) -> Any:
    """Return where the weights of a super-network are."""
    return FOLDER / f"{label.replace(' ', '')}-{seed}-{epochs}-{train}.pt"


def compare_rules(labels: list[str], seeds: list[int], epochs: int, train: int) -> None:
    for seed in seeds:
        for label in labels:
            row = {"train": train, "epochs": epochs, "training": label, "seed": seed}
            if not done(RULES, row):
                by_rule(label, seed, epochs, train)


def alone(label: str, seed: int, epochs: int, train: int, budget: int) -> None:
    """Search a super-network of a rule, and train five subnets of its front from scratch."""
    keys = {"train": train, "epochs": epochs, "training": label, "seed": seed}
    if all(done(ALONE, {**keys, "place": place}) for place in range(FEW)):
        return
    path = checkpoint_of(label, seed, epochs, train)
    if not path.exists():
        by_rule(label, seed, epochs, train)
    _, batch, times = ways(seed, epochs)[label]
    images, val, test, calibration = parts(train)
    checkpoint = torch.load(path)
    model = example().LitImages(example().network())
    model.load_state_dict(checkpoint["weights"])
    front, seconds_of_search = front_of(model, val, calibration, path.stem, budget)
    chosen = [front[i] for i in np.linspace(0, len(front) - 1, FEW).round().astype(int)]
    for place, e in enumerate(chosen):
        row: dict[str, Any] = {**keys, "place": place}
        if done(ALONE, row):
            continue
        row |= {"macs": f"{e.values['macs']:.0f}", "searched": round(e.values["val_acc"], 5)}
        row["shared"] = round(accuracy(model, calibration, test, e.subnet), 5)
        L.seed_everything(seed, verbose=False)
        plain = extract(model, e.subnet).train()
        for module in plain.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        net, _, seconds = trained(plain, images, batch, times, [])
        row["alone"] = round(accuracy(net, calibration, test), 5)
        row |= {
            "seconds_alone": round(seconds, 1),
            "seconds_shared": round(checkpoint["seconds"], 1),
        }
        row |= {"seconds_searched": round(seconds_of_search, 1), "commit": commit()}
        write(ALONE, pd.DataFrame([row]), KEYS[ALONE])
        print(row, file=sys.stderr, flush=True)


def front_of(
    model: Any, val: TensorDataset, calibration: TensorDataset, name: str, budget: int
) -> tuple[list[Evaluation], float]:
    """Return the front of accuracy against MACs, smallest first, and the seconds of the search."""
    search = SubnetSearch(
        objectives={"val_acc": "max", "macs": "min"},
        budget=budget,
        storage=f"sqlite:///{FOLDER}/search.db",
        name=f"{name}-{budget}",
        trainer=L.Trainer(**QUIET),
    )
    result = search.fit(
        model,
        dataloaders=DataLoader(val, 250),
        train_dataloaders=DataLoader(calibration, 128),
        progress=False,
    )
    front = sorted(result.front, key=lambda e: e.values["macs"])
    return front, sum(e.seconds for e in result.history)


def report(train: int, epochs: int) -> None:
    """Print what is there for these epochs."""
    for path, title in ((RULES, "Accuracy by rule, %"), (ALONE, "The front, shared and alone, %")):
        if not path.exists():
            continue
        frame = pd.read_csv(path)
        frame = frame[(frame.train == train) & (frame.epochs == epochs)]
        if frame.empty:
            continue
        print(f"\n{title} ({epochs} epochs of {train:,} images, seeds {sorted(set(frame.seed))})")
        if path == RULES:
            frame[SIZES] *= 100
            columns = [*SIZES, "steps", "tera_macs", "seconds"]
            table = frame.groupby("training")[columns].agg(["mean", "std"])
            order = [label for label in ways(0, epochs) if label in table.index]
            exact = [("steps", "std"), ("tera_macs", "std")]
            print(table.loc[order].drop(columns=exact).round(1).to_string())
            continue
        accuracies = ["searched", "shared", "alone"]
        frame[accuracies] *= 100
        frame["gap"] = frame.shared - frame.alone
        frame["M MACs"] = frame.macs / 1e6
        columns = ["training", "seed", "M MACs", *accuracies, "gap", "seconds_alone"]
        print(frame[columns].round(1).to_string())
        for (label, seed), rows in frame.groupby(["training", "seed"]):
            print(
                f"{label}, seed {seed}: shared - alone {rows.gap.mean():+.1f} points on average "
                f"({rows.gap.min():+.1f} to {rows.gap.max():+.1f}); the super-network took "
                f"{rows.seconds_shared.iloc[0]:.0f} s and its search "
                f"{rows.seconds_searched.iloc[0]:.0f} s, "
                f"{len(rows)} trainings alone {rows.seconds_alone.sum():.0f} s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts_there = ["rules", "alone"]
    parser.add_argument("--parts", nargs="+", default=parts_there, choices=parts_there)
    rules_there = list(ways(0, 1))
    parser.add_argument("--rules", nargs="+", default=rules_there, choices=rules_there)
    parser.add_argument("--searched", default=TAUGHT, choices=rules_there, help="rule of 'alone'")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--train", type=int, default=10_000, help="images to train on")
    parser.add_argument("--budget", type=int, default=BUDGET, help="evaluations of the search")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    args = parser.parse_args()
    pd.set_option("display.width", 200)
    if not args.report:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        if "rules" in args.parts:
            compare_rules(args.rules, args.seeds, args.epochs, args.train)
        if "alone" in args.parts:
            alone(args.searched, args.seeds[0], args.epochs, args.train, args.budget)
    report(args.train, args.epochs)


if __name__ == "__main__":
    main()
