# SPDX-License-Identifier: Apache-2.0
"""The subnets of least score, where thousands of subnets are scored at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.space.members import distinct_rows
from lightning_subnet.space.space import SearchSpace

Score = Callable[[Indices], Floats]

_ENUMERATED = 200_000
_DRAWN = 10_000
_PARENTS, _CHILDREN = 64, 64
_ROUNDS, _PATIENCE = 200, 6
_POLISHED = 4  # whose neighbours are all looked at


def least(
    space: SearchSpace,
    score: Score,
    *,
    rng: np.random.Generator,
    n: int = 1,
    start: Indices | None = None,
    drawn: int = _DRAWN,
) -> Indices:
    """Return the rows of least score that were found, best first.

    A space of up to 200,000 subnets, and every pool, is enumerated, so the first row is the best of
    all. In a larger one the best of a sample are changed in one to three choices at a time and the
    best kept, until that helps no more and no neighbour of the best is better.

    Args:
        space: Where to look.
        score: Scores (k,) of canonical rows (k, n_choices); 0 or less cannot be improved.
        rng: Draws the sample and the changes.
        n: How many rows are wanted; there may be fewer.
        start: Canonical rows to begin with, besides the sample and the extremes.
        drawn: The size of the sample.

    Returns:
        Distinct canonical rows (up to n, n_choices).

    Example:
        >>> space = SearchSpace({f"x.{i}": [0, 1, 2, 3] for i in range(30)})
        >>> rng, wanted = np.random.default_rng(0), space.sample_indices(1, rng=1)
        >>> found = least(space, lambda X: np.abs(X - wanted).sum(axis=1).astype(float), rng=rng)
        >>> bool((found == wanted).all())
        True
    """
    if space.size <= _ENUMERATED or space.is_pool:
        best: Indices = np.zeros((0, len(space.names)), dtype=np.int64)
        for X in space.index_blocks():
            best = _best(np.concatenate([best, X]), score, n)
        return best
    ends = space.indices([space.smallest, space.largest])
    rows = [ends, space.sample_indices(min(drawn, space.size), rng)]
    rows += [] if start is None else [start]
    keep = max(_PARENTS, n)
    best = _best(np.concatenate(rows), score, keep)
    reached, patience = float(score(best[:1])[0]), _PATIENCE
    for _ in range(_ROUNDS):
        if reached <= 0:
            break
        near = [best, _changed(space, best, rng)]
        if patience <= 1:
            around = [space.neighbours(s) for s in space.from_indices(best[:_POLISHED])]
            near += [space.indices(subnets) for subnets in around if subnets]
        best = _best(np.concatenate(near), score, keep)
        now = float(score(best[:1])[0])
        patience = _PATIENCE if now < reached else patience - 1
        reached = now
        if patience <= 0:
            break
    return best[:n]


def _best(X: Indices, score: Score, n: int) -> Indices:
    """Return the n distinct rows of least score; of equal ones those of the larger indices."""
    X = X[distinct_rows(X)]
    order = np.lexsort((-X.sum(axis=1), score(X)))
    kept: Indices = X[order[:n]]
    return kept


def _changed(space: SearchSpace, X: Indices, rng: np.random.Generator) -> Indices:
    """Return children of rows: one to three choices drawn anew, of half of them after a mating."""
    children = np.repeat(X, _CHILDREN, axis=0)
    mated = rng.random(children.shape) < 0.5  # noqa: PLR2004 - half of the choices
    mated &= (np.arange(len(children)) % 2 == 1)[:, None]
    others = X[rng.integers(len(X), size=len(children))]
    children = np.where(mated, others, children)
    sizes = np.array([len(choice.values) for choice in space.choices.values()])
    for step in range(3):
        at = rng.integers(children.shape[1], size=len(children))
        drawn = rng.integers(sizes[at])
        also = rng.random(len(children)) < 1 / (step + 1)
        rows = np.flatnonzero(also)
        children[rows, at[rows]] = drawn[rows]
    changed: Indices = space.canonical(children)
    return changed
