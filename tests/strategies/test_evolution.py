# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any, ClassVar

import numpy as np
import pytest
from pymoo.problems import get_problem

from lightning_subnet import FunctionEvaluator, History, Objective, Subnet
from lightning_subnet.errors import StrategyError
from lightning_subnet.strategies import NSGA2, SMSEMOA, UNSGA3, RandomSearch, Strategy
from lightning_subnet.study import Problem, pareto
from lightning_subnet.study.evaluators import Evaluator
from lightning_subnet.testing.proposals import propose
from lightning_subnet.testing.strategy import StrategyContract
from tests.problems import (
    NasBench201,
    Situation,
    assert_clear,
    cost,
    grid,
    history_of,
    problem_of,
    search_of,
)

EVOLUTION = [NSGA2, UNSGA3, SMSEMOA]
SMALL: dict[str, Any] = {"population": 20}


class TestNSGA2(StrategyContract):
    cls = NSGA2
    settings: ClassVar[dict[str, Any]] = SMALL


class TestUNSGA3(StrategyContract):
    cls = UNSGA3
    settings: ClassVar[dict[str, Any]] = SMALL


class TestSMSEMOA(StrategyContract):
    cls = SMSEMOA
    settings: ClassVar[dict[str, Any]] = SMALL


# Known fronts


class Discretised:
    """A problem of pymoo on a grid of 11 levels a variable, where its true front is known.

    The front of ZDT1 and ZDT2 lies at x1 = x2 = ... = 0, that of DTLZ2 at x2 = x3 = ... = 0.5
    (Zitzler et al., Evol. Comput. 8(2), 2000; Deb et al., 2005): the grid holds 11 and 121 points.
    """

    def __init__(self, name: str, n_objectives: int, n_variables: int = 6) -> None:
        options = {"n_obj": n_objectives} if name.startswith("dtlz") else {}
        self._problem = get_problem(name, n_var=n_variables, **options)
        self.space = grid(n_variables, 11)
        self.names = [f"f{k}" for k in range(n_objectives)]
        self.reference = np.full(n_objectives, 1.1)
        levels = np.linspace(0, 1, 11)
        free = np.stack(np.meshgrid(*[levels] * (n_objectives - 1)), axis=-1)
        free = free.reshape(-1, n_objectives - 1)
        rest = 0.5 if options else 0.0
        X = np.concatenate([free, np.full((len(free), n_variables - free.shape[1]), rest)], axis=1)
        self.best = pareto.hypervolume(self._problem.evaluate(X), self.reference)

    def evaluator(self) -> Evaluator:
        def measure(subnet: Subnet) -> dict[str, float]:
            row = self._problem.evaluate(subnet.indices[None] / 10)[0]
            return {name: float(v) for name, v in zip(self.names, row, strict=True)}

        return FunctionEvaluator(measure)

    def shares(self, strategy: Strategy, *, budget: int, seeds: int = 5) -> list[float]:
        """Return the share of the true hypervolume that a search reaches, by seed."""
        found = []
        for seed in range(seeds):
            search = search_of(
                space=self.space,
                objectives=dict.fromkeys(self.names, "min"),
                strategy=strategy,
                budget=budget,
                seed=seed,
            )
            points = search.run(self.evaluator(), progress=False).minimised()
            found.append(pareto.hypervolume(points, self.reference) / self.best)
        return found


@cache
def known(name: str, n_objectives: int) -> tuple[Discretised, float]:
    """Return the problem, and what random search reaches on it."""
    problem = Discretised(name, n_objectives)
    return problem, median(problem.shares(RandomSearch(), budget=500))


# The least median share of the true hypervolume over 5 seeds, below what was measured with pymoo
# 0.6.2 (in the comment; random: 0.17, 0.00, 0.65). A broken operator or survival falls far under.
KNOWN = [
    ("zdt1", 2, NSGA2, 0.90),  # 1.00
    pytest.param("zdt1", 2, UNSGA3, 0.90, marks=pytest.mark.slow),  # 0.98
    pytest.param("zdt1", 2, SMSEMOA, 0.90, marks=pytest.mark.slow),  # 0.99
    pytest.param("zdt2", 2, NSGA2, 0.80, marks=pytest.mark.slow),  # 0.98
    pytest.param("zdt2", 2, SMSEMOA, 0.80, marks=pytest.mark.slow),  # 0.98
    pytest.param("dtlz2", 3, UNSGA3, 0.88, marks=pytest.mark.slow),  # 0.95
    pytest.param("dtlz2", 3, SMSEMOA, 0.88, marks=pytest.mark.slow),  # 0.94
]


@pytest.mark.parametrize(("name", "n_objectives", "cls", "least"), KNOWN)
def test_evolution_nears_a_known_front_and_beats_random(
    name: str, n_objectives: int, cls: type[NSGA2], least: float
) -> None:
    problem, drawn = known(name, n_objectives)
    share = median(problem.shares(cls(population=20), budget=500))
    assert share >= least
    assert share >= drawn + 0.1
    assert share <= 1 + 1e-9


@pytest.fixture(scope="module")
def nb201() -> NasBench201:
    return NasBench201()


def test_the_front_of_all_cells_is_the_published_one(nb201: NasBench201) -> None:
    for pair, indices in nb201.fronts.items():
        top1, latency = nb201.table(pair)
        rows = np.flatnonzero(pareto.nondominated(np.stack([-top1, latency], axis=1)))
        points = {(top1[i], latency[i]) for i in rows}
        assert points == {(top1[i], latency[i]) for i in indices}, pair
        assert set(indices) <= set(rows), "exact ties all stay on the front"


@pytest.mark.slow
@pytest.mark.parametrize("cls", EVOLUTION)
def test_evolution_beats_random_on_measured_cells(cls: type[NSGA2], nb201: NasBench201) -> None:
    pair = "cifar100/gold_6226"
    evaluator = nb201.evaluator(pair)

    def shares(strategy: Strategy) -> list[float]:
        return [
            nb201.share(
                pair,
                search_of(
                    space=nb201.space,
                    objectives={"top1": "max", "latency_ms": "min"},
                    strategy=strategy,
                    budget=250,
                    seed=seed,
                )
                .run(evaluator, progress=False)
                .minimised(),
            )
            for seed in range(5)
        ]

    found, drawn = median(shares(cls(population=20))), median(shares(RandomSearch()))
    assert found >= 0.975  # measured: 0.984 (NSGA-II), 0.982 (U-NSGA-III), 0.990 (SMS-EMOA)
    assert found > drawn + 0.005  # random: 0.960


# How it goes about it


def spread_history(n: int = 40, *, m: int = 2) -> tuple[Problem, History]:
    problem = problem_of(grid(8, 4), m)
    return problem, history_of(problem, problem.space.sample(n, rng=1))


@pytest.mark.parametrize("cls", EVOLUTION)
def test_proposals_are_drawn_uniformly_until_a_population_is_measured(cls: type[NSGA2]) -> None:
    problem, history = spread_history(19)
    first = propose(cls(population=20), Situation(problem, history, 20))
    assert first == propose(RandomSearch(), Situation(problem, history, 20))
    problem, history = spread_history(20)
    later = propose(cls(population=20), Situation(problem, history, 20))
    assert later != propose(RandomSearch(), Situation(problem, history, 20))


@pytest.mark.parametrize("cls", EVOLUTION)
def test_parents_are_the_survivors_of_the_whole_history(cls: type[NSGA2]) -> None:
    # One corner was measured last and attached, by nobody's generation. It dominates everything.
    space = grid(12, 4)
    problem = Problem(space, (Objective("cost", "min"),), exact={"cost": cost})
    corner = [space.smallest, *space.neighbours(space.smallest)[:5]]
    crowd = [s for s in space.sample(60, rng=0) if s not in corner]
    children = propose(
        cls(population=4, mutation=0.05),
        Situation(problem, history_of(problem, crowd + corner), 20),
    )
    away = np.median(space.indices(children).sum(axis=1))
    others = np.median(space.indices(crowd).sum(axis=1))
    assert away <= 4 < others


@pytest.mark.parametrize("cls", EVOLUTION)
def test_failed_evaluations_are_no_parents(cls: type[NSGA2]) -> None:
    # No value of a failed evaluation occurs in a good one, and nothing mutates.
    space = grid(8, 4)
    good, bad = (
        space.from_indices(grid(8, 2).sample_indices(n, seed) + low)
        for n, seed, low in ((30, 1, 0), (40, 2, 2))
    )
    order = [*bad[:20], *good, *bad[20:]]
    failed = {number for number, subnet in enumerate(order) if subnet in bad}
    s = Situation(
        problem_of(space),
        history_of(problem_of(space), order, failed=lambda number: number in failed),
        15,
    )
    children = propose(cls(population=20, mutation=0.0), s)
    assert len(children) == 15
    assert space.indices(children).max() == 1


@pytest.mark.parametrize("cls", EVOLUTION)
def test_constraints_rank_before_objectives(cls: type[NSGA2]) -> None:
    # f0 is least at x = 0, but only x.0 >= 2 is feasible, and that is a measured value.
    space = grid(6, 4)

    def measured(subnet: Subnet) -> dict[str, float]:
        return {"f0": float(subnet.indices.sum()), "x0": float(subnet["x.0"])}

    search = search_of(
        space=space,
        objectives={"f0": "min"},
        constraints={"x0": ">= 2"},
        strategy=cls(population=20),
        budget=300,
    )
    result = search.run(FunctionEvaluator(measured), progress=False)
    late = [e.values["x0"] >= 2 for e in result.history[200:]]
    assert sum(late) / len(late) > 0.65  # half of the space is feasible
    assert result.best("f0").values == {"f0": 2.0, "x0": 2.0}


@pytest.mark.parametrize("cls", EVOLUTION)
@pytest.mark.parametrize("population", [1, 2, 3])
def test_a_tiny_population_works(cls: type[NSGA2], population: int) -> None:
    for m in (1, 2, 3, 4):
        problem, history = spread_history(10, m=m)
        assert len(propose(cls(population=population), Situation(problem, history, 5))) == 5


def test_sms_emoa_thins_a_long_history_and_stays_in_the_contract() -> None:
    problem, history = spread_history(400, m=3)
    assert len(propose(SMSEMOA(population=10), Situation(problem, history, 10))) == 10


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("population", [5, 20, 92])
def test_reference_directions_are_no_more_than_the_population(m: int, population: int) -> None:
    from lightning_subnet.strategies._toolkit._pymoo import _reference_directions

    directions = _reference_directions(m, population)
    assert directions.shape[1] == m
    assert m <= len(directions) <= max(population, m)
    np.testing.assert_allclose(directions.sum(axis=1), 1)


Refused = Callable[..., Strategy]


@pytest.mark.parametrize("cls", EVOLUTION)
@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("population", 0, "whole number from 1"),
        ("population", 2.5, "whole number from 1"),
        ("population", "20", "whole number from 1"),
        ("crossover", 7, "from 0 to 1"),
        ("crossover", -0.1, "from 0 to 1"),
        ("mutation", float("nan"), "from 0 to 1"),
        ("mutation", "high", "from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    cls: Refused, setting: str, value: Any, expected: str
) -> None:
    with pytest.raises(StrategyError) as caught:
        cls(**{setting: value})
    assert_clear(caught.value, setting, repr(value), expected)
