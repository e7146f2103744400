# SPDX-License-Identifier: Apache-2.0
"""Small spaces, problems and histories that contracts try things on, with known answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.search.search import SubnetSearch
from lightning_subnet.space.choices import Choice
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.evaluators import FunctionEvaluator
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.measures import Measure, measure
from lightning_subnet.study.objectives import Constraint, Objective
from lightning_subnet.study.problem import Problem


def numpy_state() -> tuple[bytes, int]:
    """Return NumPy's global random state, which users' code may use: numbers, and which is next."""
    state: Any = np.random.get_state()  # noqa: NPY002 - see above
    return state[1].tobytes(), state[2]


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


def ends_and_more(space: SearchSpace, n: int, seed: int = 0) -> list[Subnet]:
    """Return the smallest and the largest subnet and n random ones, or all that there are."""
    return [space.smallest, space.largest, *space.sample(min(n, space.size), seed)]


# Problems


@measure("cost", exact=True, takes="indices")
def cost(X: Indices) -> Floats:
    """One plus the sum of the value indices: exact, and in bulk."""
    assert len(X) <= 200_000, "no strategy and no profile needs that many at once"
    values: Floats = 1.0 + X.sum(axis=1)
    return values


def values_of(X: Indices, n_objectives: int) -> Floats:
    """Return smooth objectives in conflict, (n, n_objectives): distances to different corners."""
    scaled = X / max(X.shape[1], 1)
    corners = np.linspace(0.0, 1.0, n_objectives)[None, :, None]
    values: Floats = ((scaled[:, None, :] - corners) ** 2).sum(axis=2)
    return values


def objectives_of(subnet: Subnet, n_objectives: int = 2) -> dict[str, float]:
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
        values = objectives_of(subnet, len(problem.objectives))
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
    subnets = space.sample(n_measured + n_pending, rng=3)
    history = history_of(problem, subnets[:n_measured], failed=failed)
    return Situation(problem, history, n, tuple(subnets[n_measured:]))


def situations() -> dict[str, Situation]:
    """Return situations that a strategy must cope with, by name; no space is exhausted."""
    pool = grid(4, 4).restricted_to(grid(4, 4).sample(60, rng=1))
    situations = {
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
        situations[f"{m} objectives"] = _situation(grid(4, 4), 40, n_objectives=m)
    # The relative bound on a measured value refers to the largest subnet, which is evaluation 0.
    space = conditional()
    others = [s for s in space.sample(30, rng=5) if s != space.largest]
    problem = problem_of(space, constraints={"f0": "<= 50%"})
    situations["relative measured"] = Situation(
        problem, history_of(problem, [space.largest, *others])
    )
    return situations


# Searches


def search_of(**settings: Any) -> SubnetSearch:
    """Return a search over the 25 subnets of a grid, in memory by default."""
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
        return objectives_of(subnet, self._n_objectives)


def record(history: Iterable[Evaluation]) -> list[dict[str, Any]]:
    """Return everything of the evaluations but what they took."""
    return [{k: v for k, v in e.to_json().items() if k != "seconds"} for e in history]


# Messages


def assert_clear(message: object, *parts: str) -> None:
    """Check the form of an error: at most three lines, which hold all of the parts."""
    text = str(message)
    assert 1 <= len(text.splitlines()) <= 3, text
    assert len(text) < 500, text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
