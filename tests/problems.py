# SPDX-License-Identifier: Apache-2.0
"""Small spaces, problems and histories with known answers, for the tests of floors 1 and 2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet import (
    Choice,
    Constraint,
    Evaluation,
    FunctionEvaluator,
    History,
    Measure,
    Objective,
    SearchSpace,
    Subnet,
    SubnetSearch,
    TableEvaluator,
    measure,
)
from lightning_subnet.study import Problem, pareto

ROOT = Path(__file__).parent.parent


def numpy_state() -> tuple[bytes, int]:
    """Return NumPy's global random state, which users' code may use: numbers, and which is next."""
    _, numbers, position, *_ = np.random.get_state()  # noqa: NPY002 - see above
    return numbers.tobytes(), position


# Spaces


def grid(n_choices: int = 2, n_values: int = 5) -> SearchSpace:
    """Return a space of n_values ** n_choices subnets, without conditions."""
    return SearchSpace({f"x.{i}": list(range(n_values)) for i in range(n_choices)})


def conditional() -> SearchSpace:
    """Return the space of the design: 9 + 27 + 81 = 117 distinct subnets of 243 assignments."""
    return SearchSpace(
        {
            "depth": [2, 3, 4],
            "ks.0": [3, 5, 7],
            "ks.1": [3, 5, 7],
            "ks.2": Choice([3, 5, 7], when={"depth": [3, 4]}),
            "ks.3": Choice([3, 5, 7], when={"depth": [4]}),
        }
    )


def mixed() -> SearchSpace:
    """Return a space with a categorical choice and two values that mean the same network.

    Distinct subnets: operator 3 x stem 2 (of 3) x (depth 1: 1 + depth 2: 4 widths) = 30.
    """
    return SearchSpace(
        {
            "op": Choice(["conv", "skip", "pool"], ordered=False),
            "stem": Choice([0, 1, 2], same=[(0, 1)]),
            "depth": [1, 2],
            "width": Choice([8, 16, 32, 64], when={"depth": [2]}),
        }
    )


# Problems


@measure("cost", exact=True, takes="indices")
def cost(X: np.ndarray) -> np.ndarray:
    """One plus the sum of the value indices: exact, and in bulk."""
    assert len(X) <= 200_000, "no strategy and no profile needs that many at once"
    return 1.0 + X.sum(axis=1)


def values_of(X: np.ndarray, n_objectives: int) -> npt.NDArray[np.float64]:
    """Return smooth objectives in conflict, (n, n_objectives): distances to different corners."""
    scaled = X / max(X.shape[1], 1)
    corners = np.linspace(0.0, 1.0, n_objectives)[None, :, None]
    return ((scaled[:, None, :] - corners) ** 2).sum(axis=2)


def told(subnet: Subnet, n_objectives: int = 2) -> dict[str, float]:
    """Return the objectives f0, f1 ... of a subnet."""
    row = values_of(subnet.indices[None], n_objectives)[0]
    return {f"f{k}": float(value) for k, value in enumerate(row)}


def problem_of(
    space: SearchSpace,
    n_objectives: int = 2,
    constraints: Mapping[str, str] | None = None,
    exact: Sequence[Measure] = (cost,),
) -> Problem:
    """Return a problem with objectives f0, f1 ...; every second one is maximised."""
    return Problem(
        space,
        tuple(Objective(f"f{k}", "max" if k % 2 else "min") for k in range(n_objectives)),
        tuple(Constraint.parse(name, text) for name, text in (constraints or {}).items()),
        {m.name: m for m in exact},
    )


def history_of(
    problem: Problem,
    subnets: Iterable[Subnet],
    *,
    failed: Callable[[int], bool] = lambda number: False,
) -> History:
    """Return the history in which the subnets were measured in that order."""
    history = History(problem.space)
    for number, subnet in enumerate(subnets):
        row = problem.space.indices([subnet])
        values = told(subnet, len(problem.objectives))
        values |= {
            name: float(m.evaluate(problem.space, row)[0][0]) for name, m in problem.exact.items()
        }
        if failed(number):
            history.add(Evaluation(number, subnet, {}, status="failed", reason="it broke"))
        else:
            history.add(Evaluation(number, subnet, values, generation=0))
    return history


@dataclass(frozen=True)
class Situation:
    """The arguments of `propose`."""

    problem: Problem
    history: History
    n: int = 10
    pending: tuple[Subnet, ...] = ()


def _situation(
    space: SearchSpace, n_measured: int, n: int = 10, *, n_pending: int = 0, **settings: Any
) -> Situation:
    failed = settings.pop("failed", lambda number: False)
    problem = problem_of(space, **settings)
    drawn = space.sample(n_measured + n_pending, rng=3)
    history = history_of(problem, drawn[:n_measured], failed=failed)
    return Situation(problem, history, n, tuple(drawn[n_measured:]))


def situations() -> dict[str, Situation]:
    """Return what a strategy has to cope with, by name; none of the spaces is exhausted."""
    pool = grid(4, 4).restricted_to(grid(4, 4).sample(60, rng=1))
    made = {
        "empty": _situation(conditional(), 0),
        "one evaluation": _situation(conditional(), 1),
        "one proposal": _situation(conditional(), 30, 1),
        "more than a batch": _situation(grid(4, 5), 40, 120),
        "pending": _situation(conditional(), 30, n_pending=20),
        "only pending": _situation(conditional(), 0, n_pending=20),
        "few left": _situation(conditional(), 110, 20, n_pending=4),
        "one left": _situation(grid(2, 5), 24),
        "all failed": _situation(conditional(), 40, failed=lambda number: True),
        "all but one failed": _situation(conditional(), 40, failed=lambda number: number != 7),
        "every third failed": _situation(conditional(), 40, failed=lambda number: number % 3 == 0),
        "exact constraint": _situation(conditional(), 30, constraints={"cost": "<= 5"}),
        "relative constraint": _situation(conditional(), 30, constraints={"cost": "<= 60%"}),
        "infeasible exact": _situation(conditional(), 30, constraints={"cost": "<= 0.5"}),
        "infeasible measured": _situation(conditional(), 40, constraints={"f0": "<= -1"}),
        "measured constraint": _situation(conditional(), 40, constraints={"f0": "<= 1"}),
        "pool": _situation(pool, 25),
        "pool nearly exhausted": _situation(pool, 57),
        "mixed": _situation(mixed(), 12),
        "large": _situation(grid(40, 4), 60),
        "large infeasible": _situation(grid(40, 4), 60, 50, constraints={"cost": "<= 0.5"}),
    }
    for m in (1, 2, 3, 4):
        made[f"{m} objectives"] = _situation(grid(4, 4), 40, n_objectives=m)
    # The relative bound on a measured value refers to the largest subnet, which is evaluation 0.
    space = conditional()
    others = [s for s in space.sample(30, rng=5) if s != space.largest]
    problem = problem_of(space, constraints={"f0": "<= 50%"})
    made["relative measured"] = Situation(problem, history_of(problem, [space.largest, *others]))
    return made


# Searches


def search_of(**settings: Any) -> SubnetSearch:
    """Return a search over the 25 subnets of a grid, in memory unless told otherwise."""
    default = {"space": grid(), "objectives": {"f0": "min", "f1": "min"}, "storage": None}
    default |= {"strategy": "random", "budget": 6}
    return SubnetSearch(**{**default, **settings})


class Counting(FunctionEvaluator):
    """Measures f0, f1 ... and remembers what it was called with."""

    def __init__(self, n_objectives: int = 2, fingerprint: str | None = None) -> None:
        super().__init__(self._measure, fingerprint=fingerprint)
        self.calls: list[Subnet] = []
        self._n_objectives = n_objectives

    def _measure(self, subnet: Subnet) -> dict[str, float]:
        self.calls.append(subnet)
        return told(subnet, self._n_objectives)


def record(history: Iterable[Evaluation]) -> list[dict[str, Any]]:
    """Return everything of the evaluations but what they took."""
    return [{k: v for k, v in e.to_json().items() if k != "seconds"} for e in history]


def assert_clear(message: object, *parts: str) -> None:
    """Check the form of an error: at most three lines, which hold all of the parts."""
    text = str(message)
    assert 1 <= len(text.splitlines()) <= 3, text
    assert len(text) < 500, text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


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
