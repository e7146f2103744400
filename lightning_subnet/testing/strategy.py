# SPDX-License-Identifier: Apache-2.0
"""The contract of a strategy: new, distinct members, a function of its arguments alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from lightning_subnet.errors import SpaceExhausted
from lightning_subnet.search.search import SubnetSearch
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.strategies.registry import names, resolve
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.measures import Measure, Takes
from lightning_subnet.testing.problems import (
    Counting,
    Situation,
    conditional,
    cost,
    grid,
    history_of,
    mixed,
    numpy_state,
    problem_of,
    record,
    search_of,
    situations,
)
from lightning_subnet.testing.proposals import in_every_situation, propose

SITUATIONS = situations()
_MOST_ROWS = 200_000  # of exact measures in one call of propose: bounded work, not a time


def contents(s: Situation) -> tuple[Any, ...]:
    """Return all parts of a situation that a strategy must not change."""
    problem = s.problem
    return (
        record(s.history),
        s.history.codes,
        s.history.indices.tolist(),
        problem.space.fingerprint,
        problem.objectives,
        problem.constraints,
        dict(problem.exact),
        s.pending,
    )


class StrategyContract:
    """The tests that every strategy inherits.

    Attributes:
        cls: The class of the strategy, in a module that other processes can import.
        settings: Arguments of its constructor, JSON-able; populations and batches of about 20, so
            that all of its parts run in the situations.
        registered: Whether the strategy has a name in `strategy=`: a line in the table of
            `strategies/registry.py`, or an entry point.

    Example:
        >>> from lightning_subnet.strategies import RandomSearch
        >>> class TestRandomSearch(StrategyContract):
        ...     cls = RandomSearch
    """

    cls: ClassVar[type[Strategy]]
    settings: ClassVar[dict[str, Any]] = {}
    registered: ClassVar[bool] = True

    def make(self) -> Strategy:
        """Return the strategy with these settings."""
        return self.cls(**self.settings)

    @pytest.mark.parametrize("name", SITUATIONS)
    def test_proposals_are_new_distinct_canonical_members_and_at_most_n(self, name: str) -> None:
        s = SITUATIONS[name]
        proposals = propose(self.make(), s)
        space = s.problem.space
        left = space.size - len(s.history) - len(s.pending)
        assert 1 <= len(proposals) <= s.n
        if left <= s.n:
            assert len(proposals) == left, "a space nearly exhausted gives all that is left"
        assert len(set(proposals)) == len(proposals)
        for subnet in proposals:
            assert isinstance(subnet, Subnet)
            assert subnet in space
            assert subnet not in s.history
            assert subnet not in s.pending
        X = space.indices(proposals)
        np.testing.assert_array_equal(X, space.canonical(X))

    @pytest.mark.parametrize("name", SITUATIONS)
    def test_the_same_arguments_give_the_same_proposals(self, name: str) -> None:
        strategy, s = self.make(), SITUATIONS[name]
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
        first = propose(strategy, s)
        propose(strategy, SITUATIONS["pending"])  # a strategy remembers nothing between calls
        random.seed(2)
        np.random.seed(2)  # noqa: NPY002 - the user's code may use it
        state = random.getstate(), numpy_state()
        assert propose(strategy, s) == first
        assert propose(self.make(), s) == first
        assert (random.getstate(), numpy_state()) == state

    def test_the_seed_matters(self) -> None:
        s = SITUATIONS["large"]
        assert propose(self.make(), s, seed=1) != propose(self.make(), s, seed=2)

    def test_another_process_proposes_the_same_under_another_hash_seed(self) -> None:
        command = [sys.executable, "-m", "lightning_subnet.testing.proposals"]
        command += [self.cls.__module__, self.cls.__qualname__, json.dumps(self.settings)]
        home = Path(sys.modules[self.cls.__module__].__file__ or ".").parent
        path = os.pathsep.join([*filter(None, sys.path), str(home)])
        seed = "1" if os.environ.get("PYTHONHASHSEED") == "2024" else "2024"
        there = subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        assert json.loads(there.stdout) == in_every_situation(self.make())

    @pytest.mark.parametrize("name", SITUATIONS)
    def test_history_problem_pending_and_the_strategy_stay_as_they_are(self, name: str) -> None:
        strategy, s = self.make(), SITUATIONS[name]
        before, attributes = contents(s), dict(vars(strategy))
        propose(strategy, s)
        assert contents(s) == before
        assert dict(vars(strategy)) == attributes

    @pytest.mark.parametrize("space", [grid(2, 5), conditional(), mixed()], ids=repr)
    @pytest.mark.parametrize("n_pending", [0, 4])
    def test_an_exhausted_space_says_so(self, space: SearchSpace, n_pending: int) -> None:
        problem = problem_of(space)
        everything = list(space)
        at = len(everything) - n_pending
        s = Situation(problem, history_of(problem, everything[:at]), 5, tuple(everything[at:]))
        with pytest.raises(SpaceExhausted):
            propose(self.make(), s)

    def test_every_subnet_comes_exactly_once_until_the_space_is_exhausted(self) -> None:
        problem = problem_of(mixed())
        history = history_of(problem, [])
        strategy = self.make()
        for generation in range(100):
            s = Situation(problem, history, 4)
            try:
                proposals = propose(strategy, s, seed=generation)
            except SpaceExhausted:
                break
            history = history_of(problem, [*(e.subnet for e in history), *proposals])
        assert len(history) == mixed().size == 30
        assert {e.subnet for e in history} == set(mixed())

    @pytest.mark.parametrize("bound", [2, 4])
    def test_feasible_subnets_come_first_under_an_exact_constraint(self, bound: int) -> None:
        space = conditional()
        problem = problem_of(space, constraints={"cost": f"<= {bound}"})
        feasible = {s for s in space if problem.exact_violation(space.indices([s]))[0] <= 0}
        measured = [s for s in space.sample(40, rng=0) if s not in feasible]
        proposals = propose(
            self.make(), Situation(problem, history_of(problem, measured), len(feasible) + 3)
        )
        assert set(proposals[: len(feasible)]) == feasible
        rest = problem.exact_violation(space.indices(proposals[len(feasible) :]))
        assert (rest > 0).all()
        assert (np.diff(rest) >= 0).all(), "then those that violate it least"

    @pytest.mark.parametrize("takes", ["indices", "subnets"])
    @pytest.mark.parametrize("n_measured", [0, 60])
    def test_an_infeasible_exact_constraint_costs_bounded_work(
        self, takes: Takes, n_measured: int
    ) -> None:
        rows = 0

        def counted(given: Any) -> Any:
            nonlocal rows
            rows += len(given)
            assert rows < _MOST_ROWS, "propose does not come to an end"
            X = given if takes == "indices" else np.array([s.indices for s in given])
            return 1.0 + X.sum(axis=1)

        space = grid(40, 4)
        measure = Measure("cost", counted, exact=True, takes=takes)
        problem = problem_of(space, constraints={"cost": "<= 0.5"}, exact=[measure])
        history = history_of(problem, space.sample(n_measured, rng=0))
        rows = 0
        s = Situation(problem, history, 50)
        assert len(propose(self.make(), s)) == 50
        if takes == "subnets":  # such a measure takes milliseconds a subnet
            assert rows < 100 * s.n

    def test_a_proposal_outside_a_pool_becomes_a_member(self) -> None:
        pool = grid(6, 4).restricted_to(grid(6, 4).sample(200, rng=2))
        problem = problem_of(pool)
        history = history_of(problem, pool.sample(60, rng=3))
        proposals = propose(self.make(), Situation(problem, history, 30))
        assert len(proposals) == 30
        assert all(subnet in pool for subnet in proposals)

    def test_settings_are_json_and_complete(self) -> None:
        strategy = self.make()
        assert json.loads(json.dumps(strategy.settings())) == strategy.settings()
        for name, value in self.settings.items():
            assert strategy.settings()[name] == value
        assert isinstance(strategy.batch_size, int)
        assert strategy.batch_size >= 1
        assert type(strategy).__name__ in repr(strategy)

    def test_the_opening_follows_no_measurement_and_is_no_setting(self) -> None:
        strategy = self.make()
        size, setting = strategy.opening.size, strategy.opening.setting
        assert "opening" not in strategy.settings()
        if setting:
            assert strategy.settings()[setting] == size
        if size < 1:
            return
        problem = problem_of(grid(8, 4))
        history = history_of(problem, problem.space.sample(size - 1, rng=3))
        other = History(problem.space)
        for e in history:
            other.add(Evaluation(e.number, e.subnet, {k: -v for k, v in e.values.items()}))
        situations = [Situation(problem, h, strategy.batch_size) for h in (history, other)]
        first, second = (propose(strategy, s) for s in situations)
        assert first == second

    def test_it_has_a_name_in_the_list(self) -> None:
        assert isinstance(self.cls.name, str)
        if not self.registered:
            return
        assert self.cls.name in names()
        assert type(resolve(self.cls.name)) is self.cls

    def test_a_whole_search_survives_failures_and_resumes_exactly(self, tmp_path: Path) -> None:
        def settings(url: str | None) -> dict[str, Any]:
            return {
                "space": conditional(),
                "measures": [cost],
                "objectives": {"f0": "min", "f1": "max", "cost": "min"},
                "constraints": {"cost": "<= 90%"},
                "strategy": self.make(),
                "budget": 45,
                "storage": url,
                "name": "study",
                "seed": 5,
            }

        def step(search: SubnetSearch, at_most: int) -> list[Evaluation]:
            evaluations: list[Evaluation] = []
            while len(evaluations) < at_most and (subnets := search.ask(1)):
                subnet = subnets[0]
                if int(subnet.key[:2], 16) % 5 == 0:
                    evaluations.append(search.fail(subnet, "out of memory"))
                else:
                    values = Counting().evaluate(subnet)
                    evaluations.append(search.tell(subnet, values))
            return evaluations

        whole = search_of(**settings(None))
        step(whole, 1000)
        assert len(whole.history) == 45
        assert {e.status for e in whole.history} == {"ok", "failed"}
        url = f"sqlite:///{tmp_path}/s.db"
        while step(search_of(**settings(url)), 7):
            pass
        assert record(search_of(**settings(url)).history) == record(whole.history)
