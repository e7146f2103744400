# SPDX-License-Identifier: Apache-2.0
"""Evolution on real measurements: NSGA-II, U-NSGA-III and SMS-EMOA, rebuilt from the history."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_subnet._types import Indices
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies._toolkit.sampling import by_choice
from lightning_subnet.strategies.base import (
    Opening,
    Strategy,
    check_positive,
    check_probability,
    fill,
)
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem

_PARENTS = 2


class NSGA2(Strategy):
    """NSGA-II: survival by front and crowding distance. The usual choice for two objectives.

    The parents are the survivors of the whole history, so evaluations that were attached, resumed
    or made by another strategy count. Constraints rank before objectives; failed evaluations
    are not parents. Until `population` subnets are measured, proposals are random, each choice
    drawn by itself.

    Args:
        population: The number of survivors, and of proposals a generation.
        crossover: Probability that two parents are mixed (uniform crossover).
        mutation: Probability per choice of a new random value; None is 1 / number of choices.

    References:
        Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEC 6(2),
        2002.

    Example:
        >>> NSGA2(population=20)
        NSGA2(population=20, crossover=0.9, mutation=None, batch_size=20)
    """

    name = "nsga2"

    def __init__(
        self, *, population: int = 50, crossover: float = 0.9, mutation: float | None = None
    ) -> None:
        check_positive(population=population)
        check_probability(crossover=crossover, mutation=mutation)
        self.population = population
        self.crossover = crossover
        self.mutation = mutation
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
        """Return n offspring of the history's survivors; see `Strategy.propose`."""
        F, violations = problem.scores(history)
        finite = np.isfinite(violations)
        if len(history) < self.population or finite.sum() < _PARENTS:
            return fill(problem, history, pending, n, rng, by_choice(problem))
        from lightning_subnet.strategies._toolkit._pymoo import Breeder

        breeder = Breeder(
            self.name,
            n_values=[len(choice.values) for choice in problem.space.choices.values()],
            population=self.population,
            crossover=self.crossover,
            mutation=self.mutation,
            rng=rng,
        )
        breeder.select(history.indices[finite], F[finite], violations[finite])

        def draw(k: int, _: np.random.Generator) -> Indices:
            return breeder.offspring(k)

        return fill(problem, history, pending, n, rng, draw)


class UNSGA3(NSGA2):
    """U-NSGA-III: survival along reference directions, for three objectives and more.

    Args:
        population: The number of survivors, and of proposals a generation; also bounds the number
            of reference directions.
        crossover: Probability that two parents are mixed (uniform crossover).
        mutation: Probability per choice of a new random value; None is 1 / number of choices.

    References:
        Seada and Deb, A unified evolutionary optimization procedure for single, multiple, and many
        objectives, IEEE TEC 20(3), 2016.
    """

    name = "u-nsga3"


class SMSEMOA(NSGA2):
    """SMS-EMOA: survival by contribution to the hypervolume.

    Args:
        population: The number of survivors, and of proposals a generation.
        crossover: Probability that two parents are mixed (uniform crossover).
        mutation: Probability per choice of a new random value; None is 1 / number of choices.

    References:
        Beume et al., SMS-EMOA: Multiobjective selection based on dominated hypervolume, EJOR
        181(3), 2007.
    """

    name = "sms-emoa"
