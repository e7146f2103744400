# SPDX-License-Identifier: Apache-2.0
"""WeakNAS: a pool of random subnets, ranked anew each round by a predictor of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_subnet._messages import did_you_mean
from lightning_subnet._types import Indices
from lightning_subnet.errors import StrategyError
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.space.members import distinct_rows
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies._toolkit.predicting import PredictingStrategy
from lightning_subnet.strategies._toolkit.published import cost_of, study_rng, surrogates
from lightning_subnet.strategies._toolkit.ranking import best_first
from lightning_subnet.strategies._toolkit.sampling import by_choice, in_order
from lightning_subnet.strategies.base import Opening, are_new, check_positive, fill
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem

_READINGS = ("front", "bands")
_PUBLISHED = ("boosting", "mlp", "forest")


class WeakNAS(PredictingStrategy):
    """WeakNAS: measure some of those that a weak predictor thinks best of a pool, and learn.

    The pool is drawn at random once, each choice by itself, the first batch from it. Then, each
    round, a predictor is fitted on everything measured and ranks the whole pool; the batch is drawn
    uniformly from those of its `top` that are new. If they are fewer than a batch, the best ranked
    new ones are measured. Exact measures are computed. The predicted violation of constraints comes
    first in every ranking. Where the space is no larger than the pool, it is the pool.

    On NAS-Bench-201 the published settings are `WeakNAS(batch_size=10, top=100, pool=15_625)` with
    the predictor `"mlp"` or `"forest"`.

    The published method has one objective. For several there are two readings. `"front"` ranks by
    predicted front, then by crowding distance. `"bands"` is one run per band of the cost: the cost,
    the first exact objective or else the last one, cuts the pool into parts of equal size, and the
    parts take turns, generation by generation. Within a band the other objective ranks, and with
    three objectives or more the others by front and crowding distance. A band has its share of the
    pool and of `top`, and all bands learn from everything measured. The front of the search is that
    of the runs together.

    What differs from the released code: boosted trees are scikit-learn's on histograms, not
    XGBoost's, with 50 of the 1000 rounds, after which nothing is left to fit; positions of values
    are masked where a choice does not exist; and no subnet is proposed twice.

    Args:
        batch_size: The number of proposals a round.
        first: The evaluations before the first predictor; None is one batch. They come in whole
            batches.
        pool: The number of subnets that are ranked.
        top: The number of the best ranked, from which a batch is drawn.
        predictor: As published, `"boosting"` (depth 20), `"mlp"` (4 layers of 1000) or `"forest"`
            (1000 trees); or another name or an estimator, see `predictors.make`.
        reading: For several objectives, `"front"` or `"bands"`.
        bands: The number of bands of cost.

    Raises:
        StrategyError: The predictor or reading is unknown, or sizes do not fit each other.

    References:
        Wu et al., Stronger NAS with Weaker Predictors, NeurIPS 2021, arXiv:2102.10490, and its
        released code; the baseline of arXiv:2202.12954.

    Example:
        >>> from lightning_subnet import FunctionEvaluator, SearchSpace, SubnetSearch
        >>> space = SearchSpace({f"x.{i}": range(4) for i in range(4)})
        >>> search = SubnetSearch(space=space, objectives={"error": "min"}, budget=40, storage=None,
        ...                       strategy=WeakNAS(batch_size=10, top=20, predictor="ridge"))
        >>> evaluator = FunctionEvaluator(lambda s: {"error": 12.0 - sum(s.values())})
        >>> search.run(evaluator, progress=False).best("error").values["error"]
        0.0
    """

    name = "weaknas"

    def __init__(
        self,
        *,
        batch_size: int = 100,
        first: int | None = None,
        pool: int = 10_000,
        top: int = 1000,
        predictor: Any = "boosting",
        reading: str = "front",
        bands: int = 5,
    ) -> None:
        first = batch_size if first is None else first
        check_positive(batch_size=batch_size, first=first, pool=pool, top=top, bands=bands)
        if reading not in _READINGS:
            msg = (
                f"reading={reading!r} of the strategy is unknown.{did_you_mean(reading, _READINGS)}"
                " It is 'front' (rank by predicted front) or 'bands' (one run per band of cost)."
            )
            raise StrategyError(msg)
        share = top // bands if reading == "bands" else top
        if share < batch_size:
            parts = f" of {bands} bands, {share} in each," if reading == "bands" else ""
            msg = (
                f"top={top}{parts} is less than batch_size={batch_size}. "
                "Give a larger top or a smaller batch_size."
            )
            raise StrategyError(msg)
        if pool < max(top, first):
            msg = f"pool={pool} must hold top={top} and first={first}. Give a larger pool."
            raise StrategyError(msg)
        super().__init__(predictor, published=_PUBLISHED)
        self.batch_size = batch_size
        self.first = first
        self.pool = pool
        self.top = top
        self.reading = reading
        self.bands = bands

    @property
    def opening(self) -> Opening:
        """The first subnets, which are drawn at random."""
        return Opening(self.first, "first")

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return subnets drawn from the predicted top of the pool; see `Strategy.propose`."""
        done = len(history) + len(pending)
        if done < self.first or history.ok.sum() <= 1:
            return fill(problem, history, pending, n, rng, by_choice(problem))
        with one_thread():
            ranking, top = self._ranking(problem, history, done, rng)
        new = are_new(ranking, history, pending)
        inside, rest = ranking[:top][new[:top]], ranking[top:][new[top:]]
        if len(inside) > n:
            inside = rng.permutation(inside)
        return fill(problem, history, pending, n, rng, in_order(problem, np.vstack([inside, rest])))

    def _ranking(
        self, problem: Problem, history: History, done: int, rng: np.random.Generator
    ) -> tuple[Indices, int]:
        """Return the pool and the measured rows, best first, and the number of those at the top."""
        rows = np.vstack([history.indices, self._pool(problem, history)])
        rows = rows[distinct_rows(rows)]
        F, violations = surrogates(problem, history, self._predictor, _PUBLISHED, rng)(rows)
        if self.reading == "front" or F.shape[1] == 1:
            return rows[best_first(F, violations)], self.top
        cost = cost_of(problem)
        turn = (done - self.first) // self.batch_size % self.bands
        band = np.array_split(np.argsort(F[:, cost], kind="stable"), self.bands)[turn]
        F = np.delete(F, cost, axis=1)
        return rows[band[best_first(F[band], violations[band])]], self.top // self.bands

    def _pool(self, problem: Problem, history: History) -> Indices:
        """Return the pool but for the first batch: that was drawn before, in the same way."""
        size = problem.space.size
        if size <= self.pool:
            return problem.space.sample_indices(size, study_rng(history))
        return by_choice(problem)(self.pool - self.first, study_rng(history))
