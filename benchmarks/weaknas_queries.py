# SPDX-License-Identifier: Apache-2.0
"""WeakNAS as published: how many queries until the best cell of NAS-Bench-201 is measured.

    OMP_NUM_THREADS=1 python -m benchmarks.weaknas_queries --seeds 20 [--predictors forest mlp]

One objective, the accuracy. Published settings: 10 random cells, then 10 a round from the predicted
top 100 of all 15,625; published means of queries (arXiv:2102.10490): 182.1 for CIFAR-10, 78.4 for
CIFAR-100. The comparison is not exact: the published search queries a table of validation
accuracies of single runs; here both the queried and the sought values are test accuracies, the mean
over runs. A search that has not found the best cell after `--cap` queries counts as the cap. Runs
are resumable per (dataset, predictor, seed): rows that the CSV has are kept.

The CSV has 20 seeds of smaller predictors (a forest of 200 trees, an MLP of 4 layers of 200), and
three of the MLP as published, whose fits take seconds. In 23 of its 40 runs the forest has not
found the best cell at the cap of 300.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestRegressor
from sklearn.neural_network import MLPRegressor

from benchmarks.problems import nb201
from lightning_subnet import Subnet, SubnetSearch
from lightning_subnet.strategies import LocalSearch, Strategy, WeakNAS

PUBLISHED = {"cifar10": 182.1, "cifar100": 78.4}
HERE = Path(__file__).resolve().parent
KEYS = ["dataset", "strategy", "seed"]


def strategy_of(name: str) -> Strategy:
    """Return WeakNAS with a predictor, or local search to compare with."""
    if name == "local-search":
        return LocalSearch(batch_size=1)
    predictor: Any = name
    if name == "forest-200":  # those published have 1000 trees, and layers of 1000
        predictor = RandomForestRegressor(200, max_depth=10)
    if name == "mlp-200":
        predictor = MLPRegressor(hidden_layer_sizes=(200,) * 4, max_iter=100)
    return WeakNAS(batch_size=10, top=100, pool=15_625, predictor=predictor)


def queries(dataset: str, name: str, seed: int, cap: int) -> tuple[int, bool]:
    """Return after how many measurements the best cell is among them, and whether it is."""
    problem = nb201(f"{dataset}/2080ti_1")
    search = SubnetSearch(
        space=problem.space,
        objectives={"top1": "max"},
        strategy=strategy_of(name),
        budget=cap,
        seed=seed,
        storage=None,
    )
    best = problem.bounds["top1"][0]

    def top1(subnet: Subnet) -> float:
        return float(problem.evaluator.evaluate(subnet)["top1"])

    while subnets := search.ask(1):
        value = top1(subnets[0])
        search.tell(subnets[0], top1=value)
        if value == best:
            return len(search.history), True
    return cap, False


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (dataset, name), part in frame.groupby(["dataset", "strategy"], sort=False):
        low, median, high = np.quantile(part.queries, [0.25, 0.5, 0.75])
        row = {"dataset": dataset, "strategy": name, "seeds": len(part)}
        row |= {"found": f"{part.found.sum()}/{len(part)}", "median": median}
        row |= {"quartiles": f"{low:.0f}-{high:.0f}", "mean": round(part.queries.mean(), 1)}
        row |= {"std": round(part.queries.std(), 1), "published mean": PUBLISHED[str(dataset)]}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cap", type=int, default=300)
    parser.add_argument(
        "--predictors",
        nargs="+",
        default=["forest"],
        help="of WeakNAS: mlp, forest, mlp-200, forest-200; 'local-search' is another strategy",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "weaknas_queries.csv")
    args = parser.parse_args()
    frame = pd.read_csv(args.out) if args.out.is_file() else pd.DataFrame(columns=KEYS)
    if len(frame):  # runs to another cap are cut at this one
        frame["found"] &= frame.queries <= args.cap
        frame["queries"] = frame.queries.clip(upper=args.cap).astype(int)
    for seed in range(args.seeds):
        for dataset in PUBLISHED:
            for name in args.predictors:
                if [dataset, name, seed] in frame[KEYS].to_numpy().tolist():
                    continue
                start = time.perf_counter()
                n, is_best = queries(dataset, name, seed, args.cap)
                row = {"dataset": dataset, "strategy": name, "seed": seed, "queries": n}
                row |= {"found": is_best, "seconds": round(time.perf_counter() - start, 1)}
                print(row, file=sys.stderr, flush=True)
                frame = pd.concat([frame, pd.DataFrame([row])], ignore_index=True)
                frame.sort_values(KEYS).to_csv(args.out, index=False)
    pd.set_option("display.width", 200, "display.max_columns", 20)
    print(summary(frame.sort_values(KEYS)).to_string(index=False))


if __name__ == "__main__":
    main()
