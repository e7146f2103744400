# SPDX-License-Identifier: Apache-2.0
"""Predictors on real measurements: Kendall's tau and MAPE on 500 unseen subnets, by samples.

    OMP_NUM_THREADS=1 python -m benchmarks.predictors [--seeds 10]

Data: HAT latencies (encoder plus decoder), OFA MobileNetV3 latency and top-1, HW-GPT-Bench (small).
The trees take part in the first five seeds, and everything at 1000 samples in the first three; a
predictor is compared with `auto` on the seeds that both have. What `--out` has already is not run
again: begin a new file when predictors have changed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.data import (
    OFA_NAMES,
    columns_of,
    data_folder,
    hwgpt as hwgpt_data,
    ofa_space,
    rows_of,
    values_in,
)
from lightning_subnet import Choice, SearchSpace
from lightning_subnet.predictors import features, kendall_tau, make

SAMPLES = (25, 50, 100, 250, 1000)
KERNELS = ("auto", "ridge", "svr", "stack", "gp", "additive")
TREES = ("forest", "extra-trees", "boosting")
UNSEEN = 500
HERE = Path(__file__).resolve().parent
Table = tuple[str, SearchSpace, np.ndarray, np.ndarray]


def hat() -> Iterator[Table]:
    for path in sorted((data_folder() / "hat_latency").glob("*.csv")):
        frame = pd.read_csv(path)
        columns = {n: frame[n].to_numpy() for n in frame.columns if "latency" not in n}
        columns = {name: c for name, c in columns.items() if len(np.unique(c)) > 1}
        space = SearchSpace({name: Choice(values_in(c)) for name, c in columns.items()})
        latency = frame.latency_mean_encoder + frame.latency_mean_decoder
        device = path.stem.split("_")[2]
        yield f"hat {device}", space, rows_of(space, columns), latency.to_numpy()


def ofa() -> Iterator[Table]:
    with np.load(data_folder() / "ofa_mbv3_w10_measured.npz") as data:
        space = ofa_space({})
        yield "ofa top1", space, rows_of(space, columns_of(data, OFA_NAMES)), data["top1"]
    with np.load(data_folder() / "ofa_mbv3_latency.npz") as data:
        space = ofa_space({"r": Choice(values_in(data["r"]))})
        X = rows_of(space, columns_of(data, OFA_NAMES) | {"r": data["r"]})
        for device in ("titan_rtx_32", "titan_xp_1", "v100_1", "v100_64"):
            yield f"ofa {device}", space, X, data[f"latency_ms_{device}"].astype(float)


def hwgpt() -> Iterator[Table]:
    space, X, columns = hwgpt_data()
    for target in ("perplexity", "latency_ms_a100", "latency_ms_rtx2080"):
        yield f"hwgpt {target.removeprefix('latency_ms_')}", space, X, columns[target]


def run(table: Table, seed: int, done: set[tuple]) -> Iterator[dict]:
    problem, space, X, y = table
    F = features(space, X)
    order = np.random.default_rng(seed).permutation(len(y))
    for n in SAMPLES if seed < 3 else SAMPLES[:-1]:
        unseen, seen = order[:UNSEEN], order[UNSEEN : UNSEEN + n]
        for name in KERNELS + TREES * (seed < 5):
            if (problem, n, seed, name) not in done:
                start = time.perf_counter()
                fitted = make(name, space=space).fit(F[seen], y[seen])
                seconds = time.perf_counter() - start
                mean, std = fitted.predict(F[unseen], return_std=True)
                error = np.abs(mean - y[unseen])
                yield {"problem": problem, "samples": n, "seed": seed, "predictor": name} | {
                    "tau": round(float(kendall_tau(mean, y[unseen])[0]), 4),
                    "mape": round(100 * float(np.mean(error / y[unseen])), 3),
                    "within_1_std": round(float(np.mean(error <= std)), 3),
                    "within_2_std": round(float(np.mean(error <= 2 * std)), 3),
                    "fit_ms": round(1000 * seconds, 1),
                    "chosen": "+".join(fitted.chosen) if name == "auto" else "",
                }


def summary(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    def cell(values: pd.Series) -> str:
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        return f"{median:.3f} ({low:.3f}-{high:.3f})"

    table = frame.groupby(["problem", "samples", "predictor"], sort=False)[column]
    return table.agg(cell).unstack("predictor")


def behind(frame: pd.DataFrame, *, paired: bool) -> pd.DataFrame:
    """Return by how much auto's tau is below that of the best single predictor.

    Args:
        frame: Rows of results.
        paired: The median of the differences by seed, instead of the difference of the medians.
    """
    wide = frame.pivot_table(
        index=["problem", "samples", "seed"], columns="predictor", values="tau"
    )
    rows = []
    for (problem, n), part in wide.groupby(level=["problem", "samples"], sort=False):
        gaps = {}
        for name in part.columns.drop("auto"):
            both = part[["auto", name]].dropna()
            medians = both[name].median() - both["auto"].median()
            gaps[name] = (both[name] - both["auto"]).median() if paired else medians
        best = max(gaps, key=gaps.__getitem__)
        rows.append({"problem": problem, "samples": n, "best": best, "gap": round(gaps[best], 4)})
    return pd.DataFrame(rows).pivot_table(index="problem", columns="samples", values="gap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "predictors.csv")
    args = parser.parse_args()
    args.out.parent.mkdir(exist_ok=True, parents=True)
    before = pd.read_csv(args.out, keep_default_na=False) if args.out.exists() else pd.DataFrame()
    results = before.to_dict("records")
    done = {(r["problem"], r["samples"], r["seed"], r["predictor"]) for r in results}
    start = time.perf_counter()
    tables = [*hat(), *ofa(), *hwgpt()]
    for seed in range(args.seeds):
        for table in tables:
            results += run(table, seed, done)
            pd.DataFrame(results).to_csv(args.out, index=False)
            print(f"{table[0]}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    frame = pd.DataFrame(results)
    pd.set_option("display.width", 250, "display.max_columns", 20)
    print("Kendall's tau on 500 unseen subnets: median (interquartile range)")
    print(summary(frame, "tau").to_string())
    print("MAPE in %: median (interquartile range)")
    print(summary(frame, "mape").to_string())
    print("Best single predictor's median tau less auto's (target: at most .01)")
    print(behind(frame, paired=False).to_string())
    print("The same, median of the differences by seed")
    print(behind(frame, paired=True).to_string())
    means = ["within_1_std", "within_2_std"]
    print(frame.groupby("predictor", sort=False)[means].mean().round(2).to_string())
    print("Median fit in ms")
    fit = frame.pivot_table(index="predictor", columns="samples", values="fit_ms", aggfunc="median")
    print(fit.round(0).to_string())
    print(f"{time.perf_counter() - start:.0f} s; wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
