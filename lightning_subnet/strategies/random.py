# SPDX-License-Identifier: Apache-2.0
"""Random search: uniform over the distinct subnets, or spread evenly over an exact cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._types import Indices
from lightning_subnet.errors import StrategyError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies.base import Draw, Strategy, check_positive, fill, uniform_draws
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem

_OVERSAMPLING = 50
_TRACED_OVERSAMPLING = 4  # where the measure takes milliseconds a subnet


class RandomSearch(Strategy):
    """Draw subnets uniformly, without repeats.

    Args:
        stratify_by: An exact measure; each generation then has its subnets spread evenly over the
            range of that cost, where uniform draws would crowd around the middle.
        batch_size: Proposals a generation.

    Example:
        >>> from lightning_subnet import FunctionEvaluator, SearchSpace, SubnetSearch
        >>> search = SubnetSearch(space=SearchSpace(depth=[1, 2, 3, 4]),
        ...                       objectives={"error": "min"},
        ...                       strategy=RandomSearch(batch_size=2), budget=3, storage=None)
        >>> evaluator = FunctionEvaluator(lambda s: {"error": 1 / s["depth"]})
        >>> len(search.run(evaluator, progress=False).history)
        3
    """

    name = "random"

    def __init__(self, *, stratify_by: str | None = None, batch_size: int = 50) -> None:
        check_positive(batch_size=batch_size)
        self.stratify_by = stratify_by
        self.batch_size = batch_size

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return n subnets drawn at random; see `Strategy.propose`."""
        source = uniform_draws(problem) if self.stratify_by is None else self._stratified(problem)
        return fill(problem, history, pending, n, rng, source)

    def _stratified(self, problem: Problem) -> Draw:
        assert self.stratify_by is not None
        if self.stratify_by not in problem.exact:
            msg = (
                f"stratify_by={self.stratify_by!r} is not an exact measure of this search."
                f"{did_you_mean(self.stratify_by, problem.exact)} It has {listed(problem.exact)}."
            )
            raise StrategyError(msg)
        cost = problem.exact[self.stratify_by]
        times = _OVERSAMPLING if cost.vectorised else _TRACED_OVERSAMPLING

        def draw(k: int, rng: np.random.Generator) -> Indices:
            X = problem.space.sample_indices(min(k * times, problem.space.size), rng)
            X = X[problem.exact_violation(X) <= 0] if problem.exact_constraints else X
            if not len(X):
                return X
            values, _ = cost.evaluate(problem.space, X)
            edges = np.linspace(values.min(), values.max(), k + 1)
            stratum = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, k - 1)
            _, first = np.unique(stratum, return_index=True)  # X is in random order already
            rows: Indices = X[rng.permutation(first)]
            return rows

        return draw
