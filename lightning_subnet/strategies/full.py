# SPDX-License-Identifier: Apache-2.0
"""Full search: predictors of random samples, a long search on them, and its front validated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies._toolkit.predicting import LongSearch
from lightning_subnet.strategies._toolkit.published import study_rng
from lightning_subnet.strategies._toolkit.ranking import front_ranks
from lightning_subnet.strategies._toolkit.sampling import by_choice, in_order
from lightning_subnet.strategies.base import Opening, are_new, check_positive, fill
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem


class FullSearch(LongSearch):
    """The paper's full search on predictions: sample, train once, search long, validate the front.

    First `samples` random subnets are measured. One predictor per objective is fitted on them, and
    only on them; a long NSGA-II searches on the predictors, once in a study. Then its predicted
    front is measured in batches, in random order, and after it the next front of all that the
    search has looked at, until the budget ends. These batches teach the predictors nothing, which
    is what `"linas"` adds. The paper's other full search, evolution on validations, is
    `"nsga2"`.

    The paper states the quality of its predictors at 1000 samples; take as many where the budget
    has room for them. The default of 100 is all that its concurrent search spends on MobileNetV3.

    Args:
        samples: The number of random subnets that train the predictors; they come in whole batches.
        batch_size: The number of proposals a generation.
        inner_population: Of the search on predictions.
        predictions: The number of predictions that it makes.
        predictor: A name or an estimator; see `predictors.make`.
        crossover: Probability that two parents are mixed.
        mutation: Probability per choice of a new random value.
        exact: Compute exact measures in the search instead of predicting them.

    Raises:
        StrategyError: A size is not a whole number from 1, or the predictor is unknown.

    References:
        Cummings et al., A Hardware-Aware System for Accelerating Deep Neural Network Optimization,
        arXiv:2202.12954, section 3.

    Example:
        >>> from lightning_subnet import FunctionEvaluator, SearchSpace, SubnetSearch
        >>> space = SearchSpace({f"x.{i}": range(4) for i in range(6)})
        >>> strategy = FullSearch(samples=20, batch_size=10, predictions=1000)
        >>> search = SubnetSearch(space=space, objectives={"error": "min"}, strategy=strategy,
        ...                       budget=30, storage=None)
        >>> evaluator = FunctionEvaluator(lambda s: {"error": 18.0 - sum(s.values())})
        >>> search.run(evaluator, progress=False).best("error").values["error"]
        0.0
    """

    name = "full"

    def __init__(  # noqa: PLR0913 - the same settings as LINAS, and samples
        self,
        *,
        samples: int = 100,
        batch_size: int = 50,
        inner_population: int = 50,
        predictions: int = 20_000,
        predictor: Any = "ridge",
        crossover: float = 0.9,
        mutation: float = 0.02,
        exact: bool = False,
    ) -> None:
        check_positive(samples=samples, batch_size=batch_size, inner_population=inner_population)
        self.samples = samples
        self.batch_size = batch_size
        self.inner_population = inner_population
        super().__init__(
            predictions=predictions,
            predictor=predictor,
            crossover=crossover,
            mutation=mutation,
            exact=exact,
            published=(),
        )

    @property
    def opening(self) -> Opening:
        """The samples that train the predictors, drawn at random."""
        return Opening(self.samples, "samples")

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return samples, or the next of the predicted front; see `Strategy.propose`."""
        samples = _samples(problem, history, self.samples)
        if len(history) < self.samples or samples.ok.sum() <= 1:
            return fill(problem, history, pending, n, rng, by_choice(problem))
        with one_thread():
            rows, ranks, violations = self._predicted_fronts(problem, history, samples)
        new = are_new(rows, history, pending)
        rows, ranks, violations = rows[new], ranks[new], violations[new]
        order = np.lexsort((rng.random(len(rows)), ranks, violations))
        return fill(problem, history, pending, n, rng, in_order(problem, rows[order]))

    def _predicted_fronts(
        self, problem: Problem, history: History, samples: History
    ) -> tuple[Indices, Indices, Floats]:
        """Return all rows of the search on predictions, their predicted fronts and violations."""
        rng = study_rng(history)  # the same search in every generation
        score, _, rows = self._search(problem, samples, self.inner_population, rng)
        return rows, *front_ranks(*score(rows))


def _samples(problem: Problem, history: History, n: int) -> History:
    """Return the first evaluations, and the largest subnet where a bound refers to it."""
    largest = history.get(problem.space.largest) if problem.needs_reference else None
    first = list(history[:n])
    return History(
        history.space, first if largest is None or largest in first else [*first, largest]
    )
