# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from sklearn.linear_model import Lasso

from lightning_subnet import FunctionEvaluator, History, SearchSpace, SubnetSearch
from lightning_subnet.errors import BudgetWarning, PredictorError, StrategyError, StudyMismatchError
from lightning_subnet.strategies import LINAS, NSGA2, Hybrid, RandomSearch
from lightning_subnet.strategies._toolkit.surrogates import Surrogates
from lightning_subnet.testing.strategy import StrategyContract
from tests.problems import NasBench201, conditional, cost, history_of, problem_of


class TestLINAS(StrategyContract):
    cls = LINAS
    settings: ClassVar[dict] = {"population": 10, "predictions": 200}


class TestHybrid(StrategyContract):
    cls = Hybrid
    settings: ClassVar[dict] = {
        "batch_size": 5,
        "first": 6,
        "inner_population": 20,
        "generations": 4,
        "predictor": "ridge",
    }


def test_predictions_are_of_what_was_measured_and_exact_measures_are_computed() -> None:
    space = conditional()
    problem = problem_of(space, 3, exact=[cost])
    history = history_of(problem, space.sample(60, rng=0))
    score = Surrogates(problem, history, "ridge")
    X = space.sample_indices(40, 1)
    F, missed = score(X)
    assert F.shape == (40, 3)
    assert (missed == 0).all()
    same, std, _ = score.with_std(X)
    np.testing.assert_allclose(same, F)
    bold = F - std
    assert (bold <= F).all()
    assert (bold < F).any()


def test_the_first_batch_is_spread_over_the_cost() -> None:
    space = conditional()
    problem = problem_of(space, exact=[cost])
    history = History(space)
    everything = problem.exact_values("cost", space.indices(list(space)))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        subnets = Hybrid(first=20).propose(problem, history, 20, rng)
        chosen = problem.exact_values("cost", space.indices(subnets))
        for low, high in ((0.0, 0.4), (0.3, 0.7), (0.6, 1.0)):
            ends = everything.min() + np.array([low, high]) * np.ptp(everything)
            assert ((chosen >= ends[0]) & (chosen <= ends[1])).sum() >= 2
        depths = [sum(s["depth"] == depth for s in subnets) for depth in (2, 3, 4)]
        assert min(depths) >= 4  # uniform draws have 1.5, 4.6 and 13.8; nine are all of depth 2


def test_the_design_stays_balanced_over_its_generations() -> None:
    space = SearchSpace({f"x.{i}": range(2 + i % 4) for i in range(12)})
    problem, strategy = problem_of(space), Hybrid()
    assert strategy.batch_size == 5
    history = History(space)
    generation = 0
    while len(history) < strategy.first:
        rng = np.random.default_rng([3, generation])
        proposals = strategy.propose(problem, history, strategy.batch_size, rng)
        assert len(proposals) == strategy.batch_size
        others = [e.subnet for e in history]
        history = history_of(problem, [*others, *proposals], failed=lambda number: number % 4 == 1)
        for column, choice in zip(history.indices.T, space.choices.values(), strict=True):
            assert np.ptp(np.bincount(column, minlength=len(choice.values))) <= 1
        generation += 1
    assert generation == 3
    # What follows is chosen by prediction: it is where the front is, and no longer balanced.
    rng = np.random.default_rng([3, generation])
    later = space.indices(strategy.propose(problem, history, 30, rng))
    spread = [np.ptp(np.bincount(column, minlength=2)) for column in later.T]
    assert max(spread) > 5


def additive(n: int = 12) -> tuple[SearchSpace, FunctionEvaluator]:
    """A problem that a linear model knows after few measurements: 5^12 subnets."""
    space = SearchSpace({f"x.{i}": range(5) for i in range(n)})
    rng = np.random.default_rng(0)
    gain, price = rng.uniform(0.2, 1, n), rng.uniform(0.2, 1, n)
    return space, FunctionEvaluator(
        lambda s: {
            "error": float(sum(g * (4 - v) for g, v in zip(gain, s.values(), strict=True))),
            "cost": float(sum(p * v for p, v in zip(price, s.values(), strict=True))),
        }
    )


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(LINAS(population=20, predictions=2000), marks=pytest.mark.slow), Hybrid()],
)
def test_predictions_find_in_80_what_evolution_does_not_in_200(strategy: object) -> None:
    space, evaluator = additive()
    reference = {"error": 40.0, "cost": 40.0}

    def found(strategy: object, budget: int) -> float:
        search = SubnetSearch(
            space=space,
            objectives={"error": "min", "cost": "min"},
            strategy=strategy,
            budget=budget,
            storage=None,
        )
        return search.run(evaluator, progress=False).hypervolume(reference)

    assert found(strategy, 80) > found(NSGA2(population=20), 200)
    assert found(strategy, 80) > found(RandomSearch(), 200)


@pytest.mark.slow
def test_on_measured_cells_they_are_ahead_of_evolution() -> None:
    cells, pair = NasBench201(), "cifar10/2080ti_1"
    shares = []
    for strategy in (
        NSGA2(population=25),
        LINAS(population=25, predictions=2500),
        Hybrid(generations=15),
    ):
        search = SubnetSearch(
            space=cells.space,
            objectives={"top1": "max", "latency_ms": "min"},
            strategy=strategy,
            budget=100,
            storage=None,
        )
        result = search.run(cells.evaluator(pair), progress=False)
        shares.append(cells.share(pair, result.minimised()))
    assert min(shares[1:]) > shares[0]


def test_a_regressor_of_the_user_can_drive_the_search(tmp_path: Path) -> None:
    space, evaluator = additive(4)
    settings = {
        "space": space,
        "objectives": {"error": "min", "cost": "min"},
        "storage": f"sqlite:///{tmp_path}/s.db",
        "name": "mine",
    }

    def run(alpha: float, budget: int) -> SubnetSearch:
        strategy = Hybrid(first=10, generations=3, predictor=Lasso(alpha=alpha))
        search = SubnetSearch(**settings, strategy=strategy, budget=budget)
        search.run(evaluator, progress=False)
        return search

    run(0.01, 20)
    assert len(run(0.01, 25).history) == 25
    with pytest.raises(StudyMismatchError, match=r"alpha=0\.5"):
        run(0.5, 30)


def test_settings_are_checked() -> None:
    for bad in ({"population": 0}, {"predictions": 1.5}, {"mutation": 2}):
        with pytest.raises(StrategyError):
            LINAS(**bad)
    with pytest.raises(StrategyError):
        Hybrid(first=0)
    for strategy in (LINAS, Hybrid):
        with pytest.raises(PredictorError, match="ridge"):
            strategy(predictor="rigde")


def test_a_small_budget_is_no_warning_for_the_default_strategy(
    recwarn: pytest.WarningsRecorder,
) -> None:
    space, evaluator = additive(4)
    search = SubnetSearch(
        space=space, objectives={"error": "min", "cost": "min"}, budget=30, storage=None
    )
    assert search.strategy.name == "hybrid"
    assert len(search.run(evaluator, progress=False).history) == 30
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize(
    ("name", "budget", "hint"),
    [
        ("hybrid", 12, "Hybrid(first=3)"),
        ("weaknas", 100, "WeakNAS(first=25)"),
        ("full", 80, "FullSearch(samples=20)"),
        ("nsga2", 50, "NSGA2(population=12)"),
        ("bayesian", 20, "Bayesian(first=5)"),
    ],
)
def test_a_budget_that_ends_before_a_strategy_learns_warns(
    name: str, budget: int, hint: str
) -> None:
    space, _ = additive(4)
    given = {"space": space, "objectives": {"error": "min", "cost": "min"}, "storage": None}
    with pytest.warns(BudgetWarning) as caught:
        SubnetSearch(**given, strategy=name, budget=budget)
    assert hint in str(caught[0].message)


def test_the_samples_of_a_posterior_are_no_opening(recwarn: pytest.WarningsRecorder) -> None:
    space, _ = additive(4)
    given = {"space": space, "objectives": {"error": "min", "cost": "min"}, "storage": None}
    SubnetSearch(**given, strategy="bayesian", budget=21)  # it draws 64 samples
    assert [str(w.message) for w in recwarn] == []


def test_an_empty_history_is_no_trouble() -> None:
    problem = problem_of(conditional())
    for strategy in (LINAS(), Hybrid()):
        rng = np.random.default_rng(0)
        assert len(strategy.propose(problem, History(problem.space), 7, rng)) == 7
