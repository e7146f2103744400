# SPDX-License-Identifier: Apache-2.0
"""Additive measures: sums over blocks, from tables, for thousands of subnets at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_subnet._messages import listed
from lightning_subnet._types import Indices
from lightning_subnet.errors import SpaceError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.measures import Measure


@dataclass(frozen=True)
class Term:
    """The cost that one block adds, while its choices exist.

    Args:
        choices: Names of the choices that its cost depends on.
        table: Its cost by their value indices, one axis a choice.
    """

    choices: tuple[str, ...]
    table: npt.NDArray[np.float64]


def additive_measure(
    name: str, space: SearchSpace, terms: Sequence[Term], *, constant: float = 0.0, unit: str = ""
) -> Measure:
    """Return an exact measure that adds up the costs of the blocks of a subnet.

    Args:
        name: The measure's name.
        space: The space whose value indices it takes.
        terms: The cost of each block; one whose choices do not exist adds nothing.
        constant: The cost that every subnet has.
        unit: The unit.

    Raises:
        SpaceError: A term speaks of an unknown choice, or its table has another shape.

    Example:
        >>> space = SearchSpace(depth=[1, 2], width=[8, 16])
        >>> term = Term(("depth", "width"), np.array([[8.0, 16.0], [16.0, 32.0]]))
        >>> cost = additive_measure("cost", space, [term], constant=1)
        >>> cost.evaluate(space, space.indices([space.largest]))[0].tolist()
        [33.0]
    """
    position = {choice: i for i, choice in enumerate(space.names)}
    for term in terms:
        if unknown := [choice for choice in term.choices if choice not in position]:
            msg = f"{unknown[0]!r} is not a choice of the space: {listed(space.names)}."
            raise SpaceError(msg)
        shape = tuple(len(space.choices[choice].values) for choice in term.choices)
        if term.table.shape != shape:
            msg = f"The table of {term.choices} has shape {term.table.shape}; it needs {shape}."
            raise SpaceError(msg)
    columns = [tuple(position[choice] for choice in term.choices) for term in terms]

    def cost(X: Indices) -> npt.NDArray[np.float64]:
        exists = space.active(X)
        total = np.full(len(X), float(constant))
        for term, at in zip(terms, columns, strict=True):
            costs = term.table[tuple(X[:, j] for j in at)]
            total += np.where(exists[:, list(at)].all(axis=1), costs, 0.0)
        return total

    return Measure(name, cost, unit=unit, exact=True, takes="indices")
