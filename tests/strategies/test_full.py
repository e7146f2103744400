# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from lightning_subnet import Evaluation, FunctionEvaluator, History, Objective
from lightning_subnet.errors import StrategyError
from lightning_subnet.strategies import FullSearch, RandomSearch
from lightning_subnet.study import Problem, pareto
from lightning_subnet.testing.proposals import propose
from lightning_subnet.testing.strategy import StrategyContract
from tests.problems import Situation, assert_clear, grid, history_of, problem_of, search_of

SMALL: dict[str, Any] = {
    "samples": 20,
    "batch_size": 10,
    "inner_population": 20,
    "predictions": 200,
}


class TestFullSearch(StrategyContract):
    cls = FullSearch
    settings: ClassVar[dict[str, Any]] = SMALL


def test_samples_are_random_draws() -> None:
    problem = problem_of(grid(8, 4))
    history = history_of(problem, problem.space.sample(19, rng=0))
    s = Situation(problem, history, 10)
    assert propose(FullSearch(**SMALL), s) == propose(RandomSearch(), s)


def test_the_predictors_learn_from_the_samples_alone() -> None:
    problem = problem_of(grid(8, 4))
    subnets = problem.space.sample(30, rng=0)
    history = history_of(problem, subnets)
    lied = History(problem.space, history[:20])
    for e in list(history)[20:]:
        lied.add(Evaluation(e.number, e.subnet, dict.fromkeys(e.values, 0.0)))
    strategy = FullSearch(**SMALL)
    first = propose(strategy, Situation(problem, history, 10))
    assert propose(strategy, Situation(problem, lied, 10)) == first
    lied = History(problem.space)
    for e in history:
        lied.add(Evaluation(e.number, e.subnet, {n: -v for n, v in e.values.items()}))
    assert propose(strategy, Situation(problem, lied, 10)) != first


def test_batches_walk_through_one_predicted_front() -> None:
    # Whatever the seeds of the generations, the same subnets are measured first.
    problem = Problem(grid(8, 4), (Objective("f0", "min"), Objective("f1", "min")))
    history = history_of(problem, problem.space.sample(40, rng=0))
    strategy = FullSearch(**SMALL | {"samples": 40, "predictions": 1000})
    seen, ranks, missed = strategy._predicted_fronts(problem, history, history)
    assert (missed <= 0).all()
    front = set(problem.space.from_indices(seen[ranks == 0])) - {e.subnet for e in history}
    at_once = propose(strategy, Situation(problem, history, len(front)), seed=1)
    in_steps: list[Any] = []
    for seed in (2, 3):
        measured = history_of(problem, [*(e.subnet for e in history), *in_steps])
        in_steps += propose(strategy, Situation(problem, measured, len(front) // 2), seed)
    assert set(at_once) == front
    assert set(in_steps) <= front
    assert len(in_steps) == len(front) // 2 * 2 >= 6


def test_a_bound_relative_to_the_largest_may_be_told_after_the_samples() -> None:
    space = grid(6, 4)
    problem = problem_of(space, constraints={"f0": "<= 50%"})
    others = [s for s in space.sample(30, rng=0) if s != space.largest]
    history = history_of(problem, [*others, space.largest])
    assert len(propose(FullSearch(**SMALL), Situation(problem, history, 10))) == 10


@pytest.mark.slow
def test_it_is_ahead_of_random_where_predictors_know_the_problem() -> None:
    space = grid(8, 5)
    weights = np.arange(1, 9)

    def volume(strategy: Any) -> float:
        search = search_of(
            space=space, objectives={"a": "min", "b": "max"}, strategy=strategy, budget=80
        )
        search.run(
            FunctionEvaluator(
                lambda s: {
                    "a": float((s.indices * weights).sum()),
                    "b": float((s.indices * weights[::-1]).sum()),
                }
            ),
            progress=False,
        )
        return pareto.hypervolume(search.result().minimised(), [144, 0])

    full = FullSearch(samples=40, batch_size=20, predictions=4000)
    assert volume(full) > 1.1 * volume(RandomSearch())


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"samples": 0}, ("samples=0", "whole number from 1")),
        ({"predictions": -1}, ("predictions=-1",)),
        ({"mutation": 2}, ("mutation=2", "probability")),
        ({"predictor": "rigde"}, ("'rigde'", "Did you mean 'ridge'?")),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(StrategyError) as caught:
        FullSearch(**settings)
    assert_clear(caught.value, *parts)
