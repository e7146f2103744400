# SPDX-License-Identifier: Apache-2.0
"""The tables of benchmarks.search_efficiency, from its CSVs; hypervolumes as shares of the best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.efficiency_runs import (
    CHECKPOINTS,
    FOLDER,
    STRATEGIES,
    available,
    curves_of,
    read,
    settings_hash,
    strategy_of,
)
from lightning_subnet.experiments.statistics import evaluations_to, median_interval

OURS = "hybrid"
RIVALS = {
    "weaknas-front": 800,
    "weaknas-bands": 800,
    "linas": 250,
    "nsga2": 2000,
}
NEAR = 0.98
Curves = dict[str, dict[int, np.ndarray]]


@dataclass(frozen=True)
class ProblemRow:
    """A problem's row of problems.csv."""

    square: str
    hypervolume: float
    which: str
    truths: str


def problem_row(problem: str) -> ProblemRow:
    frame = pd.read_csv(FOLDER / "problems.csv", keep_default_na=False).set_index("problem")
    row = frame.loc[problem]
    return ProblemRow(row["square"], float(row["hypervolume"]), row["which"], row["truths"])


def shares(problem: str, best: float) -> tuple[Curves, list[str]]:
    """Return curves by label and seed as shares of the best, and labels with other settings."""
    frame, by_label, stale = read(problem), {}, []
    for label in STRATEGIES:
        rows = frame[frame.strategy == label]
        if label in available():
            current = rows[rows.settings == settings_hash(strategy_of(label, problem))]
            if len(current) < len(rows):
                stale.append(f"{label} ({len(rows) - len(current)} runs)")
            rows = current
        if len(rows):
            by_label[label] = {seed: curve / best for seed, curve in curves_of(rows).items()}
    return by_label, stale


def at(curves: dict[int, np.ndarray], k: int) -> dict[int, float]:
    """Return the values after k validations, by seed, of the runs that are so long."""
    return {seed: float(curve[k - 1]) for seed, curve in curves.items() if len(curve) >= k}


def medians(by_label: Curves) -> pd.DataFrame:
    """Return median and quartiles over seeds at each checkpoint."""

    def cell(values: dict[int, float]) -> str:
        if not values:
            return ""
        low, middle, high = np.quantile(list(values.values()), [0.25, 0.5, 0.75])
        return f"{middle:.3f} ({low:.3f}-{high:.3f})"

    return pd.DataFrame(
        {
            label: {"seeds": str(len(curves))} | {f"@{k}": cell(at(curves, k)) for k in CHECKPOINTS}
            for label, curves in by_label.items()
        }
    ).T


def goals(by_label: Curves) -> dict[str, float]:
    """Return hypervolumes to be reached: the median end of each rival, and a share of the best."""
    levels = {}
    for label, longest in RIVALS.items():
        if label in by_label:
            k = min(longest, *(len(curve) for curve in by_label[label].values()))
            levels[f"{label}@{k}"] = float(np.median(list(at(by_label[label], k).values())))
    return {**levels, f"{NEAR:.0%} of best": NEAR}


def reached(by_label: Curves) -> pd.DataFrame:
    """Return after how many validations half of the seeds have reached each goal.

    With its 95 % bootstrap interval over seeds.
    """

    def cell(curves: dict[int, np.ndarray], level: float) -> str:
        needed = [evaluations_to(curve[None], level)[0] for curve in curves.values()]
        low, middle, high = median_interval(needed, lower=True)
        return f"{middle:g} ({low:g}-{high:g})"

    return pd.DataFrame(
        {
            f"{goal} ({level:.3f})": {
                label: cell(curves, level) for label, curves in by_label.items()
            }
            for goal, level in goals(by_label).items()
        }
    )


def paired(by_label: Curves) -> pd.DataFrame:
    """Return by how much hybrid leads, over equal seeds: random at 20, then the best baseline."""
    rows = []
    for k, rivals in ((20, ["random"]), (50, None), (100, None), (250, None)):
        values = {label: at(curves, k) for label, curves in by_label.items()}
        ours = values.get(OURS, {})
        others = {
            label: np.median(list(v.values()))
            for label, v in values.items()
            if label != OURS and v and label in (rivals or by_label)
        }
        if not ours or not others:
            continue
        best = max(others, key=others.__getitem__)
        seeds = sorted(ours.keys() & values[best].keys())
        if not seeds:
            continue
        low, middle, high = median_interval([ours[s] - values[best][s] for s in seeds])
        difference = f"{middle:+.4f} ({low:+.4f} to {high:+.4f})"
        rows.append({"@": k, "against": best, "seeds": len(seeds), "difference": difference})
    return pd.DataFrame(rows)


def report(problems: list[str]) -> None:
    """Print the tables of each problem that has results."""
    pd.set_option("display.width", 250, "display.max_columns", 30)
    for problem in problems:
        if not (FOLDER / f"{problem}.csv").exists():
            print(f"{problem}: no results yet\n")
            continue
        about = problem_row(problem)
        by_label, stale = shares(problem, about.hypervolume)
        print(f"{problem} ({about.truths}); square: {about.square}")
        print(f"Share of {about.hypervolume} ({about.which}): median (quartiles) over seeds")
        print(medians(by_label).to_string())
        if stale:
            print(f"left out, with other settings: {', '.join(stale)}")
        print("Validations until half of the seeds have reached (95 % bootstrap interval)")
        print(reached(by_label).to_string())
        if len(table := paired(by_label)):
            print(f"{OURS} less random, and less the best baseline: median of paired differences")
            print(table.to_string(index=False))
        print(flush=True)
