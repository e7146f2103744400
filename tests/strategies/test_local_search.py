# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from lightning_subnet import Evaluation, FunctionEvaluator, History, Objective, Subnet
from lightning_subnet.errors import StrategyError
from lightning_subnet.strategies import LocalSearch, RandomSearch
from lightning_subnet.study import Problem
from lightning_subnet.testing.proposals import propose
from lightning_subnet.testing.strategy import StrategyContract
from tests.problems import Situation, grid, history_of, problem_of, search_of


class TestLocalSearch(StrategyContract):
    cls = LocalSearch
    settings: ClassVar[dict[str, Any]] = {"batch_size": 10}


def test_proposals_are_new_neighbours_of_the_front_and_its_members_take_turns() -> None:
    problem = problem_of(grid(6, 4))
    history = history_of(problem, problem.space.sample(30, rng=0))
    front = [e.subnet for e in problem.front(history)]
    near = {subnet: set(problem.space.neighbours(subnet)) for subnet in front}
    proposals = propose(LocalSearch(), Situation(problem, history, len(front)))
    assert len(front) >= 3
    for subnet in front:
        assert near[subnet] & set(proposals)
    many = propose(LocalSearch(), Situation(problem, history, 1000))
    around = {s for found in near.values() for s in found if s not in history}
    assert set(many[: len(around)]) == around, "random ones come when no neighbour is new"


def two_hills(subnet: Subnet) -> float:
    """0 at (0, 0, 0), 1 at (4, 4, 4), and a ridge between them."""
    x = subnet.indices
    return float(min(x.sum(), 1 + (4 - x).sum()))


def hills_history(problem: Problem, order: list[list[Subnet]]) -> History:
    history = History(problem.space)
    for generation, subnets in enumerate(order):
        for subnet in subnets:
            value = {"f": two_hills(subnet)}
            history.add(Evaluation(len(history), subnet, value, generation=generation))
    return history


def test_a_new_start_is_climbed_from_though_the_old_summit_is_higher() -> None:
    space = grid(3, 5)
    problem = Problem(space, (Objective("f", "min"),))
    summit = space.smallest
    climbed = [[summit], space.neighbours(summit)]
    s = Situation(problem, hills_history(problem, climbed), 5)
    fresh = [propose(LocalSearch(), s, seed) for seed in range(10)]
    assert len({subnet for proposals in fresh for subnet in proposals}) > 20, "a random start"
    start = space.from_indices(np.array([[4, 3, 3]]))[0]
    s = Situation(problem, hills_history(problem, [*climbed, [start]]), 4)
    assert set(propose(LocalSearch(), s)) <= set(space.neighbours(start))
    better = space.from_indices(np.array([[4, 4, 3]]))[0]
    s = Situation(problem, hills_history(problem, [*climbed, [start], [better]]), 4)
    assert set(propose(LocalSearch(), s)) <= set(space.neighbours(better))


def test_while_nothing_is_feasible_it_climbs_towards_the_bound() -> None:
    space = grid(6, 4)
    problem = problem_of(space, constraints={"cost": ">= 19"}, exact=[])
    history = history_of(problem_of(space), space.sample(20, rng=0))
    dearest = max(e.values["cost"] for e in history)
    near = {
        subnet
        for e in history
        if e.values["cost"] == dearest
        for subnet in space.neighbours(e.subnet)
    }
    assert set(propose(LocalSearch(), Situation(problem, history, 5))) <= near


def test_it_finds_the_summit_long_before_random_draws_do() -> None:
    space = grid(8, 4)  # 65,536

    def found(strategy: Any, seed: int) -> float:
        search = search_of(
            space=space, objectives={"f": "min"}, strategy=strategy, budget=150, seed=seed
        )
        result = search.run(
            FunctionEvaluator(lambda s: {"f": float((s.indices * np.arange(1, 9)).sum())}),
            progress=False,
        )
        return result.best("f").values["f"]

    for seed in range(3):
        assert found(LocalSearch(batch_size=5), seed) == 0
        assert found(RandomSearch(), seed) > 0


def test_settings_are_checked() -> None:
    with pytest.raises(StrategyError, match="batch_size=0"):
        LocalSearch(batch_size=0)
