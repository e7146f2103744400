# SPDX-License-Identifier: Apache-2.0
"""Search efficiency on measured tables: share of the true hypervolume after so many validations.

    python -m benchmarks.search_efficiency [--seeds 10] [--budget 250]

Problems: NAS-Bench-201 (three dataset/device pairs) and NAS-Bench-Macro, with exactly known fronts.
Counted are validations; the hypervolume is that of all validated subnets in a fixed square
(printed), divided by that of the whole table. Runs are resumable per (problem, strategy, seed); the
CSV is written after every problem.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.problems import NB201_PAIRS, TableProblem, macro, nb201
from lightning_subnet import Comparison, SubnetSearch, compare

STRATEGIES = ["random", "nsga2", "u-nsga3", "sms-emoa", "linas", "hybrid"]
CHECKPOINTS = (20, 50, 100, 250)
HERE = Path(__file__).resolve().parent


def run(problem: TableProblem, seeds: range, budget: int) -> Comparison:
    scratch = HERE / "scratch"
    scratch.mkdir(exist_ok=True)
    name = problem.name.replace("/", "-").replace(" ", "-")
    search = SubnetSearch(
        space=problem.space, objectives=problem.objectives, storage=None, name=f"efficiency-{name}"
    )
    return compare(
        STRATEGIES,
        search,
        evaluator=problem.evaluator,
        budget=budget,
        seeds=seeds,
        storage=f"sqlite:///{scratch / name}.db",
        bounds=problem.bounds,
    )


def rows(problem: TableProblem, table: Comparison) -> list[dict]:
    return [
        {"problem": problem.name, "strategy": label, "seed": seed, "validations": k}
        | {"hypervolume_share": round(curve[i, k - 1] / problem.true_hypervolume, 5)}
        for label, curve in table.curves.items()
        for i, seed in enumerate(table.seeds)
        for k in CHECKPOINTS
        if k <= table.budget
    ]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    def cell(values: pd.Series) -> str:
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        return f"{median:.3f} ({low:.3f}-{high:.3f})"

    table = frame.groupby(["problem", "strategy", "validations"], sort=False).hypervolume_share
    return table.agg(cell).unstack("validations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=250)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "search_efficiency.csv")
    args = parser.parse_args()
    args.out.parent.mkdir(exist_ok=True, parents=True)
    results: list[dict] = []
    start = time.perf_counter()
    for problem in [*map(nb201, NB201_PAIRS), macro()]:
        square = ", ".join(
            f"{k} {best:g} to {worst:g}" for k, (best, worst) in problem.bounds.items()
        )
        print(f"{problem.name}: {problem.space.size:,} subnets; square: {square}", file=sys.stderr)
        results += rows(problem, run(problem, range(args.seeds), args.budget))
        pd.DataFrame(results).to_csv(args.out, index=False)
    pd.set_option("display.width", 200)
    print(f"Share of the true hypervolume: median (interquartile range) of {args.seeds} seeds")
    print(summary(pd.DataFrame(results)).to_string())
    print(f"{time.perf_counter() - start:.0f} s; wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
