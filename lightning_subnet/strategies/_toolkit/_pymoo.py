# SPDX-License-Identifier: Apache-2.0
"""The only file that imports pymoo: survival, selection, crossover and mutation on index rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.sms import SMSEMOA
from pymoo.algorithms.moo.unsga3 import UNSGA3
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.variable import Integer
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.operators.mutation.rm import ChoiceRandomMutation
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.ref_dirs import get_reference_directions

from lightning_subnet._types import Floats, Indices
from lightning_subnet.space.members import distinct_rows

_CROWD = 4


def _reference_directions(n_objectives: int, at_most: int) -> Floats:
    """Return the most evenly spaced directions that are `at_most` or fewer (Das-Dennis)."""
    parts = 1
    while math.comb(parts + n_objectives, n_objectives - 1) <= at_most and n_objectives > 1:
        parts += 1
    directions: Floats = get_reference_directions("das-dennis", n_objectives, n_partitions=parts)
    return directions


def crowding(F: Floats) -> Floats:
    """Return the crowding distance (n,) of each point (n, m) of one front; inf at its ends."""
    distance: Floats = calc_crowding_distance(F)
    return distance


class Breeder:
    """Selects parents among evaluated index rows and breeds from them.

    Args:
        algorithm: `"nsga2"`, `"u-nsga3"` or `"sms-emoa"`.
        n_values: The number of values of each choice.
        population: The number of survivors.
        crossover: Probability of mixing two parents.
        mutation: Probability per choice of a new value; None is 1 / number of choices.
        rng: The only source of randomness.
    """

    def __init__(
        self,
        algorithm: str,
        *,
        n_values: Sequence[int],
        population: int,
        crossover: float,
        mutation: float | None,
        rng: np.random.Generator,
    ) -> None:
        self._kind = algorithm
        self._variables = {str(i): Integer(bounds=(0, k - 1)) for i, k in enumerate(n_values)}
        self._population = population
        self._rng = rng
        self._operators: dict[str, Any] = {
            "crossover": UniformCrossover(prob=crossover),
            "mutation": ChoiceRandomMutation(
                prob=1.0, prob_var=1 / len(n_values) if mutation is None else mutation
            ),
            "eliminate_duplicates": False,
        }

    def select(self, X: Indices, F: Floats, violation: Floats) -> None:
        """Keep the survivors of evaluated rows as parents.

        Args:
            X: Value indices (n, n_choices).
            F: Objectives to be minimised (n, m), finite.
            violation: Sum of violations (n,), 0 where feasible.
        """
        self._rows = (X, F, violation)
        n_objectives = F.shape[1]
        kind = "nsga2" if n_objectives == 1 and self._kind == "sms-emoa" else self._kind
        if kind == "u-nsga3":
            directions = _reference_directions(n_objectives, self._population)
            self._algorithm = UNSGA3(
                directions, pop_size=max(self._population, len(directions)), **self._operators
            )
        else:
            cls = {"nsga2": NSGA2, "sms-emoa": SMSEMOA}[kind]
            self._algorithm = cls(pop_size=self._population, **self._operators)
        self._algorithm.random_state = self._rng
        self._problem = Problem(
            vars=self._variables, n_obj=n_objectives, n_ieq_constr=int((violation > 0).any())
        )
        # pymoo 0.6.2 breaks ties of the violation with an unseeded generator: leave it none.
        order = np.argsort(np.argsort(violation, kind="stable"))
        excess = np.where(violation > 0, violation * (1 + 1e-9 * order), 0.0)[:, None]
        population = Population.new("X", X, "F", F, "row", np.arange(len(X)))
        if self._problem.has_constraints():
            population.set("G", excess)
        if kind == "sms-emoa" and len(population) > _CROWD * self._population:
            # Removing thousands one by one by hypervolume takes minutes: thin by crowding first.
            population = self._survive(RankAndCrowding(), population, _CROWD * self._population)
        self._parents = self._survive(self._algorithm.survival, population, self._population)

    def select_with(self, X: Indices, F: Floats, violation: Floats) -> None:
        """Keep the survivors of the parents and further rows, each row once."""
        parents = self._parents.get("row").astype(int)
        parts = zip([part[parents] for part in self._rows], (X, F, violation), strict=True)
        X, F, violation = (np.concatenate(pair) for pair in parts)
        first = distinct_rows(X)
        self.select(X[first], F[first], violation[first])

    def survivors(self) -> Indices:
        """Return the parents as value indices."""
        X: Indices = self._parents.get("X").astype(np.int64)
        return X

    def _survive(self, survival: Any, population: Any, n: int) -> Any:
        return survival.do(
            self._problem,
            population,
            n_survive=n,
            algorithm=self._algorithm,
            random_state=self._rng,
        )

    def offspring(self, n: int) -> Indices:
        """Return n children as value indices; they may repeat each other or the parents."""
        children = self._algorithm.mating.do(
            self._problem, self._parents, n, algorithm=self._algorithm, random_state=self._rng
        )
        X: Indices = children.get("X").astype(np.int64)
        return X
