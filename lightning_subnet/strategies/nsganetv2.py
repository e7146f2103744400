# SPDX-License-Identifier: Apache-2.0
"""NSGANetV2: evolution on the surrogate that ranks best; a batch that fills gaps of the front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.predictors import _sklearn
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.predictors.base import Predictor, kendall_tau
from lightning_subnet.predictors.kernel_regression import Scale
from lightning_subnet.space.members import distinct_rows
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies._toolkit.breeding import evolve
from lightning_subnet.strategies._toolkit.predicting import SmallBatches
from lightning_subnet.strategies._toolkit.published import (
    CubicRBF,
    PositionSurrogates,
    cost_of,
    fit,
    model_of,
    surrogates,
)
from lightning_subnet.strategies._toolkit.ranking import best_first
from lightning_subnet.strategies._toolkit.sampling import by_choice, in_order
from lightning_subnet.strategies._toolkit.surrogates import Surrogates
from lightning_subnet.strategies.base import are_new, check_probability, fill
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem

_PUBLISHED = ("network", "carts", "rbf", "gp")
_FOLDS, _FOLD_ROWS = 10, 4  # the fewest rows that have an order worth a correlation
_PASSES = 20


class Switching(Predictor):
    """The one of several models with the best rank correlation on left-out folds, chosen anew.

    Args:
        models: Names, as `published.model_of` takes them.
        random_state: The seed of folds, trees and weights.

    Attributes:
        chosen: The name of the model that predicts.
        scores: Kendall's tau by model: mean over folds, and standard deviation.
    """

    name = "switching"
    minimum = 2 * _FOLD_ROWS
    chosen: str
    scores: dict[str, tuple[float, float]]

    def __init__(self, models: Sequence[str] = _PUBLISHED, *, random_state: int = 0) -> None:
        super().__init__(random_state=random_state)
        self.models = models

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        self._scale = Scale(y)
        z = self._scale.z
        order = np.random.default_rng(self.random_state).permutation(len(y))
        folds = np.array_split(order, min(_FOLDS, len(y) // _FOLD_ROWS))
        self.scores = {}
        whole: dict[str, Any] = {}
        left_out: dict[str, Floats] = {}
        for name in self.models:
            try:
                whole[name] = fit(model_of(name, self.random_state), F, z)
                left_out[name] = _left_out(whole[name], F, z, folds)
            except (ValueError, np.linalg.LinAlgError):
                continue  # it cannot be fitted on these rows; the others compete without it
            taus = [kendall_tau(left_out[name][out], z[out])[0] for out in folds]
            self.scores[name] = (float(np.mean(taus)), float(np.std(taus)))
        if not self.scores:
            msg = f"none of its models {list(self.models)} could be fitted"
            raise ValueError(msg)
        self.chosen = max(self.scores, key=lambda k: self.scores[k][0] - self.scores[k][1])
        self._model = whole[self.chosen]
        return self._scale.back(left_out[self.chosen], np.ones(len(y)))

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        mean = np.asarray(self._model.predict(_sklearn.inputs_of(self._model, F)), dtype=float)
        return self._scale.back(mean, np.ones(len(F)))


def _left_out(model: Any, F: Floats, z: Floats, folds: Sequence[Indices]) -> Floats:
    """Return predictions of each row (n,) by a model of the same settings without its fold."""
    predictions = np.zeros(len(z))
    for out in folds:
        rest = np.setdiff1d(np.arange(len(z)), out)
        twin = CubicRBF() if isinstance(model, CubicRBF) else _sklearn.copy_with_kernel(model)
        twin = fit(twin, F[rest], z[rest])
        predictions[out] = twin.predict(_sklearn.inputs_of(twin, F[out]))
    if not np.isfinite(predictions).all():
        msg = "it predicts NaN or infinity"
        raise ValueError(msg)
    return predictions


class NSGANetV2(SmallBatches):
    """NSGANetV2: search on the surrogate that ranks best now, measure where the front has gaps.

    The first subnets are the smallest, the largest and random ones. Then, each generation, four
    models of each measure are compared by Kendall's tau on ten folds, less its standard deviation:
    a neural network, regression trees, radial basis functions and a Gaussian process. With the best
    one an NSGA-II starts from the measured front; of its final population those are measured that
    leave the costs of the front, with theirs, most evenly spaced. The cost is the first exact
    objective, or else the last; with one objective the best predicted are measured. Exact measures
    are computed.

    What differs from the released code: the network has one layer of 100; the trees are 100, with
    half of the columns for each split; the Gaussian process has one length scale, settled before
    the folds; crossover is uniform and mutation draws any value; exchanges find the subset,
    not a genetic algorithm; failed evaluations teach nothing; and the network takes part, which
    the release leaves out of its list.

    Args:
        batch_size: The number of proposals a generation.
        first: The evaluations before the first search; they come in whole batches.
        inner_population: Of the search on predictions.
        generations: Of the search on predictions.
        predictor: `"switching"`, one of its models (`"network"`, `"carts"`, `"rbf"`, `"gp"`), or
            another name or an estimator, see `predictors.make`.
        crossover: Probability that two parents are mixed.
        mutation: Probability per choice of a new random value; None is 1 / number of choices.

    Raises:
        StrategyError: A size is not a whole number from 1, or the predictor is unknown.

    References:
        Lu et al., NSGANetV2: Evolutionary Multi-Objective Surrogate-Assisted Neural Architecture
        Search, ECCV 2020, arXiv:2007.10396, algorithm 1.

    Example:
        >>> from lightning_subnet import FunctionEvaluator, SearchSpace, SubnetSearch
        >>> space = SearchSpace({f"x.{i}": range(4) for i in range(5)})
        >>> strategy = NSGANetV2(first=16, predictor="rbf")
        >>> search = SubnetSearch(space=space, objectives={"error": "min", "cost": "min"},
        ...                       strategy=strategy, budget=40, storage=None)
        >>> evaluator = FunctionEvaluator(
        ...     lambda s: {"error": 15.0 - sum(s.values()), "cost": float(s["x.0"])})
        >>> search.run(evaluator, progress=False).best("error").values["error"]
        0.0
    """

    name = "nsganetv2"

    def __init__(
        self,
        *,
        batch_size: int = 8,
        first: int = 100,
        inner_population: int = 40,
        generations: int = 20,
        predictor: Any = "switching",
        crossover: float = 0.9,
        mutation: float | None = None,
    ) -> None:
        check_probability(crossover=crossover, mutation=mutation)
        super().__init__(
            batch_size=batch_size,
            first=first,
            inner_population=inner_population,
            generations=generations,
            predictor=predictor,
            published=(Switching.name, *_PUBLISHED),
        )
        self.crossover = crossover
        self.mutation = mutation

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return subnets that fill gaps of the front, by prediction; see `Strategy.propose`."""
        space = problem.space
        done = len(history) + len(pending)
        if done < self.first or history.ok.sum() <= 1:
            ends = space.indices([space.smallest, space.largest][done:])
            return fill(problem, history, pending, n, rng, in_order(problem, ends))
        with one_thread():
            score = self._score(problem, history, rng)
            front = space.indices([e.subnet for e in problem.front(history)])
            start = front
            if len(front) <= 1:  # there is no mate
                more = by_choice(problem)(self.inner_population, rng)
                start = np.concatenate([front, more])
            breeder, _ = evolve(
                problem,
                score,
                start[distinct_rows(start)],
                population=self.inner_population,
                generations=self.generations,
                crossover=self.crossover,
                mutation=self.mutation,
                rng=rng,
            )
            rows = breeder.survivors()
            rows = rows[are_new(rows, history, pending)]
            if len(rows):
                rows = self._in_order(problem, score, rows, front, n)
        first = [rows]

        def draw(k: int, _: np.random.Generator) -> Indices:
            return first.pop() if first else space.canonical(breeder.offspring(k))

        return fill(problem, history, pending, n, rng, draw)

    def _score(self, problem: Problem, history: History, rng: np.random.Generator) -> Surrogates:
        if self._predictor == Switching.name:
            seed = int(rng.integers(2**31))
            return PositionSurrogates(problem, history, Switching(random_state=seed))
        return surrogates(problem, history, self._predictor, _PUBLISHED, rng)

    @staticmethod
    def _in_order(
        problem: Problem, score: Surrogates, rows: Indices, front: Indices, n: int
    ) -> Indices:
        """Return rows in order: first those that fill the gaps, then the best predicted."""
        F, violations = score(rows)
        order = best_first(F, violations)
        rows, F, violations = rows[order], F[order], violations[order]
        if F.shape[1] == 1 or not len(front):
            return rows
        cost = cost_of(problem)
        feasible = int((violations <= 0).sum())  # they come first
        subset = even_subset(score(front)[0][:, cost], F[:feasible, cost], n)
        rest = np.setdiff1d(np.arange(len(rows)), subset)
        ordered: Indices = rows[np.concatenate([subset, rest])]
        return ordered


def even_subset(front: Floats, costs: Floats, n: int) -> Indices:
    """Return n of the costs that leave them, with those of the front, most evenly spaced.

    The least standard deviation of the gaps is sought: first by adding one cost after the other,
    then by exchanging one for another while that helps.

    Args:
        front: The costs of the measured front (k,).
        costs: The costs to choose from (m,).
        n: The size of the subset; all costs, where m is no more.

    Returns:
        Indices into `costs`.

    References:
        Lu et al., arXiv:2007.10396, algorithm 1, line 11 (subset selection).

    Example:
        >>> even_subset(np.array([0.0, 4.0]), np.array([3.9, 1.0, 3.0, 2.0, 0.1]), 3).tolist()
        [1, 2, 3]
    """
    if len(costs) <= n:
        return np.arange(len(costs))

    def unevenness(subset: list[int]) -> float:
        return float(np.diff(np.sort(np.concatenate([front, costs[subset]]))).std())

    subset: list[int] = []
    for _ in range(n):
        others = [i for i in range(len(costs)) if i not in subset]
        subset.append(min(others, key=lambda i: unevenness([*subset, i])))
    for _ in range(_PASSES):
        best = unevenness(subset)
        before = best
        for at in range(n):
            for i in range(len(costs)):
                other = [*subset[:at], i, *subset[at + 1 :]]
                if i not in subset and unevenness(other) < best - 1e-12:
                    subset, best = other, unevenness(other)
        if best == before:
            break
    return np.array(sorted(subset))
