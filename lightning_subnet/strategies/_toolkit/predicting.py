# SPDX-License-Identifier: Apache-2.0
"""Strategies that search on predictions: the settings that several of them have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_subnet._messages import did_you_mean
from lightning_subnet._types import Indices
from lightning_subnet.errors import StrategyError
from lightning_subnet.predictors.registry import make, names
from lightning_subnet.strategies._toolkit.breeding import evolve
from lightning_subnet.strategies._toolkit.sampling import by_choice
from lightning_subnet.strategies._toolkit.surrogates import Surrogates
from lightning_subnet.strategies.base import Opening, Strategy, check_positive, check_probability
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem

if TYPE_CHECKING:
    from lightning_subnet.strategies._toolkit._pymoo import Breeder


class PredictingStrategy(Strategy):
    """A strategy with a predictor among its settings, by name or as an estimator.

    Args:
        predictor: A name or an estimator; see `predictors.make`.
        published: The names of models that a baseline was published with, which it takes too.

    Raises:
        PredictorError: The name is unknown, or the object is not a predictor: before anything is
            measured.
        StrategyError: The name is unknown, for a baseline.
    """

    def __init__(self, predictor: Any, published: Sequence[str] | None = None) -> None:
        if published is None or not isinstance(predictor, str):
            make(predictor)
        elif predictor not in (options := list(dict.fromkeys([*published, *names()]))):
            msg = (
                f"predictor={predictor!r} of the strategy is unknown."
                f"{did_you_mean(predictor, options)} Give one of {', '.join(map(repr, options))}, "
                "or an object with fit(F, y) and predict(F)."
            )
            raise StrategyError(msg)
        self._predictor = predictor

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON-able data, with the repr of an estimator."""
        predictor = self._predictor
        text = predictor if isinstance(predictor, str) else " ".join(repr(predictor).split())
        return super().settings() | {"predictor": text}


class LongSearch(PredictingStrategy):
    """A strategy with a long NSGA-II on predictions, the search of the paper.

    Args:
        predictions: The number of predictions of a search.
        predictor: A name or an estimator; see `predictors.make`.
        crossover: Probability that two parents are mixed.
        mutation: Probability per choice of a new random value.
        exact: Compute exact measures in the search instead of predicting them.
        published: As `PredictingStrategy` takes it.
    """

    def __init__(
        self,
        *,
        predictions: int,
        predictor: Any,
        crossover: float,
        mutation: float,
        exact: bool,
        published: Sequence[str] | None = None,
    ) -> None:
        check_positive(predictions=predictions)
        check_probability(crossover=crossover, mutation=mutation)
        super().__init__(predictor, published)
        self.predictions = predictions
        self.crossover = crossover
        self.mutation = mutation
        self.exact = exact

    def _search(
        self,
        problem: Problem,
        history: History,
        population: int,
        rng: np.random.Generator,
    ) -> tuple[Surrogates, Breeder, Indices]:
        """Return predictions of a history, and the search on them as `evolve` returns it."""
        score = Surrogates(problem, history, self._predictor, exact=self.exact)
        breeder, rows = evolve(
            problem,
            score,
            by_choice(problem)(population, rng),
            population=population,
            generations=max(self.predictions // population - 1, 0),
            crossover=self.crossover,
            mutation=self.mutation,
            rng=rng,
        )
        return score, breeder, rows


class SmallBatches(PredictingStrategy):
    """A strategy with a first batch, then small ones, each from a short evolution on predictions.

    Args:
        batch_size: The number of proposals a generation.
        first: The evaluations before the first evolution.
        inner_population: The population of the evolution.
        generations: Its generations.
        predictor: A name or an estimator; see `predictors.make`.
        published: As `PredictingStrategy` takes it.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        first: int,
        inner_population: int,
        generations: int,
        predictor: Any,
        published: Sequence[str] | None = None,
    ) -> None:
        check_positive(
            batch_size=batch_size,
            first=first,
            inner_population=inner_population,
            generations=generations,
        )
        super().__init__(predictor, published)
        self.batch_size = batch_size
        self.first = first
        self.inner_population = inner_population
        self.generations = generations

    @property
    def opening(self) -> Opening:
        """The first batch."""
        return Opening(self.first, "first")
