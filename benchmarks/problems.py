# SPDX-License-Identifier: Apache-2.0
"""Search problems on measured data, in one form, for benchmarks and tests.

Tables with exactly known fronts (NAS-Bench-201, NAS-Bench-Macro, HW-GPT-Bench as a pool), and the
OFA MobileNetV3 space with models of its measurements as truth, whose near-optimal hypervolume is
that of an NSGA-II of 100,000 evaluations on the truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks import data as files
from benchmarks.data import RESULTS, data_folder
from lightning_subnet import (
    Choice,
    Evaluator,
    FunctionEvaluator,
    Measure,
    SearchSpace,
    Subnet,
    TableEvaluator,
)
from lightning_subnet.study import pareto
from lightning_subnet.study.objectives import minimised, parse_objectives

NB201_PAIRS = ("cifar10/2080ti_1", "cifar100/gold_6226", "cifar100/titan_rtx_256")
HWGPT_DEVICES = ("a100", "h100", "rtx2080", "cpu_mlgpu")
NEAR_OPTIMAL = 100_000
SAME_TRUTH = 1e-4  # what the checks of one truth differ by at most
Values = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class SearchProblem:
    """Something to search: its space, what measures it, and the unit square of its hypervolume.

    `values(X)` gives all objectives of index rows at once; `measures` are those of them that are
    exact and free; `bounds` has (best, worst) by objective; `true_hypervolume` is the best
    that there is in that square, or near it (`exact_front` says which).
    """

    name: str
    space: SearchSpace
    evaluator: Evaluator
    objectives: Mapping[str, str]
    bounds: Mapping[str, tuple[float, float]]
    values: Values
    measures: tuple[Measure, ...] = ()
    true_hypervolume: float = float("nan")
    exact_front: bool = True

    def unit(self, X: np.ndarray) -> np.ndarray:
        """Return the objectives of index rows in the unit square, (n, m), 0 the best."""
        return in_square(self.values(X), self.objectives, self.bounds)

    @property
    def check(self) -> float:
        """The hypervolume of 1,000 fixed subnets: another one is the sign of another truth."""
        X = self.space.sample_indices(min(1000, self.space.size), 0)
        return pareto.hypervolume(self.unit(X), [1.0] * len(self.objectives))


def in_square(
    columns: Mapping[str, np.ndarray],
    objectives: Mapping[str, str],
    bounds: Mapping[str, tuple[float, float]],
) -> np.ndarray:
    """Return columns scaled to the unit square of (best, worst) bounds, (n, m), 0 the best."""
    parsed = parse_objectives(objectives)
    ends = {name: np.array(bounds[name], dtype=float) for name in objectives}
    best, worst = minimised(parsed, ends)
    return (minimised(parsed, columns) - best) / (worst - best)


def _table(
    name: str,
    space: SearchSpace,
    X: np.ndarray,
    columns: Mapping[str, np.ndarray],
    bounds: Mapping[str, tuple[float, float]],
    measures: tuple[Measure, ...] = (),
) -> SearchProblem:
    """Make a problem with top1 to be maximised and every other column to be minimised."""
    objectives = {column: "max" if column == "top1" else "min" for column in columns}
    evaluator = TableEvaluator(space, X, columns)
    row = {code: i for i, code in enumerate(map(bytes, X.astype(np.int8)))}

    def values(rows: np.ndarray) -> Mapping[str, np.ndarray]:
        at = [row[code] for code in map(bytes, rows.astype(np.int8))]
        return {name: column[at] for name, column in columns.items()}

    best = pareto.hypervolume(in_square(columns, objectives, bounds), [1.0] * len(columns))
    return SearchProblem(
        name, evaluator.space, evaluator, objectives, bounds, values, measures, best
    )


def nb201(pair: str) -> SearchProblem:
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
    return _table(f"nb201 {pair}", space, X, {"top1": top1, "latency_ms": latency}, bounds)


def macro() -> SearchProblem:
    """NAS-Bench-Macro: accuracy against exact FLOPs, all 3^8 networks of eight layers."""
    with np.load(data_folder() / "nasbench_macro.npz") as data:
        X, top1, flops = data["blocks"].astype(np.int64), data["top1"], data["flops"].astype(float)
    blocks = Choice(["identity", "MB3_K3", "MB6_K5"])
    space = SearchSpace({f"block.{i}": blocks for i in range(X.shape[1])})
    bounds = {
        "top1": (float(top1.max()), 80.0),
        "flops": (float(flops.min()), float(flops.max())),
    }
    place = 3 ** np.arange(X.shape[1])
    table = np.empty(len(X))
    table[X @ place] = flops  # every network has a place
    exact = Measure(
        "flops", lambda rows: table[rows @ place], unit="FLOP", exact=True, takes="indices"
    )
    return _table("macro", space, X, {"top1": top1, "flops": flops}, bounds, (exact,))


def hwgpt(device: str) -> SearchProblem:
    """HW-GPT-Bench (small): perplexity against measured latency, a pool of 10,000 subnets.

    Args:
        device: One of `HWGPT_DEVICES`.
    """
    space, X, data = files.hwgpt()
    columns = {"perplexity": data["perplexity"], "latency_ms": data[f"latency_ms_{device}"]}
    bounds = {name: (float(c.min()), float(np.quantile(c, 0.99))) for name, c in columns.items()}
    return _table(f"hwgpt {device}", space, X, columns, bounds)


def ofa(truth: str) -> SearchProblem:
    """OFA MobileNetV3: top-1 of a model of 2,223 real measurements against exact MACs.

    Args:
        truth: The class of the model: `"networks"` or `"trees"`; see `benchmarks.truths`.
    """
    from benchmarks import truths

    net = truths.measured().net
    macs = next(m for m in net.exact_measures() if m.name == "macs")
    accuracy = truths.top1(truth).fitted()

    def values(X: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"top1": accuracy(X), "macs": macs(X)}

    bounds = {"top1": (78.0, 70.0), "macs": (1.2e8, 5.6e8)}
    return _modelled(f"ofa {truth}", net.search_space(), values, bounds, (macs,))


def ofa_latency() -> SearchProblem:
    """OFA MobileNetV3: top-1 (networks) against a model of 5,000 measured latencies (trees)."""
    from benchmarks import truths

    accuracy, latency = truths.top1("networks").fitted(), truths.latency().fitted()

    def values(X: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"top1": accuracy(X), "latency_ms": latency(X)}

    bounds = {"top1": (78.0, 70.0), "latency_ms": (10.0, 28.0)}
    return _modelled("ofa-latency", truths.measured().space, values, bounds, ())


def _modelled(
    name: str,
    space: SearchSpace,
    values: Values,
    bounds: Mapping[str, tuple[float, float]],
    measures: tuple[Measure, ...],
) -> SearchProblem:
    objectives = {column: "max" if column == "top1" else "min" for column in bounds}
    free = {measure.name for measure in measures}

    def evaluate(subnet: Subnet) -> dict[str, float]:
        columns = values(space.indices([subnet]))
        return {k: float(v[0]) for k, v in columns.items() if k not in free}

    problem = SearchProblem(
        name, space, FunctionEvaluator(evaluate), objectives, bounds, values, measures
    )
    best = near_optimal(problem)
    return SearchProblem(**{**vars(problem), "true_hypervolume": best, "exact_front": False})


def near_optimal(problem: SearchProblem, evaluations: int = NEAR_OPTIMAL) -> float:
    """Return the hypervolume of an NSGA-II with so many evaluations of the truth itself.

    Population 200. The value is kept in `results/near_optimal.json`, beside the truth's check.
    """
    path = RESULTS / "near_optimal.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    check = problem.check
    entry = entries.get(problem.name, {"check": -1.0})
    if abs(entry["check"] - check) < SAME_TRUTH and entry["evaluations"] == evaluations:
        return float(entry["hypervolume"])
    from lightning_subnet.strategies._toolkit.breeding import evolve
    from lightning_subnet.study import Problem

    population, rng = 200, np.random.default_rng(0)
    exact = {measure.name: measure for measure in problem.measures}
    setting = Problem(problem.space, parse_objectives(problem.objectives), (), exact)
    _, rows = evolve(
        setting,
        lambda X: (problem.unit(X), np.zeros(len(X))),
        problem.space.sample_indices(population, rng),
        population=population,
        generations=evaluations // population - 1,
        rng=rng,
    )
    best = round(pareto.hypervolume(problem.unit(rows), [1.0] * len(problem.objectives)), 6)
    entries[problem.name] = {
        "hypervolume": best,
        "evaluations": evaluations,
        "check": round(check, 6),
    }
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    return best


def slug(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-")


PROBLEMS: dict[str, Callable[[], SearchProblem]] = {
    **{slug(f"nb201 {pair}"): partial(nb201, pair) for pair in NB201_PAIRS},
    "macro": macro,
    **{f"hwgpt-{device}": partial(hwgpt, device) for device in HWGPT_DEVICES},
    **{f"ofa-{truth}": partial(ofa, truth) for truth in ("networks", "trees")},
    "ofa-latency": ofa_latency,
}
