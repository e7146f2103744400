# SPDX-License-Identifier: Apache-2.0
"""Search problems on measured data with exactly known fronts, for benchmarks and tests.

The data lies in the folder named by LIGHTNING_SUBNET_DATA (default ../shared/data).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_subnet import Choice, SearchSpace, TableEvaluator, pareto
from lightning_subnet.errors import SearchError

ROOT = Path(__file__).resolve().parent.parent
NB201_PAIRS = ("cifar10/2080ti_1", "cifar100/gold_6226", "cifar100/titan_rtx_256")


@dataclass(frozen=True)
class TableProblem:
    """A table to search: its space, its evaluator, and the unit square of its hypervolume.

    `bounds` has (best, worst) by objective; `true_hypervolume` is that of all rows in that square.
    """

    name: str
    space: SearchSpace
    evaluator: TableEvaluator
    objectives: Mapping[str, str]
    bounds: Mapping[str, tuple[float, float]]
    true_hypervolume: float


def data_folder() -> Path:
    """Return the folder with the measured data.

    Raises:
        SearchError: It is not there.
    """
    folder = Path(os.environ.get("LIGHTNING_SUBNET_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        msg = f"The measured data is not at {folder}. Set LIGHTNING_SUBNET_DATA to its folder."
        raise SearchError(msg)
    return folder


def _problem(
    name: str,
    space: SearchSpace,
    X: np.ndarray,
    columns: Mapping[str, np.ndarray],
    bounds: Mapping[str, tuple[float, float]],
) -> TableProblem:
    """Make a problem with accuracy to be maximised and every other column to be minimised."""
    objectives = {column: "max" if column == "top1" else "min" for column in columns}
    unit = np.stack(
        [(v - bounds[k][0]) / (bounds[k][1] - bounds[k][0]) for k, v in columns.items()], 1
    )
    evaluator = TableEvaluator(space, X, columns)
    truth = pareto.hypervolume(unit, [1.0] * len(columns))
    return TableProblem(name, evaluator.space, evaluator, objectives, bounds, truth)


def nb201(pair: str) -> TableProblem:
    """NAS-Bench-201: accuracy against measured latency, 15,625 cells of six operators.

    Args:
        pair: `"dataset/device"`, e.g. `"cifar10/2080ti_1"`.
    """
    dataset, device = pair.split("/")
    with np.load(data_folder() / "nasbench201.npz") as data:
        names = [str(name) for name in data["op_names"]]
        X = data["ops"].astype(np.int64)
        top1, latency = data[f"top1_{dataset}"], data[f"latency_ms_{device}"]
    space = SearchSpace({f"op.{i}": Choice(names, ordered=False) for i in range(X.shape[1])})
    bounds = {
        "top1": (float(top1.max()), {"cifar10": 50.0, "cifar100": 20.0}[dataset]),
        "latency_ms": (float(latency.min()), float(np.quantile(latency, 0.99))),
    }
    return _problem(f"nb201 {pair}", space, X, {"top1": top1, "latency_ms": latency}, bounds)


def macro() -> TableProblem:
    """NAS-Bench-Macro: accuracy against FLOPs, all 3^8 networks of eight layers."""
    with np.load(data_folder() / "nasbench_macro.npz") as data:
        X, top1, flops = data["blocks"].astype(np.int64), data["top1"], data["flops"].astype(float)
    blocks = Choice(["identity", "MB3_K3", "MB6_K5"])
    space = SearchSpace({f"block.{i}": blocks for i in range(X.shape[1])})
    bounds = {
        "top1": (float(top1.max()), 80.0),
        "flops": (float(flops.min()), float(flops.max())),
    }
    return _problem("macro", space, X, {"top1": top1, "flops": flops}, bounds)
