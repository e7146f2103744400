# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_subnet.errors import StrategyError
from lightning_subnet.strategies import RandomSearch
from lightning_subnet.testing.problems import Situation
from lightning_subnet.testing.proposals import propose
from lightning_subnet.testing.strategy import StrategyContract
from tests.problems import assert_clear, conditional, cost, grid, history_of, problem_of, search_of


class TestRandom(StrategyContract):
    cls = RandomSearch
    settings = {"batch_size": 10}  # noqa: RUF012 - a ClassVar of the base


class TestStratifiedRandom(StrategyContract):
    cls = RandomSearch
    settings = {"batch_size": 10, "stratify_by": "cost"}  # noqa: RUF012 - a ClassVar of the base


def occupied(strategy: RandomSearch, seed: int) -> int:
    """Return how many of 20 equal parts of the range of cost a generation of 20 reaches."""
    space = grid(10, 4)  # cost 1 to 31, and almost all of the space between 11 and 21
    problem = problem_of(space)
    subnets = propose(strategy, Situation(problem, history_of(problem, []), 20), seed=seed)
    values = cost(space.indices(subnets))
    edges = np.linspace(1, 31, 21)
    return len(np.unique(np.searchsorted(edges, values, side="right")))


def test_stratified_draws_reach_more_of_the_range_of_the_cost() -> None:
    uniform = [occupied(RandomSearch(), seed) for seed in range(10)]
    stratified = [occupied(RandomSearch(stratify_by="cost"), seed) for seed in range(10)]
    assert np.median(stratified) >= np.median(uniform) + 2


def test_stratified_draws_are_spread_evenly_where_every_cost_is_common() -> None:
    space = grid(1, 100)
    problem = problem_of(space)
    s = Situation(problem, history_of(problem, []), 10)
    values = cost(space.indices(propose(RandomSearch(stratify_by="cost"), s)))
    assert sorted(np.searchsorted(np.linspace(1, 100, 11)[1:-1], values)) == list(range(10))


def test_stratified_draws_stay_within_an_exact_constraint() -> None:
    problem = problem_of(grid(6, 4), constraints={"cost": "<= 60%"})
    s = Situation(problem, history_of(problem, []), 12)
    values = cost(problem.space.indices(propose(RandomSearch(stratify_by="cost"), s)))
    assert values.max() <= 0.6 * 19
    assert values.min() <= 4


def test_draws_are_uniform_over_distinct_subnets() -> None:
    # 9 of 117 subnets have depth 2, 27 depth 3, 81 depth 4. Choice by choice it would be a third.
    problem = problem_of(conditional())
    s = Situation(problem, history_of(problem, []), 20)
    drawn = [x["depth"] for seed in range(100) for x in propose(RandomSearch(), s, seed=seed)]
    shares = [drawn.count(depth) / len(drawn) for depth in (2, 3, 4)]
    # Standard deviation of the mean of 2,000 draws below 0.011.
    np.testing.assert_allclose(shares, [9 / 117, 27 / 117, 81 / 117], atol=0.04)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "10", None, True])
def test_a_batch_size_that_is_no_positive_whole_number_is_refused(batch_size: Any) -> None:
    with pytest.raises(StrategyError) as caught:
        RandomSearch(batch_size=batch_size)
    assert_clear(caught.value, "batch_size", repr(batch_size), "whole number from 1")


def test_stratifying_by_what_is_no_exact_measure_names_those_there_are() -> None:
    from lightning_subnet import measure

    @measure("latency_ms")
    def latency(subnets: Any) -> Any:
        return [1.0 for _ in subnets]

    for name in ("costs", "latency_ms"):
        search = search_of(measures=[cost, latency], strategy=RandomSearch(stratify_by=name))
        with pytest.raises(StrategyError) as caught:
            search.ask()
        assert_clear(caught.value, f"stratify_by={name!r}", "is not an exact measure", "'cost'")
    assert not len(search.history)
