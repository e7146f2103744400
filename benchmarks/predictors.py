# SPDX-License-Identifier: Apache-2.0
"""Predictors on real measurements: Kendall's tau and MAPE on 500 unseen subnets, by samples.

    OMP_NUM_THREADS=1 python -m benchmarks.predictors [--seeds 10]

Data: HAT latencies (encoder plus decoder), OFA MobileNetV3 latency and top-1, HW-GPT-Bench (small).
The trees take part in the first five seeds, and everything at 1000 samples in the first three; a
predictor is compared with `auto` on the seeds that both have.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.problems import data_folder
from lightning_subnet import Choice, SearchSpace
from lightning_subnet.predictors import features, kendall_tau, make

SAMPLES = (25, 50, 100, 250, 1000)
KERNELS = ("auto", "ridge", "svr", "stack", "gp")
TREES = ("forest", "extra-trees", "boosting")
UNSEEN = 500
HERE = Path(__file__).resolve().parent
Table = tuple[str, SearchSpace, np.ndarray, np.ndarray]


def rows_of(space: SearchSpace, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return canonical index rows; a value that no choice has belongs to a choice that is off."""
    X = np.zeros((len(next(iter(columns.values()))), len(space.names)), dtype=np.int64)
    for j, (name, choice) in enumerate(space.choices.items()):
        index = {value: i for i, value in enumerate(choice.values)}
        X[:, j] = [index.get(value, 0) for value in columns[name].tolist()]
    return space.canonical(X)


def values_in(column: np.ndarray) -> list:
    return np.unique(column).tolist()


def hat() -> Iterator[Table]:
    for path in sorted((data_folder() / "hat_latency").glob("*.csv")):
        frame = pd.read_csv(path)
        columns = {n: frame[n].to_numpy() for n in frame.columns if "latency" not in n}
        columns = {name: c for name, c in columns.items() if len(np.unique(c)) > 1}
        space = SearchSpace({name: Choice(values_in(c)) for name, c in columns.items()})
        latency = frame.latency_mean_encoder + frame.latency_mean_decoder
        device = path.stem.split("_")[2]
        yield f"hat {device}", space, rows_of(space, columns), latency.to_numpy()


def ofa_space(more: Mapping[str, Choice]) -> SearchSpace:
    choices = {f"d.{s}": Choice([2, 3, 4]) for s in range(5)}
    for name, values in (("ks", [3, 5, 7]), ("e", [3, 4, 6])):
        for i in range(20):
            when = {f"d.{i // 4}": [d for d in (2, 3, 4) if d > i % 4]} if i % 4 > 1 else {}
            choices[f"{name}.{i}"] = Choice(values, when=when)
    return SearchSpace({**choices, **more})


def columns_of(data: Mapping[str, np.ndarray], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {f"{name}.{i}": c for name in names for i, c in enumerate(data[name].T)}


def ofa() -> Iterator[Table]:
    with np.load(data_folder() / "ofa_mbv3_w10_measured.npz") as data:
        space = ofa_space({})
        yield "ofa top1", space, rows_of(space, columns_of(data, ("d", "ks", "e"))), data["top1"]
    with np.load(data_folder() / "ofa_mbv3_latency.npz") as data:
        space = ofa_space({"r": Choice(values_in(data["r"]))})
        X = rows_of(space, columns_of(data, ("d", "ks", "e")) | {"r": data["r"]})
        for device in ("titan_rtx_32", "titan_xp_1", "v100_1", "v100_64"):
            yield f"ofa {device}", space, X, data[f"latency_ms_{device}"].astype(float)


def hwgpt() -> Iterator[Table]:
    with np.load(data_folder() / "hwgpt_s.npz") as data:
        depths = values_in(data["n_layer"])
        columns = {k: data[k] for k in ("embed_dim", "n_layer")}
        columns |= columns_of(data, ("n_head", "mlp_ratio"))
        choices = {}
        for name, column in columns.items():
            layer = int(name.split(".")[1]) if "." in name else 0
            deep = [d for d in depths if d > layer]
            when = {"n_layer": deep} if len(deep) < len(depths) else {}
            choices[name] = Choice(values_in(column[data["n_layer"] > layer]), when=when)
        choices["bias"] = Choice([False, True], ordered=False)
        space = SearchSpace(choices)
        X = rows_of(space, columns | {"bias": data["bias"]})
        for target in ("perplexity", "latency_ms_a100", "latency_ms_rtx2080"):
            yield f"hwgpt {target.removeprefix('latency_ms_')}", space, X, data[target]


def run(table: Table, seeds: int) -> Iterator[dict]:
    problem, space, X, y = table
    F = features(space, X)
    for n in SAMPLES:
        for seed in range(seeds if n < 1000 else min(seeds, 3)):
            order = np.random.default_rng(seed).permutation(len(y))
            unseen, seen = order[:UNSEEN], order[UNSEEN : UNSEEN + n]
            for name in KERNELS + TREES * (seed < 5):
                start = time.perf_counter()
                fitted = make(name).fit(F[seen], y[seen])
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


def behind(frame: pd.DataFrame) -> pd.DataFrame:
    """Return by how much the median tau of auto is below that of the best single predictor."""
    wide = frame.pivot_table(
        index=["problem", "samples", "seed"], columns="predictor", values="tau"
    )
    rows = []
    for (problem, n), part in wide.groupby(level=["problem", "samples"], sort=False):
        gaps = {}
        for name in part.columns.drop("auto"):
            both = part[["auto", name]].dropna()
            gaps[name] = both[name].median() - both["auto"].median()
        best = max(gaps, key=gaps.__getitem__)
        rows.append({"problem": problem, "samples": n, "best": best, "gap": round(gaps[best], 4)})
    return pd.DataFrame(rows).pivot_table(index="problem", columns="samples", values="gap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "predictors.csv")
    args = parser.parse_args()
    args.out.parent.mkdir(exist_ok=True, parents=True)
    results: list[dict] = []
    start = time.perf_counter()
    for table in (*hat(), *ofa(), *hwgpt()):
        results += run(table, args.seeds)
        pd.DataFrame(results).to_csv(args.out, index=False)
        print(f"{table[0]}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    frame = pd.DataFrame(results)
    pd.set_option("display.width", 250, "display.max_columns", 20)
    print("Kendall's tau on 500 unseen subnets: median (interquartile range)")
    print(summary(frame, "tau").to_string())
    print("MAPE in %: median (interquartile range)")
    print(summary(frame, "mape").to_string())
    print("Best single predictor's median tau less auto's (target: at most .01)")
    print(behind(frame).to_string())
    means = ["within_1_std", "within_2_std"]
    print(frame.groupby("predictor", sort=False)[means].mean().round(2).to_string())
    print("Median fit in ms")
    fit = frame.pivot_table(index="predictor", columns="samples", values="fit_ms", aggfunc="median")
    print(fit.round(0).to_string())
    print(f"{time.perf_counter() - start:.0f} s; wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
