# SPDX-License-Identifier: Apache-2.0
"""Costs of the search itself (B of the benchmark protocol).

    OMP_NUM_THREADS=1 python -m benchmarks.overhead [--strategies hybrid linas]

On the OFA MobileNetV3 space, top-1 of a model against exact MACs: all time outside validations of a
search of 250, split into proposing and the rest (storage, checks, records); the next 50 proposals
with 10,000 evaluations in the history, and the peak memory of that process; scoring 20,000 subnets
on all objectives, as an inner search does it, with predictors of 250 evaluations; and what
`import lightning_subnet` adds to `import lightning`. Everything runs in a process of its own with
one thread, and targets are held against its processor time, which is the time on an idle machine;
wall time is beside it. A search of more than `--patience` seconds is cut off, and reported as such.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.data import RESULTS, ROOT
from benchmarks.efficiency_runs import STRATEGIES, available, strategy_of
from benchmarks.problems import SearchProblem, ofa
from lightning_subnet import Evaluation, History, Subnet, SubnetSearch
from lightning_subnet.strategies import Strategy
from lightning_subnet.study import Problem
from lightning_subnet.study.objectives import parse_objectives

PROBLEM, BUDGET, LARGE, SCORED = "ofa-networks", 250, 10_000, 20_000
TARGETS = {"search of 250, s": 9.0, "propose(50) after 10,000, s": 20.0, "peak memory, MiB": 2048.0}
SCORING, IMPORT = 2.0, 0.3


class Timed(Strategy):
    """A strategy that keeps the processor seconds of its proposals."""

    name = "timed"

    def __init__(self, strategy: Strategy) -> None:
        self._strategy, self._seconds = strategy, 0.0
        self.batch_size = strategy.batch_size

    @property
    def seconds(self) -> float:
        """Processor seconds so far; a property, as an attribute would be a setting."""
        return self._seconds

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        start = time.process_time()
        proposed = self._strategy.propose(problem, history, n, rng, pending)
        self._seconds += time.process_time() - start
        return proposed


def whole_search(problem: SearchProblem, label: str, patience: float) -> dict[str, Any]:
    """Return the seconds of a search outside validations, stored in a file as a user's is."""
    timed = Timed(strategy_of(label, PROBLEM))
    start, validating = now(), np.zeros(2)
    with tempfile.TemporaryDirectory() as folder:
        search = SubnetSearch(
            space=problem.space,
            measures=problem.measures,
            objectives=problem.objectives,
            strategy=timed,
            budget=BUDGET,
            storage=f"sqlite:///{folder}/search.db",
            name=label,
        )
        while (now() - start)[1] < patience and (subnets := search.ask(1)):
            before = now()
            values = problem.evaluator.evaluate(subnets[0])
            validating += now() - before
            search.tell(subnets[0], values)
        seconds, wall = now() - start - validating
        done = len(search.history)
    return {
        "evaluations": done,
        "search of 250, s": round(seconds, 2),
        "proposing, s": round(timed.seconds, 2),
        "the rest, s": round(seconds - timed.seconds, 2),
        "search of 250, wall s": round(wall, 2),
    }


def now() -> np.ndarray:
    """Return processor and wall time, (2,), in s."""
    return np.array([time.process_time(), time.perf_counter()])


def history_of(problem: SearchProblem, n: int) -> tuple[Problem, History]:
    """Return the problem as a strategy gets it, and a history of n random subnets."""
    X = problem.space.sample_indices(n, 0)
    columns = problem.values(X)
    records = [
        Evaluation(
            number=i,
            subnet=subnet,
            values={name: float(columns[name][i]) for name in problem.objectives},
            generation=0,
        )
        for i, subnet in enumerate(problem.space.from_indices(X))
    ]
    exact = {measure.name: measure for measure in problem.measures}
    setting = Problem(problem.space, parse_objectives(problem.objectives), (), exact)
    return setting, History(problem.space, records)


def next_proposals(problem: SearchProblem, label: str) -> dict[str, Any]:
    setting, history = history_of(problem, LARGE)
    strategy = strategy_of(label, PROBLEM)
    start = now()
    proposed = strategy.propose(setting, history, 50, np.random.default_rng(0))
    seconds, wall = now() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "proposed": len(proposed),
        "propose(50) after 10,000, s": round(seconds, 2),
        "propose(50), wall s": round(wall, 2),
        "peak memory, MiB": round(peak),
    }


def scoring(problem: SearchProblem, predictor: str) -> dict[str, Any]:
    """Return the seconds to score 20,000 subnets, with and without how sure the predictor is."""
    from lightning_subnet.strategies._toolkit.surrogates import Surrogates

    score = Surrogates(*history_of(problem, BUDGET), predictor)
    X = problem.space.sample_indices(SCORED, 1)
    seconds = {}
    for name, call in (("scoring, s", score), ("with its certainty, s", score.with_std)):
        call(X[:100])
        start = time.process_time()
        call(X)
        seconds[name] = round(time.process_time() - start, 2)
    return seconds


def importing(repeats: int = 5) -> float:
    """Return the median seconds that importing the package adds to importing Lightning."""
    program = (
        "import time, lightning; start = time.process_time(); import lightning_subnet; "
        "print(time.process_time() - start)"
    )
    times = [
        float(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))
        for _ in range(repeats)
    ]
    return float(np.median(times))


def alone(part: str, name: str, patience: float) -> dict[str, Any]:
    """Run one part in a process of its own; return what it prints last."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.overhead", "--part", part, name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [*command, "--patience", str(patience)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if done.returncode:
        print(
            f"{part} of {name} failed: {lines[-1] if lines else done.returncode}", file=sys.stderr
        )
        return {}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def verdict(value: float, target: float) -> str:
    return "-" if np.isnan(value) else "pass" if value <= target else "FAIL"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=available(), choices=STRATEGIES)
    parser.add_argument("--predictors", nargs="+", default=["ridge", "auto"])
    parser.add_argument("--patience", type=float, default=600)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.csv")
    args = parser.parse_args()
    if args.part:
        part, name = args.part
        problem = ofa("networks")
        parts = {
            "search": lambda: whole_search(problem, name, args.patience),
            "propose": lambda: next_proposals(problem, name),
            "score": lambda: scoring(problem, name),
        }
        print(json.dumps(parts[part]()))
        return
    rows = []
    for label in args.strategies:
        row = {"strategy": label, **alone("search", label, args.patience)}
        row |= alone("propose", label, args.patience)
        for name, target in TARGETS.items():
            value = float(row.get(name, np.nan))
            row[f"{name} <= {target:g}"] = verdict(value, target)
        if row.get("evaluations", BUDGET) < BUDGET:
            row["search of 250, s <= 9"] = "FAIL, cut off"
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    frame = pd.DataFrame(rows).set_index("strategy")
    others: dict[str, dict[str, Any]] = {}
    for predictor in args.predictors:
        seconds = alone("score", predictor, args.patience)
        for name, value in seconds.items():
            label = f"20,000 subnets, {predictor}: {name}"
            others[label] = {"value": value, "target": SCORING}
    others["import lightning_subnet over import lightning, s"] = {
        "value": round(importing(), 3),
        "target": IMPORT,
    }
    table = pd.DataFrame(others).T
    table["verdict"] = [verdict(r.value, r.target) for r in table.itertuples()]
    pd.set_option("display.width", 250, "display.max_columns", 30)
    print(frame.T.to_string())
    print(table.to_string())
    frame.to_csv(args.out)
    table.to_csv(args.out.with_name(f"{args.out.stem}_other.csv"))


if __name__ == "__main__":
    main()
