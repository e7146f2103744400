# SPDX-License-Identifier: Apache-2.0
"""A live search: the ResNet-56 that nobody trained as a super-network (A of the protocol, 5).

    python -m benchmarks.resnet56 [--pairs macs latency] [--strategies hybrid] [--budget 100]
    python -m benchmarks.resnet56 --report

2^24 subnets of a pre-trained CIFAR-10 ResNet-56 (examples/bring_your_own.py): any of 24 blocks may
be skipped. Every number comes from `SubnetSearch.fit(model, datamodule)` on one thread: accuracy on
1,000 validation images after recalibrating BatchNorm on 512 training images that are cropped and
mirrored as the training's were, against exact MACs (a count of blocks here: all cost the same) and
against measured latency (batch 1, where early blocks take longer). Rows of "256 plain" recalibrated
on 256 images as they are, which costs every subnet accuracy: their hypervolumes are not to be
compared with others. The square is 95 % to 40 % accuracy, and 9 % to 100 % of the largest subnet's
cost. Three seeds of a pair take about 40 minutes of an idle core, which the latency needs. Both
pairs and all runs share one storage, so an accuracy is measured once and counts in each run; a run
that was stopped goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch

from benchmarks.curves import from_text, to_text
from benchmarks.data import RESULTS, ROOT, SCRATCH, data_folder
from benchmarks.efficiency_runs import settings_hash, strategy_of
from benchmarks.problems import in_square
from benchmarks.search_efficiency import commit, versions, write
from benchmarks.training import QUIET
from lightning_subnet import Latency, SearchResult, SubnetSearch
from lightning_subnet.strategies import names
from lightning_subnet.study import pareto

STRATEGIES = ("random", "nsga2", "linas", "hybrid")
PAIRS = {"macs": "macs", "latency": "latency_ms"}
IMAGES, CALIBRATION = 1000, 512
RECALIBRATED = f"{CALIBRATION} augmented"
ACCURACY, COST = (0.95, 0.40), (0.09, 1.0)  # best and worst; cost as a share of the largest's
SEEDS = 3
CHECKPOINTS = (20, 50, 100)
KEYS = ["pair", "recalibrated", "strategy", "settings", "budget", "seed"]
OUT = RESULTS / "resnet56.csv"
# Two timings of the network are 20 ms: half a second of turns tells 1 % apart.
TIMING = Latency(batch_size=1, seconds=0.5, tolerance=0.01)


def model_and_data() -> tuple[Any, Any]:
    os.environ.setdefault("LIGHTNING_SUBNET_DATA", str(data_folder()))
    sys.path.insert(0, str(ROOT / "examples"))
    from bring_your_own import Cifar10, LitClassifier, pretrained, searchable

    folder = data_folder()
    return LitClassifier(searchable(pretrained(folder))), Cifar10(IMAGES, folder)


def fit(pair: str, label: str, seed: int, budget: int, parts: tuple[Any, Any]) -> SearchResult:
    """Make or finish one run."""
    SCRATCH.mkdir(exist_ok=True)
    search = SubnetSearch(
        objectives={"val_acc": "max", PAIRS[pair]: "min"},
        measures=[TIMING] if pair == "latency" else [],
        strategy=strategy_of(label, "resnet56"),
        budget=budget,
        storage=f"sqlite:///{SCRATCH}/resnet56-{CALIBRATION}.db",
        name=f"{pair}/{label}-{settings_hash(strategy_of(label, 'resnet56'))}/{seed}",
        seed=seed,
        trainer=L.Trainer(**QUIET),
        calibration_images=CALIBRATION,
        verify_front=False,  # every value is taken in the same way
    )
    return search.fit(*parts, progress=False)


def row_of(pair: str, label: str, seed: int, result: SearchResult) -> dict[str, Any]:
    history, cost = result.history, PAIRS[pair]
    largest = history[0].values[cost]
    bounds = {"val_acc": ACCURACY, cost: (COST[0] * largest, COST[1] * largest)}
    columns = {name: history.column(name) for name in bounds}
    unit = in_square(columns, {"val_acc": "max", cost: "min"}, bounds)
    curve = pareto.hypervolumes(unit, [1.0, 1.0])
    fresh = [e.seconds for e in history if "val_acc" not in e.reused]
    return {
        "pair": pair,
        "recalibrated": RECALIBRATED,
        "strategy": label,
        "settings": settings_hash(strategy_of(label, "resnet56")),
        "budget": len(curve),
        "seed": seed,
        **{f"hv@{k}": f"{curve[k - 1]:.5f}" if k <= len(curve) else "" for k in CHECKPOINTS},
        "failed": int((~history.ok).sum()),
        "reused": len(history) - len(fresh),
        "seconds": round(float(np.median(fresh)), 2) if fresh else "",
        "largest": f"{largest:.6g}",
        "commit": commit(),
        "versions": f"{versions()} torch={torch.__version__}",
        "curve": to_text(curve),
    }


def report(budget: int) -> None:
    """Print the median and the range of the seeds, of runs with the present settings."""
    if not OUT.exists():
        print("no results yet")
        return
    frame = pd.read_csv(OUT, dtype={"settings": str, "commit": str}, keep_default_na=False)
    for pair, cost in PAIRS.items():
        table = {}
        for label in STRATEGIES:
            now = settings_hash(strategy_of(label, "resnet56")) if label in names() else ""
            rows = frame[
                (frame.pair == pair)
                & (frame.strategy == label)
                & (frame.settings == now)
                & (frame.recalibrated == RECALIBRATED)
                & (frame.budget == budget)
            ]
            curves = [from_text(str(r.curve), int(r.budget)) for r in rows.itertuples()]
            if not curves:
                continue
            cells: dict[str, Any] = {"seeds": len(curves)}
            for k in (k for k in CHECKPOINTS if k <= budget):
                values = np.array([curve[k - 1] for curve in curves])
                cells[f"@{k}"] = f"{np.median(values):.3f} ({values.min():.3f}-{values.max():.3f})"
            seconds = pd.to_numeric(rows.seconds, errors="coerce").median()
            table[label] = cells | {"failed": rows.failed.sum(), "s per evaluation": seconds}
        if table:
            print(f"Accuracy against {cost}: hypervolume, median (range) of the seeds")
            print(pd.DataFrame(table).T.to_string())
    print(f"square: accuracy {ACCURACY}, cost {COST} of the largest subnet's", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each pair")
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    args = parser.parse_args()
    pd.set_option("display.width", 200)
    if not args.report:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
        torch.set_num_threads(1)
        parts = model_and_data()
        for pair in args.pairs:
            for seed in range(args.seeds):
                for label in args.strategies:
                    start = time.perf_counter()
                    result = fit(pair, label, seed, args.budget, parts)
                    row = row_of(pair, label, seed, result)
                    write(OUT, pd.DataFrame([row]), KEYS)
                    shown = {k: row[k] for k in ("pair", "strategy", "seed", "seconds", "reused")}
                    shown["hv"] = row["curve"].split(":")[-1]
                    print(f"{shown} {time.perf_counter() - start:.0f} s", file=sys.stderr)
    report(args.budget)


if __name__ == "__main__":
    main()
