# SPDX-License-Identifier: Apache-2.0
"""Searching hardware B after hardware A: the whole space, a reduced one, or a warm start.

    python -m benchmarks.reduction [--seeds 10] [--budget 150]

Per seed, a LINAS search of 250 validations on A leaves an archive. `reduced` searches B in the
space that `reduce_space` makes of it, `published` in that without the values that only the front
keeps (`keep_front=False`), `warm` starts from the front of A.
On `nb201` (cifar100, A = gold_6226, B = titan_rtx_256) accuracy and latency are measured tables. On
`ofa` (2.2e19 subnets) A is top-1 against exact MACs, B top-1 against the latency of a Titan RTX at
batch 32, by models of real measurements (benchmarks.truths).
Counted are validations on B. The goal of a problem and strategy is 99 % of the median hypervolume
that the search of the whole space has at the end of its budget; "reached" is after how many
validations a run has it, median and quartiles over seeds. The results in `results/` are those of
`--seeds 5 --problems ofa` and `--seeds 5 --problems nb201`, 150 validations each: a run of `ofa`
takes minutes a seed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.problems import SearchProblem, nb201, ofa, ofa_latency
from lightning_subnet import SubnetSearch
from lightning_subnet.errors import ReductionWarning
from lightning_subnet.experiments import Comparison, Reduction, reduction
from lightning_subnet.strategies import LINAS, NSGA2, RandomSearch

HERE = Path(__file__).resolve().parent
STRATEGIES: dict[str, Any] = {
    "random": RandomSearch(),
    "nsga2": NSGA2(mutation=0.02),
    "linas": LINAS(),
    "hybrid": "hybrid",
}
VARIANTS = ("whole", "reduced", "published", "warm")
PAIRS: dict[str, Callable[[], tuple[SearchProblem, SearchProblem]]] = {
    "nb201": lambda: (nb201("cifar100/gold_6226"), nb201("cifar100/titan_rtx_256")),
    "ofa": lambda: (ofa("networks"), ofa_latency()),
}


def run(name: str, seeds: int, budget: int) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Return hypervolume curves (seeds, budget) by "strategy/variant", and the reductions."""
    first, second = PAIRS[name]()
    results: dict[tuple[str, int], Any] = {}
    reductions = []
    for seed in range(seeds):
        archive = SubnetSearch(
            space=first.space,
            objectives=first.objectives,
            measures=first.measures,
            strategy="linas",
            budget=250,
            seed=1000 + seed,
            storage=None,
        ).run(first.evaluator, progress=False)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReductionWarning)
            smaller: Reduction = reduction(archive, seed=seed)
        reductions.append(
            {"problem": name, "seed": seed, "size": float(second.space.size)}
            | {"reduced": float(smaller.space.size), "clusters": smaller.clusters}
            | {"noise": smaller.noise}
            | {"dropped": sum(map(len, smaller.dropped.values()))}
            | {"kept_for_front": sum(map(len, smaller.rescued.values()))}
            | {"seconds": round(time.perf_counter() - start, 1)}
        )
        published = second.space.narrowed_to(
            {
                name: [v for v in values if v not in smaller.rescued.get(name, ())]
                for name, values in smaller.space.values.items()
            }
        )
        reductions[-1]["published"] = float(published.size)
        spaces = {"reduced": smaller.space, "published": published}
        for strategy, make in STRATEGIES.items():
            for variant in VARIANTS:
                space = spaces.get(variant, second.space)
                if variant in spaces and space.size == second.space.size:
                    whole = results[f"{strategy}/whole", seed]  # a search repeats exactly
                    results[f"{strategy}/{variant}", seed] = whole
                    continue
                results[f"{strategy}/{variant}", seed] = SubnetSearch(
                    space=space,
                    objectives=second.objectives,
                    strategy=make,
                    budget=budget,
                    seed=seed,
                    storage=None,
                    warm_start=archive if variant == "warm" else (),
                ).run(second.evaluator, progress=False)
        print(f"{name}: seed {seed}, {reductions[-1]}", flush=True)
    return Comparison(results, budget=budget, bounds=second.bounds).curves, reductions


def reached(curve: np.ndarray, level: float) -> str:
    """Return median and quartiles over seeds of the validations to a hypervolume."""
    after = [np.argmax(row >= level) + 1 if row[-1] >= level else np.inf for row in curve]
    low, middle, high = np.quantile(after, [0.25, 0.5, 0.75], method="nearest")
    return f"{middle:g} ({low:g}-{high:g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=150)
    parser.add_argument("--problems", nargs="+", default=list(PAIRS), choices=PAIRS)
    args = parser.parse_args()
    pd.set_option("display.width", 200)
    for name in args.problems:
        curves, reductions = run(name, args.seeds, args.budget)
        rows: list[dict[str, Any]] = []
        table = {}
        for label, curve in curves.items():
            strategy, variant = label.split("/")
            goal = 0.99 * float(np.median(curves[f"{strategy}/whole"][:, -1]))
            table[strategy, variant] = {"reached": reached(curve, goal)}
            for k in (20, 50, 100, args.budget):
                values = np.quantile(curve[:, k - 1], [0.5, 0.25, 0.75])
                table[strategy, variant][f"hv@{k}"] = "{:.4f} ({:.4f}-{:.4f})".format(*values)
            rows += [
                {"problem": name, "strategy": strategy, "variant": variant, "seed": seed}
                | {"goal": round(goal, 5), "reached": _first(curve[seed], goal)}
                | {f"hv@{k}": round(float(curve[seed, k - 1]), 5) for k in (20, 50, 100)}
                | {"hv@end": round(float(curve[seed, -1]), 5)}
                for seed in range(args.seeds)
            ]
        print(f"{name}\n{pd.DataFrame(table).T.to_string()}\n", flush=True)
        pd.DataFrame(rows).to_csv(HERE / "results" / f"reduction_{name}.csv", index=False)
        pd.DataFrame(reductions).to_csv(
            HERE / "results" / f"reduction_{name}_spaces.csv", index=False
        )


def _first(row: np.ndarray, level: float) -> float:
    return float(np.argmax(row >= level) + 1) if row[-1] >= level else float("inf")


if __name__ == "__main__":
    main()
