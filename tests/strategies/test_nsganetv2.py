# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.interpolate import RBFInterpolator

from lightning_subnet import FunctionEvaluator, Objective
from lightning_subnet.errors import StrategyError
from lightning_subnet.strategies import NSGANetV2, RandomSearch
from lightning_subnet.strategies._toolkit.published import CubicRBF, positions
from lightning_subnet.strategies.nsganetv2 import Switching, even_subset
from lightning_subnet.study import Problem, pareto
from lightning_subnet.testing.proposals import propose
from lightning_subnet.testing.strategy import StrategyContract
from tests.problems import Situation, assert_clear, cost, grid, history_of, problem_of, search_of


class TestNSGANetV2(StrategyContract):
    cls = NSGANetV2
    settings: ClassVar[dict[str, Any]] = {
        "batch_size": 8,
        "first": 16,
        "inner_population": 20,
        "generations": 4,
        "predictor": "rbf",
    }


def test_it_begins_with_the_smallest_and_the_largest() -> None:
    problem = problem_of(grid(8, 4))
    s = Situation(problem, history_of(problem, []), 8)
    first = propose(NSGANetV2(), s)
    assert first[:2] == [problem.space.smallest, problem.space.largest]
    s = Situation(problem, history_of(problem, first), 8)
    assert propose(NSGANetV2(), s) == propose(RandomSearch(), s)


def test_the_model_that_ranks_best_is_chosen() -> None:
    space = grid(6, 4)
    X = space.sample_indices(120, 0)
    F = positions(space, X)
    steps = 10.0 * (X[:, 0] > 1) + 5.0 * (X[:, 1] > 2) + X[:, 2] / 9
    for y, chosen in ((X @ np.arange(1.0, 7.0), {"rbf", "gp", "network"}), (steps, {"carts"})):
        model = Switching(random_state=3).fit(F, y)
        assert model.used == "switching"
        assert set(model.scores) == {"network", "carts", "rbf", "gp"}
        assert model.chosen in chosen, model.scores
        best = max(mean - std for mean, std in model.scores.values())
        assert model.scores[model.chosen] == next(
            (mean, std) for mean, std in model.scores.values() if mean - std == best
        )


def test_radial_basis_functions_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    F, G = rng.random((40, 5)), rng.random((30, 5))
    z = np.sin(3 * F).sum(axis=1)
    expected = RBFInterpolator(F, z, kernel="cubic", degree=1)(G)
    np.testing.assert_allclose(CubicRBF().fit(F, z).predict(G), expected, atol=1e-3)


def test_a_column_that_never_varied_is_no_trouble_for_them() -> None:
    F = np.column_stack([np.linspace(0, 1, 12), np.ones(12)])
    told = CubicRBF().fit(F, 2 * F[:, 0]).predict(np.array([[0.25, 1.0]]))
    assert told[0] == pytest.approx(0.5, abs=1e-3)


def test_the_subset_is_the_most_even_of_all_or_nearly() -> None:
    rng = np.random.default_rng(0)

    def uneven(known: np.ndarray, costs: np.ndarray) -> float:
        return float(np.diff(np.sort(np.concatenate([known, costs]))).std())

    ratios = []
    for _ in range(20):
        known, costs = rng.random(5), rng.random(11)
        found = uneven(known, costs[even_subset(known, costs, 4)])
        best = min(uneven(known, costs[list(c)]) for c in combinations(range(11), 4))
        ratios.append(found / best)
    assert min(ratios) >= 1 - 1e-12
    assert np.median(ratios) < 1.001
    assert max(ratios) < 1.5


def test_the_batch_fills_the_gap_of_the_front() -> None:
    # Every subnet is on the front: what is cheap loses in the other objective.
    space = grid(1, 60)
    problem = Problem(
        space, (Objective("f0", "min"), Objective("cost", "max")), exact={"cost": cost}
    )
    told = problem_of(space, exact=[cost])
    at = [*range(12), *range(48, 60)]
    history = history_of(told, [space.from_indices(np.array([[i]]))[0] for i in at])
    strategy = NSGANetV2(first=20, batch_size=4, predictor="rbf")
    proposals = propose(strategy, Situation(problem, history, 4))
    inside = sorted(int(s.indices[0]) for s in proposals)
    assert 12 <= inside[0] <= inside[-1] < 48
    assert max(np.diff([11, *inside, 48])) <= 12


def test_with_one_objective_it_measures_the_best_predicted() -> None:
    space = grid(8, 4)
    problem = Problem(space, (Objective("cost", "min"),))
    history = history_of(problem_of(space), space.sample(40, rng=0))
    least = min(e.values["cost"] for e in history)
    strategy = NSGANetV2(first=20, predictor="rbf")
    assert cost(space.indices(propose(strategy, Situation(problem, history, 8)))).max() < least


@pytest.mark.slow
def test_switching_drives_a_search_that_is_ahead_of_random() -> None:
    space, weights = grid(8, 5), np.arange(1, 9)

    def volume(strategy: Any) -> float:
        search = search_of(
            space=space, objectives={"a": "min", "b": "max"}, strategy=strategy, budget=48
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

    assert volume(NSGANetV2(first=24, batch_size=24)) > 1.1 * volume(RandomSearch())


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"first": 0}, ("first=0", "whole number from 1")),
        ({"crossover": 1.5}, ("crossover=1.5", "probability")),
        ({"predictor": "switchin"}, ("'switchin'", "Did you mean 'switching'?")),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(StrategyError) as caught:
        NSGANetV2(**settings)
    assert_clear(caught.value, *parts)
