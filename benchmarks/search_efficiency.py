# SPDX-License-Identifier: Apache-2.0
"""Search efficiency: hypervolume after so many validations (A of the benchmark protocol, 1 to 4).

    python -m benchmarks.search_efficiency [--problems nb201 macro] [--strategies hybrid] [--jobs 2]
    python -m benchmarks.search_efficiency --report

Counted are validations; exact objectives (MACs, FLOPs) are free for every strategy. The hypervolume
is that of all validated subnets in a fixed square. Ten seeds; five on hwgpt and for bayesian, which
ends after 100 validations. Every finished run is a row of `results/efficiency/<problem>.csv`, under
a hash of the strategy's settings, and a run that was stopped goes on from `scratch/`. After a
change of a strategy that its settings do not show: --again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.curves import to_text
from benchmarks.data import ROOT, SCRATCH
from benchmarks.efficiency_report import report
from benchmarks.efficiency_runs import (
    CHECKPOINTS,
    FOLDER,
    STRATEGIES,
    available,
    read,
    settings_hash,
    strategy_of,
)
from benchmarks.problems import PROBLEMS, SAME_TRUTH, SearchProblem, in_square
from lightning_subnet import SubnetSearch
from lightning_subnet.strategies import Strategy
from lightning_subnet.study import pareto

BUDGET, FEW_SEEDS, SEEDS = 250, 5, 10
PACKAGES = ("lightning-subnet", "numpy", "scikit-learn", "pymoo", "moocore", "botorch")

# Budgets on the OFA space, where they are longer.
LONG = {
    "random": 2000,
    "nsga2": 2000,
    "weaknas-front": 800,
    "weaknas-bands": 800,
}


@dataclass(frozen=True)
class Run:
    """One search: what is searched, by whom, with which seed and budget."""

    problem: str
    label: str
    seed: int
    budget: int

    @property
    def strategy(self) -> Strategy:
        return strategy_of(self.label, self.problem)

    @property
    def settings(self) -> str:
        return settings_hash(self.strategy)

    @property
    def database(self) -> Path:
        name = f"{self.label}-{self.settings}-{self.seed}.db"
        return SCRATCH / "efficiency" / self.problem / name

    def __str__(self) -> str:
        return f"{self.problem} {self.label} {self.seed}"


def seeds_of(label: str, problem: str, seeds: int) -> range:
    few = label == "bayesian" or problem.startswith("hwgpt")
    return range(min(seeds, FEW_SEEDS) if few else seeds)


def budget_of(label: str, problem: str) -> int:
    if label == "bayesian":
        return 100
    return LONG.get(label, BUDGET) if problem.startswith("ofa") else BUDGET


@cache
def problem_of(name: str) -> SearchProblem:
    return PROBLEMS[name]()


def search(run: Run) -> dict[str, Any]:
    """Make or finish a run; return its row."""
    problem, strategy = problem_of(run.problem), run.strategy
    run.database.parent.mkdir(parents=True, exist_ok=True)
    subnet_search = SubnetSearch(
        space=problem.space,
        measures=problem.measures,
        objectives=problem.objectives,
        strategy=strategy,
        budget=run.budget,
        storage=f"sqlite:///{run.database}",
        name=str(run),
        seed=run.seed,
    )
    exact = {measure.name for measure in problem.measures}
    names = [name for name in problem.objectives if name not in exact]
    while subnets := subnet_search.ask(run.budget):  # a generation at a time, measured at once
        columns = problem.values(problem.space.indices(subnets))
        for i, subnet in enumerate(subnets):
            subnet_search.tell(subnet, {name: float(columns[name][i]) for name in names})
    history = subnet_search.history
    values = {name: history.column(name) for name in problem.objectives}
    unit = in_square(values, problem.objectives, problem.bounds)
    curve = pareto.hypervolumes(unit, [1.0] * unit.shape[1])
    return {
        "strategy": run.label,
        "settings": run.settings,
        "seed": run.seed,
        "validations": len(curve),
        **{f"hv@{k}": f"{curve[k - 1]:.5f}" if k <= len(curve) else "" for k in CHECKPOINTS},
        "commit": commit(),
        "versions": versions(),
        "curve": to_text(curve),
    }


@cache
def commit() -> str:
    """Return the last commit of the package's own code, with a + where it was changed since."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("log", "-1", "--format=%h", "--", "lightning_subnet") or "unknown"
    return head + ("+" if git("status", "--porcelain", "--", "lightning_subnet") else "")


@cache
def versions() -> str:
    return " ".join(f"{name}={metadata.version(name)}" for name in PACKAGES)


# Results on disk


@contextmanager
def locked() -> Iterator[None]:
    """Keep other runners from writing."""
    SCRATCH.mkdir(exist_ok=True)
    with (SCRATCH / "efficiency.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(path: Path, new: pd.DataFrame, keys: list[str]) -> None:
    """Put rows into a sorted CSV, in place of those of equal keys; others stay to the letter."""
    with locked():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = new.astype(str)
        if path.exists():
            new = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False), new])
        frame = new.drop_duplicates(keys, keep="last")
        frame = frame.sort_values(keys, key=lambda c: c.astype(int) if c.name == "seed" else c)
        temporary = path.with_suffix(".tmp")
        frame.to_csv(temporary, index=False)
        temporary.replace(path)


def problem_row(name: str) -> dict[str, Any]:
    """Return a problem's row of problems.csv: its square, its best hypervolume and its truth."""
    problem = problem_of(name)
    square = "; ".join(f"{k} {best:g} to {worst:g}" for k, (best, worst) in problem.bounds.items())
    return {
        "problem": name,
        "subnets": str(problem.space.size),
        "square": square,
        "hypervolume": round(problem.true_hypervolume, 6),
        "which": "exact front" if problem.exact_front else "NSGA-II, 100,000 evaluations",
        "check": round(problem.check, 5),
        "truths": "" if name in known_checks() else taus(name),
    }


def known_checks() -> dict[str, float]:
    """Return the checks of the problems that have results."""
    path = FOLDER / "problems.csv"
    return dict(pd.read_csv(path).set_index("problem").check) if path.exists() else {}


def register(row: dict[str, Any]) -> None:
    """Write a problem's row; refuse to mix results of different truths."""
    name = row["problem"]
    print(f"{name}: {int(row['subnets']):,} subnets; square: {row['square']}", file=sys.stderr)
    checks = known_checks()
    if name not in checks:
        write(FOLDER / "problems.csv", pd.DataFrame([row]), ["problem"])
    elif abs(checks[name] - row["check"]) > SAME_TRUTH:
        raise SystemExit(
            f"The truth of {name} is another one here (check {row['check']}, recorded "
            f"{checks[name]}): its fit depends on the machine and on versions. Move "
            f"{FOLDER / name}.csv and its row of problems.csv away to start anew."
        )


def taus(name: str) -> str:
    """Return the cross-validated Kendall tau of a modelled problem's truths, as a text."""
    if not name.startswith("ofa"):
        return "measured"
    from benchmarks import truths

    kind = name.removeprefix("ofa-")
    values = {"top1": truths.top1("networks" if kind == "latency" else kind).tau()}
    if kind == "latency":
        values["latency_ms"] = truths.latency().tau()
    return "; ".join(f"{measure} tau {tau:.3f}" for measure, tau in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--problems", nargs="+", default=[""], help="names or their beginnings: nb201, ofa-trees")
    add("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    add("--seeds", type=int, default=SEEDS)
    add("--jobs", type=int, default=1, help="processes of one thread each")
    add("--again", action="store_true", help="forget the runs of these strategies and problems")
    add("--report", action="store_true", help="print the tables of what is there, and run nothing")
    args = parser.parse_args()
    problems = [p for p in PROBLEMS if any(p.startswith(start) for start in args.problems)]
    if not problems:
        parser.error(f"--problems: there are {', '.join(PROBLEMS)}")
    failed = 0
    if not args.report:
        failed = run_all(problems, args)
    report(problems)
    if failed:
        raise SystemExit(f"{failed} runs failed")


def missing_runs(problem: str, labels: list[str], args: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs of a problem that are not there; note the strategies' settings."""
    done = {(r.strategy, r.settings, r.seed): r.validations for r in read(problem).itertuples()}
    for label in labels:
        strategy, budget = strategy_of(label, problem), budget_of(label, problem)
        row = {"strategy": label, "settings": settings_hash(strategy)}
        settings = row | {"values": json.dumps(strategy.settings(), sort_keys=True)}
        write(FOLDER / "settings.csv", pd.DataFrame([settings]), list(row))
        for seed in seeds_of(label, problem, args.seeds):
            run = Run(problem, label, seed, budget)
            if args.again:
                for path in run.database.parent.glob(f"{run.database.name}*"):
                    path.unlink()
            if args.again or done.get((label, run.settings, seed), 0) < budget:
                yield run


def run_all(problems: list[str], args: argparse.Namespace) -> int:
    """Make all runs that are not there; return how many failed."""
    labels = [label for label in args.strategies if label in available()]
    if missing := [label for label in args.strategies if label not in labels]:
        print(f"not in this version, left out: {', '.join(missing)}", file=sys.stderr)
    os.environ.update({"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
    failed, start = 0, time.perf_counter()
    context = multiprocessing.get_context("spawn")  # one thread each, from their first import on
    pool = ProcessPoolExecutor(args.jobs, mp_context=context)
    try:
        for row in pool.map(problem_row, problems):
            register(row)
        runs = [run for problem in problems for run in missing_runs(problem, labels, args)]
        waiting = {pool.submit(search, run): run for run in runs}
        for n, future in enumerate(as_completed(waiting), 1):
            run = waiting[future]
            took = f"{n}/{len(runs)}, {time.perf_counter() - start:.0f} s"
            if (error := future.exception()) is not None:
                failed += 1
                print(f"{run} FAILED: {error!r:.300} ({took})", file=sys.stderr)
                continue
            row = pd.DataFrame([future.result()])
            write(FOLDER / f"{run.problem}.csv", row, ["strategy", "settings", "seed"])
            print(f"{run} {row['hv@50'][0]} {row['hv@100'][0]} ({took})", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


if __name__ == "__main__":
    main()
