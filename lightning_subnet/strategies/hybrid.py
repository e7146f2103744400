# SPDX-License-Identifier: Apache-2.0
"""Hybrid: designed start, small batches, and a search on predictions around the measured front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_subnet import pareto
from lightning_subnet._sklearn import Floats, one_thread
from lightning_subnet.choices import Indices
from lightning_subnet.history import History
from lightning_subnet.members import distinct_rows, row_codes
from lightning_subnet.problem import Problem
from lightning_subnet.strategies.base import fill, positive, uniform
from lightning_subnet.strategies.surrogate import PredictingStrategy, Surrogates, evolve
from lightning_subnet.subnet import Subnet

_POOL = 4000
_MARGIN = 0.1
_FRONT = 30  # subnets of the front whose neighbours are looked at
_BOLD = 3  # each third is chosen by optimistic predictions
_MOST = 300  # rows whose gain in hypervolume is computed


class Hybrid(PredictingStrategy):
    """Predictors of everything measured, an inner evolution from the front, greedy hypervolume.

    The first batch is designed: the largest and the smallest subnet, and subnets spread evenly over
    an exact cost, or over size where there is none. Then, each generation, predictors are fitted;
    exact measures are computed. An inner evolution starts from the measured front, its neighbours
    and random subnets; of all that it scores, the batch is chosen greedily: each subnet adds the
    most hypervolume to the measured front and those chosen before it. Every third one is chosen by
    optimistic predictions, where the predictor is least sure.

    Args:
        batch_size: How many are proposed a generation.
        first: How many are in the designed first batch.
        inner_population: How many survive in the inner evolution.
        generations: Of the inner evolution.
        predictor: A name or an estimator; see `predictors.make`.

    Example:
        >>> Hybrid(batch_size=5).first
        20
    """

    name = "hybrid"

    def __init__(
        self,
        *,
        batch_size: int = 10,
        first: int = 20,
        inner_population: int = 100,
        generations: int = 30,
        predictor: Any = "auto",
    ) -> None:
        positive(
            batch_size=batch_size,
            first=first,
            inner_population=inner_population,
            generations=generations,
        )
        super().__init__(predictor)
        self.batch_size = batch_size
        self.first = first
        self.inner_population = inner_population
        self.generations = generations

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return the batch; see `Strategy.propose`."""
        done = len(history) + len(pending)
        if done < self.first or history.ok.sum() <= 1:
            start = [designed(problem, self.first, rng)]

            def spread(k: int, rng: np.random.Generator) -> Indices:
                return start.pop()[done:] if start else uniform(problem)(k, rng)

            return fill(problem, history, pending, n, rng, spread)
        with one_thread():
            score = Surrogates(problem, history, self._predictor)
            pool = self._evolved(problem, history, score, rng)
            waiting = row_codes(problem.space.indices(pending)) if pending else ()
            taken = history.codes | set(waiting)
            pool = pool[[code not in taken for code in row_codes(pool)]]
            chosen = [self._chosen(problem, history, score, pool, n, pending)] if len(pool) else []

        def draw(k: int, rng: np.random.Generator) -> Indices:
            return chosen.pop() if chosen else uniform(problem)(k, rng)

        return fill(problem, history, pending, n, rng, draw)

    def _evolved(
        self, problem: Problem, history: History, score: Surrogates, rng: np.random.Generator
    ) -> Indices:
        """Return all rows that an inner evolution has looked at, without repeats."""
        space = problem.space
        front = [e.subnet for e in problem.front(history)]
        around = [other for subnet in front[:_FRONT] for other in space.neighbours(subnet)]
        near = [space.indices([*front, *around])] if front else []
        fresh = space.sample_indices(min(self.inner_population, space.size), rng)
        start = np.concatenate([*near, fresh])
        _, seen = evolve(
            problem,
            score,
            start[distinct_rows(start)],
            population=self.inner_population,
            generations=self.generations,
            rng=rng,
        )
        return seen

    def _chosen(
        self,
        problem: Problem,
        history: History,
        score: Surrogates,
        X: Indices,
        n: int,
        pending: Sequence[Subnet],
    ) -> Indices:
        """Return up to n rows that add hypervolume to the measured front, by prediction."""
        mean, std, missed = score.with_std(X)
        bold = mean - std
        feasible = missed <= 0
        if not feasible.any():
            return X[np.argsort(missed, kind="stable")[:n]]
        X, mean, bold = X[feasible], mean[feasible], bold[feasible]
        F, broken = problem.scores(history)
        F = F[(broken <= 0) & np.isfinite(F).all(axis=1)]
        if pending:
            F = np.concatenate([F, score(problem.space.indices(pending))[0]])
        candidates = np.flatnonzero(_useful(mean) | _useful(bold))
        everything = np.concatenate([F, mean[candidates]])
        low, high = everything.min(axis=0), everything.max(axis=0)
        span = np.where(high > low, high - low, 1.0)
        front = (F - low) / span
        front = front[pareto.nondominated(front)] if len(front) else front
        reference = np.full(F.shape[1], 1 + _MARGIN)
        mean, bold = (mean - low) / span, (bold - low) / span
        picked: list[int] = []
        while len(picked) < n and len(candidates):
            by = bold if len(picked) % _BOLD == _BOLD - 1 else mean
            gains = _gains(front, by[candidates], reference)
            if gains.max() <= 0:  # nothing promises more: what is nearest to the front
                gains = -_distance(front, by[candidates])
            best = candidates[int(np.argmax(gains))]
            picked.append(int(best))
            front = np.vstack([front, mean[best]])
            front = front[pareto.nondominated(front)]
            candidates = candidates[candidates != best]
        return X[picked]


def designed(problem: Problem, n: int, rng: np.random.Generator) -> Indices:
    """Return n rows: the largest, the smallest, and rows spread evenly over cost or size."""
    space = problem.space
    ends = space.indices(list(dict.fromkeys([space.largest, space.smallest])))
    X = space.sample_indices(min(_POOL, space.size), rng)
    if all(problem.exact[c.name].vectorised for c in problem.exact_constraints):
        X = X[problem.exact_violation(X) <= 0]
    if not len(X):
        return ends
    exact = [name for name, measure in problem.exact.items() if measure.vectorised]
    cost = problem.exact_values(exact[0], X) if exact else X.sum(axis=1).astype(float)
    # Even in cost, not in rank: uniform draws crowd around the middle.
    order = np.argsort(cost, kind="stable")
    low, high = np.quantile(cost, [0.005, 0.995])
    at = np.searchsorted(cost[order], np.linspace(low, high, max(n - len(ends), 1)))
    rows = X[order[at.clip(0, len(X) - 1)]]
    rng.shuffle(rows)
    return np.concatenate([ends, rows])


def _useful(F: Floats) -> np.ndarray:
    """Return which rows stand on the first fronts, some hundreds at most."""
    ranks = pareto.nondominated_ranks(F)
    order = np.argsort(ranks, kind="stable")[:_MOST]
    useful = np.zeros(len(F), dtype=bool)
    useful[order] = True
    return useful


def _gains(front: Floats, points: Floats, reference: Floats) -> Floats:
    """Return how much hypervolume each point (n, m) adds to a front by itself."""
    base = pareto.hypervolume(front, reference) if len(front) else 0.0
    gains = np.zeros(len(points))
    open_ = (points < reference).all(axis=1)
    for point in front:
        open_ &= (points < point).any(axis=1)
    for i in np.flatnonzero(open_):
        gains[i] = pareto.hypervolume(np.vstack([front, points[i]]), reference) - base
    return gains


def _distance(front: Floats, points: Floats) -> Floats:
    """Return how far each point must improve to be on the front (n,)."""
    if not len(front):
        return np.zeros(len(points))
    excess = (points[:, None] - front[None]).max(axis=2)
    return np.asarray(np.abs(excess).min(axis=1))
