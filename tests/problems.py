# SPDX-License-Identifier: Apache-2.0
"""Small spaces, problems and histories with known answers, for the tests of floors 1 and 2."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_subnet import (
    Choice,
    SearchSpace,
    TableEvaluator,
)
from lightning_subnet.study import pareto
from lightning_subnet.testing.problems import (  # noqa: F401 - with the rest of what tests need
    Counting,
    Situation,
    assert_clear,
    conditional,
    cost,
    grid,
    history_of,
    mixed,
    numpy_state,
    objectives_of,
    problem_of,
    record,
    search_of,
    situations,
    values_of,
)

ROOT = Path(__file__).parent.parent


# Real data


def data_file(name: str) -> Path:
    """Return a file of the measured data, or skip the test."""
    import pytest  # not needed, and not cheap, in the programs that tests run

    folder = Path(os.environ.get("LIGHTNING_SUBNET_DATA", ROOT / "../shared/data"))
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in {folder}; set LIGHTNING_SUBNET_DATA")
    return folder / name


class NasBench201:
    """All 15,625 cells of NAS-Bench-201 with measured accuracies and latencies."""

    def __init__(self) -> None:
        with np.load(data_file("nasbench201.npz")) as table:
            self.columns = {name: table[name] for name in table.files}
        self.fronts: dict[str, list[int]] = json.loads(
            data_file("nasbench201_true_fronts.json").read_text()
        )
        names = [str(name) for name in self.columns["op_names"]]
        self.space = SearchSpace({f"op.{i}": Choice(names, ordered=False) for i in range(6)})
        self.X = self.columns["ops"].astype(np.int64)

    def table(self, pair: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return accuracy and latency of all cells for a pair "dataset/device"."""
        dataset, device = pair.split("/")
        top1, latency = self.columns[f"top1_{dataset}"], self.columns[f"latency_ms_{device}"]
        return top1.astype(float), latency.astype(float)

    def evaluator(self, pair: str) -> TableEvaluator:
        """Return the evaluator of a pair."""
        top1, latency = self.table(pair)
        return TableEvaluator(self.space, self.X, {"top1": top1, "latency_ms": latency})

    def share(self, pair: str, points: npt.NDArray[np.float64]) -> float:
        """Return the hypervolume of points (-top1, latency) over that of the true front."""
        everything = np.stack([-self.table(pair)[0], self.table(pair)[1]], axis=1)
        low, high = everything.min(axis=0), everything.max(axis=0)
        true = pareto.hypervolume((everything - low) / (high - low), [1, 1])
        return pareto.hypervolume((points - low) / (high - low), [1, 1]) / true
