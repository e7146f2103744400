# SPDX-License-Identifier: Apache-2.0
"""Sources of proposals: draws by choice, rows in order, neighbours, balanced designs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lightning_subnet._types import Indices
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies.base import Draw, fill, uniform_draws
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem


def _positions(space: SearchSpace) -> list[Indices]:
    """Return the value indices that each choice takes, one where several mean the same network."""
    return [
        np.unique([choice.representative(choice.values.index(v)) for v in space.values[name]])
        for name, choice in space.choices.items()
    ]


def by_choice(problem: Problem) -> Draw:
    """Return a source of subnets that draws every choice by itself, as published searches do.

    Where a choice rules out others, this is not uniform over distinct subnets: most of those are
    deep, as a deep network has more choices (on the OFA space, 89 % of the variants of a stage have
    the greatest depth). Without such conditions, and in a pool, the draws are uniform.
    """
    space = problem.space
    if space.is_pool or not any(choice.when for choice in space.choices.values()):
        return uniform_draws(problem)
    positions = _positions(space)

    def draw(k: int, rng: np.random.Generator) -> Indices:
        return space.canonical(np.stack([rng.choice(at, k) for at in positions], axis=1))

    return draw


def in_order(problem: Problem, X: Indices) -> Draw:
    """Return a source of the rows of X in their order, then of random ones."""
    at = 0

    def draw(k: int, rng: np.random.Generator) -> Indices:
        nonlocal at
        if at >= len(X):
            return by_choice(problem)(k, rng)
        at += k
        return X[at - k : at]

    return draw


def neighbour_rows(space: SearchSpace, subnets: Iterable[Subnet]) -> Indices:
    """Return the rows that differ from a subnet in one choice; one may come several times.

    In a pool (`SearchSpace.restricted_to`) a subnet may have none.

    Example:
        >>> space = SearchSpace(depth=[1, 2], width=[8, 16])
        >>> neighbour_rows(space, [space.smallest]).tolist()
        [[1, 0], [0, 1]]
    """
    return space.indices(other for subnet in subnets for other in space.neighbours(subnet))


def balanced_rows(space: SearchSpace, rows: Indices, n: int, rng: np.random.Generator) -> Indices:
    """Return n further rows of a design in which every choice has its values as often.

    Each choice takes the value that it had least often where it exists, at random among equals: a
    Latin hypercube that grows row by row.

    Args:
        space: The space of the rows.
        rows: The rows of the design so far (m, n_choices).
        n: The number of further ones.
        rng: The only source of randomness.

    References:
        McKay, Beckman, Conover, A Comparison of Three Methods for Selecting Values of Input
        Variables, Technometrics 21 (1979).

    Example:
        >>> space = SearchSpace(depth=[1, 2], width=[8, 16, 32])
        >>> rows = balanced_rows(space, np.zeros((0, 2), dtype=int), 6, np.random.default_rng(0))
        >>> [np.bincount(column).tolist() for column in rows.T]
        [[3, 3], [2, 2, 2]]
    """
    positions = _positions(space)
    counts = [np.zeros(len(choice.values)) for choice in space.choices.values()]
    for row, active in zip(rows, space.active(rows), strict=True):
        for j in np.flatnonzero(active):
            counts[j][row[j]] += 1
    more = []
    for _ in range(n):
        row = [
            at[np.argmin(count[at] + rng.random(len(at)))]
            for at, count in zip(positions, counts, strict=True)
        ]
        canonical = space.canonical(np.array([row]))
        for j in np.flatnonzero(space.active(canonical)[0]):
            counts[j][canonical[0, j]] += 1
        more.append(canonical[0])
    return np.stack(more) if more else rows[:0]


def first_batch(
    problem: Problem,
    history: History,
    n: int,
    rng: np.random.Generator,
    pending: Sequence[Subnet],
) -> list[Subnet]:
    """Return the next n subnets of a balanced design; see `Strategy.propose`."""
    space = problem.space
    rows = history.indices
    if pending:
        rows = np.concatenate([rows, space.indices(pending)])
    blocks = [rows]

    def draw(k: int, rng: np.random.Generator) -> Indices:
        blocks.append(balanced_rows(space, np.concatenate(blocks), k, rng))
        return blocks[-1]

    return fill(problem, history, pending, n, rng, draw)
