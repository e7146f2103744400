# SPDX-License-Identifier: Apache-2.0
"""The subnets of least score, where thousands of subnets are scored at once.

The package has three inner evolutions, which differ in what they look for; merging them would
change what searches of a seed propose. Two are in `strategies/_toolkit/breeding`: `evolve`, NSGA-II
of pymoo as papers prescribe it, and `breed`, with few, large generations. Both spread over a front
of several objectives. Here one number is to be as small as possible: only the best stay, and are
compared with all of their neighbours, or with the whole space where that can be enumerated. It
needs no strategy, so costs can use it too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.space.members import distinct_rows
from lightning_subnet.space.space import SearchSpace

Score = Callable[[Indices], Floats]

_ENUMERATED = 200_000
_SAMPLE = 10_000
_PARENTS, _CHILDREN = 64, 64
_ROUNDS, _PATIENCE = 200, 6
_POLISHED = 4  # rows whose neighbours are all scored


def least_rows(
    space: SearchSpace,
    score: Score,
    *,
    rng: np.random.Generator,
    n: int = 1,
    start: Indices | None = None,
    n_sample: int = _SAMPLE,
) -> Indices:
    """Return the rows of least score, best first.

    A space of up to 200,000 subnets, and every pool, is enumerated, so the first row is the best of
    all. In a larger one the best of a sample are changed in one to three choices at a time and the
    best stay, until that helps no more and no neighbour of the best is better.

    Args:
        space: Where to look.
        score: Scores (k,) of canonical rows (k, n_choices); 0 or less cannot be improved.
        rng: Draws the sample and the changes.
        n: How many rows to return; there may be fewer.
        start: Canonical rows to begin with, besides the sample and the extremes.
        n_sample: The size of the sample.

    Returns:
        Distinct canonical rows (up to n, n_choices).

    Example:
        >>> space = SearchSpace({f"x.{i}": [0, 1, 2, 3] for i in range(30)})
        >>> rng, goal = np.random.default_rng(0), space.sample_indices(1, rng=1)
        >>> rows = least_rows(space, lambda X: np.abs(X - goal).sum(axis=1) * 1.0, rng=rng)
        >>> bool((rows == goal).all())
        True
    """
    if space.size <= _ENUMERATED or space.is_pool:
        best: Indices = np.zeros((0, len(space.names)), dtype=np.int64)
        for X in space.index_blocks():
            best = _best(np.concatenate([best, X]), score, n)
        return best
    ends = space.indices([space.smallest, space.largest])
    rows = [ends, space.sample_indices(min(n_sample, space.size), rng)]
    rows += [] if start is None else [start]
    keep = max(_PARENTS, n)
    best = _best(np.concatenate(rows), score, keep)
    lowest, patience = float(score(best[:1])[0]), _PATIENCE
    for _ in range(_ROUNDS):
        if lowest <= 0:
            break
        near = [best, _children(space, best, rng)]
        if patience <= 1:
            around = [space.neighbours(s) for s in space.from_indices(best[:_POLISHED])]
            near += [space.indices(subnets) for subnets in around if subnets]
        best = _best(np.concatenate(near), score, keep)
        now = float(score(best[:1])[0])
        patience = _PATIENCE if now < lowest else patience - 1
        lowest = now
        if patience <= 0:
            break
    return best[:n]


def _best(X: Indices, score: Score, n: int) -> Indices:
    """Return the n distinct rows of least score; of equal ones those of the larger indices."""
    X = X[distinct_rows(X)]
    order = np.lexsort((-X.sum(axis=1), score(X)))
    best: Indices = X[order[:n]]
    return best


def _children(space: SearchSpace, X: Indices, rng: np.random.Generator) -> Indices:
    """Return children of rows: one to three choices drawn anew, of half of them after a mating."""
    children = np.repeat(X, _CHILDREN, axis=0)
    of_mate = rng.random(children.shape) < 0.5  # noqa: PLR2004 - half of the choices
    of_mate &= (np.arange(len(children)) % 2 == 1)[:, None]
    mates = X[rng.integers(len(X), size=len(children))]
    children = np.where(of_mate, mates, children)
    sizes = np.array([len(choice.values) for choice in space.choices.values()])
    for step in range(3):
        at = rng.integers(children.shape[1], size=len(children))
        values = rng.integers(sizes[at])
        rows = np.flatnonzero(rng.random(len(children)) < 1 / (step + 1))
        children[rows, at[rows]] = values[rows]
    canonical: Indices = space.canonical(children)
    return canonical
