# SPDX-License-Identifier: Apache-2.0
"""Search efficiency on the OFA MobileNetV3 space, 2.2e19 subnets (A of the benchmark protocol, 4).

    python -m benchmarks.ofa [--seeds 10] [--budget 250] [--long 2000]

Objectives: top-1 of a model of 2,223 real ImageNet measurements, and exact MACs. Two models of
different classes stand for the truth, neither of them a predictor that a strategy uses: a mean of
neural networks and boosted trees; their cross-validated Kendall tau is printed. Counted are
validations; the hypervolume is that of all validated subnets in a fixed square. "Reached" is after
how many validations a strategy has the median hypervolume of a rival's end. Runs are resumable per
(truth, strategy, seed).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import KFold
from sklearn.neural_network import MLPRegressor

from benchmarks.problems import data_folder
from lightning_subnet import FunctionEvaluator, Subnet, SubnetSearch, compare
from lightning_subnet.predictors import features
from lightning_subnet.strategies import LINAS, NSGA2, Hybrid, RandomSearch
from lightning_subnet.supernets import ElasticMobileNetV3

HERE = Path(__file__).resolve().parent
BOUNDS = {"top1": (78.0, 70.0), "macs": (1.2e8, 5.6e8)}
CHECKPOINTS = (20, 50, 100, 250)


class Networks:
    """The mean of three small neural networks."""

    def fit(self, F: np.ndarray, y: np.ndarray) -> Networks:
        self._mean, self._std = y.mean(), y.std()
        z = (y - self._mean) / self._std
        shape = {"hidden_layer_sizes": (64, 64), "alpha": 0.1, "max_iter": 400}
        self._nets = [MLPRegressor(**shape, random_state=s).fit(F, z) for s in range(3)]
        return self

    def predict(self, F: np.ndarray) -> np.ndarray:
        return np.mean([net.predict(F) for net in self._nets], axis=0) * self._std + self._mean


def trees() -> Any:
    return HistGradientBoostingRegressor(max_iter=300, learning_rate=0.06, random_state=0)


TRUTHS = {"networks": Networks, "trees": trees}


def measured() -> tuple[Any, np.ndarray, np.ndarray]:
    """Return the super-network, and rows (n, 45) with their top-1 (n,)."""
    net = ElasticMobileNetV3()
    space = net.search_space()
    with np.load(data_folder() / "ofa_mbv3_w10_measured.npz") as data:
        values = np.concatenate([data["d"], data["ks"], data["e"]], axis=1)
        top1 = data["top1"]
    choices = list(space.choices.values())
    X = np.stack(
        [
            [choice.values.index(int(v)) for v in column]
            for choice, column in zip(choices, values.T, strict=True)
        ],
        axis=1,
    )
    return net, space.canonical(X), top1


def validated(make: Any, F: np.ndarray, y: np.ndarray) -> float:
    """Return the mean Kendall tau over five folds."""
    taus = [
        kendalltau(make().fit(F[a], y[a]).predict(F[b]), y[b]).statistic
        for a, b in KFold(5, shuffle=True, random_state=0).split(F)
    ]
    return float(np.mean(taus))


def run(truth: str, args: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    net, X, top1 = measured()
    space = net.search_space()
    F = features(space, X)
    print(f"{truth}: Kendall tau {validated(TRUTHS[truth], F, top1):.3f} (5 folds)", flush=True)
    model = TRUTHS[truth]().fit(F, top1)
    macs = next(m for m in net.exact_measures() if m.name == "macs")

    def accuracy(subnet: Subnet) -> dict[str, float]:
        return {"top1": float(model.predict(features(space, space.indices([subnet])))[0])}

    search = SubnetSearch(
        space=space,
        measures=[macs],
        objectives={"top1": "max", "macs": "min"},
        name=f"ofa-{truth}",
        storage=None,
    )
    (HERE / "scratch").mkdir(exist_ok=True)
    curves: dict[str, np.ndarray] = {}
    for strategies, budget in (
        ({"random": RandomSearch(), "nsga2": NSGA2(mutation=0.02)}, args.long),
        ({"linas": LINAS(), "linas-exact": LINAS(exact=True), "hybrid": Hybrid()}, args.budget),
    ):
        start = time.perf_counter()
        table = compare(
            strategies,
            search,
            evaluator=FunctionEvaluator(accuracy),
            budget=budget,
            seeds=range(args.seeds),
            bounds=BOUNDS,
            storage=f"sqlite:///{HERE}/scratch/ofa-{truth}.db",
        )
        curves |= table.curves
        print(f"{', '.join(strategies)}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    rows = [
        {"truth": truth, "strategy": name, "seed": seed, "validations": k}
        | {"hypervolume": round(float(curve[seed, k - 1]), 5)}
        for name, curve in curves.items()
        for seed in range(args.seeds)
        for k in (*CHECKPOINTS, args.long)
        if k <= curve.shape[1]
    ]
    goals = {f"{name}@{curve.shape[1]}": np.median(curve[:, -1]) for name, curve in curves.items()}
    reached = pd.DataFrame(
        {
            goal: {name: _reached(curve, level) for name, curve in curves.items()}
            for goal, level in goals.items()
        }
    )
    return pd.DataFrame(rows), reached


def _reached(curve: np.ndarray, level: float) -> str:
    """Return median and quartiles over seeds of the validations to a hypervolume."""
    after = [np.argmax(row >= level) + 1 if row[-1] >= level else np.inf for row in curve]
    low, middle, high = np.quantile(after, [0.25, 0.5, 0.75], method="nearest")
    return f"{middle:g} ({low:g}-{high:g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=250)
    parser.add_argument("--long", type=int, default=2000, help="of random and nsga2")
    args = parser.parse_args()
    pd.set_option("display.width", 200)
    results = []
    for truth in TRUTHS:
        frame, reached = run(truth, args)
        results.append(frame)
        table = frame.groupby(["strategy", "validations"], sort=False).hypervolume
        print(table.median().unstack("validations").round(4).to_string())
        print(f"Validations to reach the hypervolume of\n{reached.to_string()}\n", flush=True)
        reached.to_csv(HERE / "results" / f"ofa_reached_{truth}.csv")
    pd.concat(results).to_csv(HERE / "results" / "ofa.csv", index=False)


if __name__ == "__main__":
    main()
