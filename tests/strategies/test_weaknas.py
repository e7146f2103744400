# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor

from lightning_subnet import History, Objective, Subnet
from lightning_subnet.errors import PredictorError, StrategyError
from lightning_subnet.predictors.base import kendall_tau
from lightning_subnet.strategies import RandomSearch, WeakNAS
from lightning_subnet.strategies._toolkit.published import Bare, positions
from lightning_subnet.study import Problem
from lightning_subnet.testing.proposals import propose
from lightning_subnet.testing.strategy import StrategyContract
from tests.problems import (
    NasBench201,
    Situation,
    assert_clear,
    conditional,
    cost,
    grid,
    history_of,
    problem_of,
    search_of,
)

SMALL: dict[str, Any] = {"batch_size": 10, "pool": 100, "top": 30, "predictor": "ridge"}


class TestWeakNAS(StrategyContract):
    cls = WeakNAS
    settings: ClassVar[dict[str, Any]] = SMALL


def measured(n: int = 40, *, seed: int = 0, m: int = 2) -> tuple[Problem, History]:
    problem = problem_of(grid(8, 4), m)
    return problem, history_of(problem, problem.space.sample(n, rng=seed))


def rounds(strategy: WeakNAS, problem: Problem, history: History, n: int) -> list[list[Subnet]]:
    """Return the proposals of n generations, each measured before the next."""
    made = []
    for generation in range(n):
        made.append(propose(strategy, Situation(problem, history, strategy.batch_size), generation))
        history = history_of(problem, [*(e.subnet for e in history), *made[-1]])
    return made


def pool_of(strategy: WeakNAS, problem: Problem, history: History) -> list[Subnet]:
    return problem.space.from_indices(strategy._pool(problem, history))


def test_the_pool_is_one_in_a_study_and_another_under_another_seed() -> None:
    strategy = WeakNAS(**SMALL)
    pools = []
    for seed in (0, 1):
        problem, history = measured(10, seed=seed)
        pool = pool_of(strategy, problem, history)
        assert len(set(pool) | {e.subnet for e in history}) <= strategy.pool
        for proposals in rounds(strategy, problem, history, 4):
            assert set(proposals) <= set(pool)
        pools.append(set(pool))
    assert len(pools[0] & pools[1]) < 5  # 90 of 65,536 each


def test_a_batch_is_drawn_from_the_top_of_the_ranking_and_is_not_its_head() -> None:
    # The cost is the sum of the positions: ridge knows it from 60 rows, and it has one objective.
    space = grid(8, 4)
    problem = Problem(space, (Objective("cost", "min"),), exact={})
    told = problem_of(space)
    history = history_of(told, space.sample(60, rng=0))
    strategy = WeakNAS(batch_size=10, first=60, pool=500, top=40, predictor="ridge")
    pool = {*pool_of(strategy, problem, history), *(e.subnet for e in history)}
    costs = sorted(float(s.indices.sum()) for s in pool)
    drawn = [
        float(s.indices.sum())
        for seed in range(20)
        for s in propose(strategy, Situation(problem, history, 10), seed)
    ]
    assert max(drawn) <= costs[strategy.top]  # ties at the edge of the top are in it or not
    assert np.mean(drawn) > np.mean(costs[:10]) + 0.1
    assert abs(np.mean(drawn) - np.mean(costs[: strategy.top])) < 0.5


def test_where_the_top_is_nearly_measured_the_best_ranked_new_ones_follow() -> None:
    space = grid(3, 4)
    problem = Problem(space, (Objective("cost", "min"),), exact={"cost": cost})
    ranked = sorted(space, key=lambda s: (s.indices.sum(), s.key))
    some = [*ranked[:9], *ranked[40:]]  # of the top 10 one is new
    history = history_of(problem, some)
    strategy = WeakNAS(batch_size=4, pool=64, top=10)
    costs = sorted(s.indices.sum() for s in propose(strategy, Situation(problem, history, 4)))
    expected = sorted(s.indices.sum() for s in ranked[9:40])[:4]
    assert costs == expected


def test_a_space_smaller_than_the_pool_is_the_pool() -> None:
    space = conditional()
    problem = problem_of(space)
    history = history_of(problem, space.sample(20, rng=0))
    assert set(pool_of(WeakNAS(**SMALL | {"pool": 1000}), problem, history)) == set(space)


def test_bands_of_cost_take_turns_and_others_rank_within() -> None:
    space = grid(6, 4)
    problem = Problem(
        space, (Objective("cost", "min"), Objective("f0", "max")), exact={"cost": cost}
    )
    history = history_of(problem_of(space), space.sample(20, rng=0))
    strategy = WeakNAS(
        batch_size=10, first=20, pool=1000, top=150, bands=3, reading="bands", predictor="ridge"
    )
    everything = np.concatenate([history.indices, strategy._pool(problem, history)])
    edges = np.quantile(cost(everything), [0, 1 / 3, 2 / 3, 1])
    for turn in range(6):
        s = Situation(problem, history, 10)
        proposals = propose(strategy, s, turn)
        costs = cost(space.indices(proposals))
        low, high = edges[turn % 3 : turn % 3 + 2]
        assert ((costs >= low) & (costs <= high)).all(), turn
        history = history_of(problem_of(space), [*(e.subnet for e in history), *proposals])


def test_bands_of_one_objective_rank_by_it_and_of_three_by_the_others() -> None:
    space = grid(6, 4)
    for m in (1, 3):
        problem = problem_of(space, m)
        history = history_of(problem, space.sample(60, rng=0))
        bands = WeakNAS(**SMALL | {"reading": "bands", "bands": 2})
        proposals = propose(bands, Situation(problem, history, 10))
        front = propose(WeakNAS(**SMALL), Situation(problem, history, 10))
        assert len(proposals) == 10
        assert (proposals == front) == (m == 1)


def test_predicted_violation_comes_last() -> None:
    # Half of the space is feasible, by a value that is measured and linear.
    space = grid(6, 4)
    problem = problem_of(space, constraints={"cost": "<= 10"}, exact=[])
    history = history_of(problem_of(space), space.sample(60, rng=0))
    strategy = WeakNAS(batch_size=20, pool=400, top=100, predictor="ridge")
    proposals = propose(strategy, Situation(problem, history, 20))
    assert (cost(space.indices(proposals)) <= 10).all()


@pytest.mark.parametrize(
    ("name", "least"),
    # Measured: 0.76, 0.84, 0.73; a model that learns nothing has 0.
    [("boosting", 0.6), pytest.param("mlp", 0.6, marks=pytest.mark.slow), ("forest", 0.6)],
)
def test_the_published_predictors_learn_the_order(name: str, least: float) -> None:
    space = grid(6, 4)
    X = space.sample_indices(400, 0)
    y = (X * np.arange(1, 7)).sum(axis=1) + X[:, 0] * X[:, 1]
    F = positions(space, X)
    predictor = Bare(name, random_state=1).fit(F[:60], y[:60])
    assert predictor.used == name
    assert kendall_tau(predictor.predict(F[100:]), y[100:].astype(float))[0] > least


def test_trees_and_estimators_of_the_user_draw_from_rng_alone() -> None:
    problem, history = measured()
    for predictor in ("boosting", ExtraTreesRegressor(20)):
        strategy = WeakNAS(**SMALL | {"predictor": predictor})
        np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
        first = propose(strategy, Situation(problem, history, 10))
        np.random.seed(2)  # noqa: NPY002 - as above
        assert propose(strategy, Situation(problem, history, 10)) == first


def test_equal_values_and_failures_alone_are_no_trouble() -> None:
    problem, history = measured()
    equal = Problem(problem.space, (Objective("same", "min"),))
    flat = History(problem.space)
    for e in history:
        flat.add(type(e)(e.number, e.subnet, {"same": 1.0}))
    with pytest.warns(UserWarning, match="all equal"):
        assert len(propose(WeakNAS(**SMALL), Situation(equal, flat, 10))) == 10
    failed = history_of(problem, [e.subnet for e in history], failed=lambda number: True)
    assert len(propose(WeakNAS(**SMALL), Situation(problem, failed, 10))) == 10


@pytest.mark.slow
def test_on_measured_cells_it_is_ahead_of_random() -> None:
    cells, pair = NasBench201(), "cifar100/gold_6226"

    def best(strategy: Any) -> float:
        found = [
            search_of(
                space=cells.space,
                objectives={"top1": "max"},
                strategy=strategy,
                budget=80,
                seed=seed,
            )
            .run(cells.evaluator(pair), progress=False)
            .best("top1")
            .values["top1"]
            for seed in range(3)
        ]
        return float(np.median(found))

    weak = WeakNAS(batch_size=10, top=100, pool=15_625, predictor="ridge")
    assert best(weak) > best(RandomSearch())


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"reading": "band"}, ("'band'", "Did you mean 'bands'?")),
        ({"top": 50}, ("top=50", "batch_size=100")),
        ({"top": 400, "reading": "bands"}, ("top=400", "5 bands, 80 in each", "batch_size=100")),
        ({"pool": 500}, ("pool=500", "top=1000")),
        ({"pool": 1000, "first": 2000}, ("pool=1000", "first=2000")),
        ({"bands": 0}, ("bands=0", "whole number from 1")),
        ({"first": 1.5}, ("first=1.5",)),
        ({"predictor": "forrest"}, ("'forrest'", "Did you mean 'forest'?")),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(StrategyError) as caught:
        WeakNAS(**settings)
    assert_clear(caught.value, *parts)


def test_what_is_no_predictor_is_refused_at_construction() -> None:
    for wrong in (ExtraTreesRegressor, 3, None):
        with pytest.raises(PredictorError):
            WeakNAS(predictor=wrong)
