# SPDX-License-Identifier: Apache-2.0
"""Hybrid: designed start, small batches, and a search on predictions around the measured front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Floats, Indices
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies._toolkit.breeding import breed
from lightning_subnet.strategies._toolkit.predicting import SmallBatches
from lightning_subnet.strategies._toolkit.sampling import (
    by_choice,
    first_batch,
    in_order,
    neighbour_rows,
)
from lightning_subnet.strategies._toolkit.surrogates import Surrogates
from lightning_subnet.strategies.base import are_new, fill
from lightning_subnet.study import pareto
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem

_MARGIN = 0.1
_CHILDREN = 8  # of each parent, a generation
_FRONT = 30  # subnets of the front whose neighbours are looked at
_BOLD = 5  # each fifth is chosen by optimistic predictions
_POOL = 600  # predicted subnets that a batch is chosen from
_WHOLE = 20_000  # subnets of a space that is predicted whole
_MOST = 150  # of them, those whose gain in hypervolume is computed


class Hybrid(SmallBatches):
    """Hybrid: predictors of all measurements, an evolution on them, greedy hypervolume.

    The first subnets are a design in which every choice has each of its values as often. Then, each
    generation, predictors are fitted; exact measures are computed. An inner evolution starts from
    the measured front, its neighbours and random subnets; a space of up to 20,000 subnets is
    predicted whole instead. Of all that is scored, the batch is chosen greedily: each subnet adds
    the most hypervolume to the measured front and those chosen before it. Every fifth one is chosen
    by optimistic predictions, where the predictor is least sure.

    Args:
        batch_size: The number of proposals a generation.
        first: The size of the design.
        inner_population: The number of parents in the inner evolution; they have eight times as
            many children a generation.
        generations: Of the inner evolution.
        predictor: A name or an estimator; see `predictors.make`.

    Example:
        >>> Hybrid(first=20).batch_size
        5
    """

    name = "hybrid"

    def __init__(
        self,
        *,
        batch_size: int = 5,
        first: int = 12,
        inner_population: int = 100,
        generations: int = 10,
        predictor: Any = "additive",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            first=first,
            inner_population=inner_population,
            generations=generations,
            predictor=predictor,
        )

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return the batch; see `Strategy.propose`."""
        if len(history) + len(pending) < self.first or history.ok.sum() <= 1:
            return first_batch(problem, history, n, rng, pending)
        with one_thread():
            score = Surrogates(problem, history, self._predictor)
            pool = self._pool(problem, history, score, rng)
            pool = pool[are_new(pool, history, pending)]
            if len(pool):
                pool = self._batch(problem, history, score, pool, n, pending)
        return fill(problem, history, pending, n, rng, in_order(problem, pool))

    def _pool(
        self, problem: Problem, history: History, score: Surrogates, rng: np.random.Generator
    ) -> Indices:
        """Return the best rows of an inner evolution, or all of a small space."""
        space = problem.space
        if space.size <= _WHOLE:
            return np.concatenate(list(space.index_blocks()))
        front = [e.subnet for e in problem.front(history)]
        around = neighbour_rows(space, front[:_FRONT])
        random = by_choice(problem)(self.inner_population, rng)
        return breed(
            problem,
            score,
            np.concatenate([space.indices(front), around, random]),
            parents=self.inner_population,
            children=_CHILDREN * self.inner_population,
            generations=self.generations,
            keep=_POOL + len(history),
            rng=rng,
        )

    def _batch(
        self,
        problem: Problem,
        history: History,
        score: Surrogates,
        X: Indices,
        n: int,
        pending: Sequence[Subnet],
    ) -> Indices:
        """Return up to n rows that add hypervolume to the measured front, by prediction."""
        mean, std, violations = score.with_std(X)
        bold = mean - std
        feasible = violations <= 0
        if not feasible.any():
            return X[np.argsort(violations, kind="stable")[:n]]
        X, mean, bold = X[feasible], mean[feasible], bold[feasible]
        F, violations = problem.scores(history)
        F = F[(violations <= 0) & np.isfinite(F).all(axis=1)]
        if pending:
            F = np.concatenate([F, score(problem.space.indices(pending))[0]])
        promising = _on_first_fronts(mean) | _on_first_fronts(bold)
        X, mean, bold = X[promising], mean[promising], bold[promising]
        everything = np.concatenate([F, mean])
        low, high = everything.min(axis=0), everything.max(axis=0)
        span = np.where(high > low, high - low, 1.0)
        return X[_greedy((F - low) / span, (mean - low) / span, (bold - low) / span, n)]


def _greedy(front: Floats, mean: Floats, bold: Floats, n: int) -> list[int]:
    """Return up to n rows, each of which adds the most hypervolume to a front and those before.

    Args:
        front: The objectives of measured rows (k, m), scaled.
        mean: Predictions (rows, m).
        bold: Optimistic ones, by which some are chosen.
        n: The number of rows.
    """
    reference = np.full(front.shape[1], 1 + _MARGIN)
    front = front[pareto.nondominated(front)] if len(front) else front
    # What a row adds only shrinks as others join, so old gains are bounds: few are computed anew.
    bounds = {False: _gains(front, mean, reference), True: _gains(front, bold, reference)}
    left = np.ones(len(mean), dtype=bool)
    batch: list[int] = []
    while len(batch) < n and left.any():
        is_bold = len(batch) % _BOLD == _BOLD - 1
        points, bound = (bold if is_bold else mean), bounds[is_bold]
        current = np.zeros(len(mean), dtype=bool)  # whose bound is the gain itself
        while True:
            best = int(np.argmax(np.where(left, bound, -np.inf)))
            if current[best] or not batch:
                break
            bound[best] = _gains(front, points[best : best + 1], reference)[0]
            current[best] = True
        if bound[best] <= 0:  # nothing promises more: the row nearest to the front
            rows = np.flatnonzero(left)
            best = int(rows[np.argmin(_distance(front, points[rows]))])
        batch.append(best)
        left[best] = False
        front = np.vstack([front, mean[best]])
        front = front[pareto.nondominated(front)]
    return batch


def _on_first_fronts(F: Floats) -> npt.NDArray[np.bool_]:
    """Return whether each row stands on the first fronts (n,), `_MOST` of them at most."""
    ranks = pareto.nondominated_ranks(F)
    mask = np.zeros(len(F), dtype=bool)
    mask[np.argsort(ranks, kind="stable")[:_MOST]] = True
    return mask


def _gains(front: Floats, points: Floats, reference: Floats) -> Floats:
    """Return the hypervolume that each point (n, m) adds to a front by itself (n,)."""
    base = pareto.hypervolume(front, reference) if len(front) else 0.0
    gains = np.zeros(len(points))
    gaining = (points < reference).all(axis=1)
    for point in front:
        gaining &= (points < point).any(axis=1)
    for i in np.flatnonzero(gaining):
        gains[i] = pareto.hypervolume(np.vstack([front, points[i]]), reference) - base
    return gains


def _distance(front: Floats, points: Floats) -> Floats:
    """Return the improvement of all objectives that brings each point to the front (n,)."""
    if not len(front):
        return np.zeros(len(points))
    excess = (points[:, None] - front[None]).max(axis=2)
    return np.asarray(np.abs(excess).min(axis=1))
