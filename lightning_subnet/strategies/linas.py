# SPDX-License-Identifier: Apache-2.0
"""LINAS: evolution on predictions, validated and repeated (the paper's concurrent search)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_subnet._types import Indices
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies._toolkit.predicting import LongSearch
from lightning_subnet.strategies._toolkit.sampling import by_choice
from lightning_subnet.strategies.base import Opening, check_positive, fill
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem


class LINAS(LongSearch):
    """Lightweight iterative neural architecture search, as published.

    The first population is drawn at random; a warm start is a part of it, or all. Then, each
    generation, one predictor per objective is fitted on everything measured, a long NSGA-II
    searches on the predictions, and its final population is measured. Predicted are all objectives,
    also those that could be computed (`exact=False`). The contract of a strategy makes for what
    differs from the released code: inactive choices are masked, and no subnet is proposed twice.

    Args:
        population: Of the inner search, and the batch that is measured.
        predictions: The number of predictions of an inner search.
        predictor: A name or an estimator; see `predictors.make`.
        crossover: Probability that two parents are mixed.
        mutation: Probability per choice of a new random value.
        exact: Compute exact measures in the inner search instead of predicting them.

    References:
        Cummings et al., A Hardware-Aware Framework for Accelerating Neural Architecture Search
        Across Modalities, arXiv:2205.10358, algorithm 1; arXiv:2202.12954, section 3.

    Example:
        >>> LINAS(population=20).batch_size
        20
    """

    name = "linas"

    def __init__(
        self,
        *,
        population: int = 50,
        predictions: int = 20_000,
        predictor: Any = "ridge",
        crossover: float = 0.9,
        mutation: float = 0.02,
        exact: bool = False,
    ) -> None:
        check_positive(population=population)
        self.population = population
        super().__init__(
            predictions=predictions,
            predictor=predictor,
            crossover=crossover,
            mutation=mutation,
            exact=exact,
        )
        self.batch_size = population

    @property
    def opening(self) -> Opening:
        """The first population, which is drawn at random."""
        return Opening(self.population, "population")

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return the final population of a search on predictions; see `Strategy.propose`."""
        if len(history) < self.population or history.ok.sum() <= 1:
            done = len(history) + len(pending)
            if 0 < done < self.population:  # a warm start: the rest of a population
                n = min(n, self.population - done)
            return fill(problem, history, pending, n, rng, by_choice(problem))
        with one_thread():
            _, breeder, _ = self._search(problem, history, self.population, rng)
        final = [breeder.survivors()]

        def draw(k: int, _: np.random.Generator) -> Indices:
            return final.pop() if final else breeder.offspring(k)

        return fill(problem, history, pending, n, rng, draw)
