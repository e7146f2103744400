# SPDX-License-Identifier: Apache-2.0
"""Bayesian optimisation: Gaussian processes and BoTorch's noisy expected improvement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Floats, Indices
from lightning_subnet.errors import StrategyError
from lightning_subnet.predictors import _gpytorch as _gp
from lightning_subnet.predictors.base import KERNEL_ROWS, spaced_rows, warn_once
from lightning_subnet.predictors.gaussian_process import Gaussian
from lightning_subnet.predictors.kernel_regression import Scale
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies._toolkit.sampling import (
    by_choice,
    first_batch,
    in_order,
    neighbour_rows,
)
from lightning_subnet.strategies._toolkit.surrogates import is_vectorised
from lightning_subnet.strategies.base import Opening, Strategy, check_positive, fill, known_codes
from lightning_subnet.study import pareto
from lightning_subnet.study.history import History
from lightning_subnet.study.objectives import violation
from lightning_subnet.study.problem import Problem

_MOST_OBJECTIVES = 4
_MARGIN = 0.1  # of the reference point, in spans of what was measured
_LEADERS = 30  # measured subnets whose neighbours are looked at
_FEWEST_LEADERS = 5
_BEAM = 2  # subnets whose neighbours are looked at in a round of the climb
_DRAWS = 4  # random subnets, and as many children of leaders, for each subnet that is scored
_MIX = 0.5
_FENCE = 1.5  # interquartile ranges
_AGAIN = 4  # a quarter is scored again for the next subnet of the batch
_BOLD = 2.0  # standard deviations of optimism in the order by which subnets are scored
_WORK = 40_000_000  # numbers that one choice of a subnet may cost, where there are many objectives
_FEWEST = 32


class Bayesian(Strategy):
    """Bayesian optimisation with BoTorch: a Gaussian process per measure, noisy improvement.

    The first subnets are a balanced design. Then, each generation, a Gaussian process (see
    `predictors.make("gp")`) is fitted to each measure, without a logarithm; exact measures that
    are vectorised are computed. Each subnet of the batch has the greatest
    qLogNoisyExpectedHypervolumeImprovement (qLogNoisyExpectedImprovement with one objective),
    given that those chosen before it and those being measured are pending. Measured constraints
    are outcome constraints; subnets that break an exact one are not looked at.

    The search for that subnet is discrete: neighbours and children of the measured front and
    random subnets (a space of up to `scored` subnets as a whole) are ordered by optimistic
    predictions, the best are scored, and from the best of these a climb goes over neighbours that
    differ in one choice. The reference point is the worst value of each objective among the
    feasible successes (among all if none is feasible), and a tenth of their span beyond it.
    Predicted objectives count for no worse than 1.5 interquartile ranges below the lower quartile.

    Args:
        batch_size: The number of proposals a generation. If more are wanted, the others are those
            that scored next best.
        first: The size of the design.
        samples: The number of samples of the posterior, quasi-random; a power of two is best. With
            three objectives a quarter of them is taken, with four an eighth.
        scored: The number of subnets that are scored before the climb; fewer where four
            objectives make that slow.
        rounds: The number of rounds of the climb.

    Raises:
        StrategyError: A setting is not a whole number from 1; in `propose`, there are more than
            four objectives.

    References:
        Daulton, Balandat and Bakshy, NeurIPS 2021, arXiv:2105.08195 (qNEHVI); Ament et al.,
        NeurIPS 2023, arXiv:2310.20708 (its logarithm); Balandat et al., BoTorch, NeurIPS 2020.

    Example:
        >>> Bayesian(first=10).batch_size
        5
    """

    name = "bayesian"

    def __init__(
        self,
        *,
        batch_size: int = 5,
        first: int = 20,
        samples: int = 64,
        scored: int = 500,
        rounds: int = 4,
    ) -> None:
        check_positive(
            batch_size=batch_size, first=first, samples=samples, scored=scored, rounds=rounds
        )
        self.batch_size = batch_size
        self.first = first
        self.samples = samples
        self.scored = scored
        self.rounds = rounds

    @property
    def opening(self) -> Opening:
        """The design."""
        return Opening(self.first, "first")

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return the batch; see `Strategy.propose`."""
        if (m := len(problem.objectives)) > _MOST_OBJECTIVES:
            msg = (
                f"The strategy 'bayesian' has {m} objectives; its hypervolumes take too long "
                f"beyond {_MOST_OBJECTIVES}.\nTurn some into constraints, or use 'u-nsga3'."
            )
            raise StrategyError(msg)
        if len(history) + len(pending) < self.first or history.ok.sum() <= 1:
            return first_batch(problem, history, n, rng, pending)
        batch = self._batch(problem, history, n, rng, pending)
        return fill(problem, history, pending, n, rng, in_order(problem, batch))

    def _batch(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet],
    ) -> Indices:
        """Return up to n rows, the first `batch_size` of them one given the other."""
        space = problem.space
        models = Models(problem, history)
        climb = Climb(models, known_codes(history, pending))
        climb.add(self._start(problem, models, rng))
        if not climb.size:
            return climb.X
        seed = int(rng.integers(2**31))
        with _gp.one_seed(seed):
            acquisition = _gp.Acquisition(
                models.outcomes,
                models.limits,
                models.rows(models.X),
                models.rows(space.indices(pending)),
                models.reference,
                samples=self.samples,
                seed=seed,
            )
            batch = np.zeros((0, len(space.names)), dtype=np.int64)
            while climb.size and len(batch) < min(n, self.batch_size):
                if len(batch):
                    acquisition.choose(models.rows(batch[-1:]))
                most = self.scored if not len(batch) else self.scored // _AGAIN
                climb.keep(max(min(most, _WORK // acquisition.work), _FEWEST))
                climb.run(acquisition, self.rounds)
                batch = np.concatenate([batch, climb.pop()])
        return np.concatenate([batch, climb.X[: n - len(batch)]])

    def _start(self, problem: Problem, models: Models, rng: np.random.Generator) -> Indices:
        """Return rows to begin with: all of a small space, else leaders' neighbours and random."""
        space = problem.space
        if space.size <= self.scored:
            return np.concatenate(list(space.index_blocks()))
        leaders = models.leaders()
        random = by_choice(problem)(_DRAWS * self.scored, rng)
        rows = [neighbour_rows(space, space.from_indices(leaders)), random]
        if not space.is_pool:  # where children are rarely members
            one, two = (leaders[rng.integers(len(leaders), size=len(random))] for _ in range(2))
            children = np.where(rng.random(random.shape) < _MIX, one, two)
            mutate = rng.random(random.shape) < 1 / len(space.names)
            rows.append(space.canonical(np.where(mutate, random, children)))
        return np.concatenate(rows)


class Models:
    """A model of each measure of a problem, in units of its spread, to be maximised.

    Args:
        problem: The problem of the search.
        history: The evaluations, two successes or more.

    Attributes:
        outcomes: Objectives, then measures that only constraints refer to.
        limits: Constraints on outcomes.
        reference: The reference point (m,).
        X: The rows of the successes.
    """

    def __init__(self, problem: Problem, history: History) -> None:
        self.problem = problem
        objectives = [(o.name, -1.0 if o.direction == "min" else 1.0) for o in problem.objectives]
        bounds = [c for c in problem.bounds(history) if not is_vectorised(problem, c.name)]
        m = len(objectives)
        only = dict.fromkeys(c.name for c in bounds if c.name not in dict(objectives))
        self._measures = objectives + [(name, 1.0) for name in only]
        self._hard = [c for c in problem.exact_constraints if is_vectorised(problem, c.name)]
        F, violations = problem.scores(history)
        usable = history.ok & np.isfinite(F).all(axis=1)
        self.X, self._F, self._violations = history.indices[usable], F[usable], violations[usable]
        self._features = features(problem.space, self.X)
        self._scales: list[Scale] = []
        self.outcomes: list[_gp.Outcome] = []
        self._exact: list[tuple[int, str]] = []  # outcome and measure; "" is a constant
        values = []
        for k, (name, sign) in enumerate(self._measures):
            y = history.column(name)[usable]
            finite = np.isfinite(y)
            predicted = not is_vectorised(problem, name)
            if k < m and predicted and all(c.name != name for c in bounds):
                y = sign * _fence(sign * y, finite)
            scale = Scale(y[finite] if finite.any() else np.zeros(1))
            self._scales.append(scale)
            values.append(sign * (y - scale.mean) / scale.std)
            self.outcomes.append(self._outcome(k, name, finite, sign * scale.z[: finite.sum()]))
        feasible = self._violations <= 0
        within = feasible if feasible.any() else ~feasible
        Z = np.stack(values[:m], axis=1)[within]
        span = np.ptp(Z, axis=0)
        self.reference = Z.min(axis=0) - _MARGIN * np.where(span > 0, span, 1.0)
        self.limits: list[_gp.Limit] = []
        index = {name: k for k, (name, _) in reversed(list(enumerate(self._measures)))}
        for bound in bounds:
            k = index[bound.name]
            sign, scale = self._measures[k][1], self._scales[k]
            level = sign * (bound.bound - scale.mean) / scale.std
            self.limits.append((k, sign if bound.upper else -sign, level))

    def _outcome(self, k: int, name: str, finite: npt.NDArray[np.bool_], z: Floats) -> _gp.Outcome:
        """Return a process, or the place of the values themselves behind the features."""
        exact = is_vectorised(self.problem, name)
        if not exact and len(z) > 1 and np.ptp(z) > 0:
            rows = spaced_rows(len(z), KERNEL_ROWS)
            try:
                return Gaussian(self._features[finite][rows], z[rows])
            except (np.linalg.LinAlgError, ValueError) as error:
                warn_once(
                    f"The Gaussian process of {name!r} failed ({error!s:.100}): its mean is used.",
                    cause=(f"process of {name}", type(error).__name__),
                )
        self._exact.append((k, name if exact else ""))
        return int(self._features.shape[1]) + len(self._exact) - 1

    def rows(self, X: Indices) -> Floats:
        """Return the features of rows (n, n_choices), and behind them the exact values, (n, d)."""
        return np.column_stack([features(self.problem.space, X), *self._values(X)])

    def _values(self, X: Indices) -> Iterable[Floats]:
        for k, name in self._exact:
            scale, sign = self._scales[k], self._measures[k][1]
            y = self.problem.exact_values(name, X) if name else np.full(len(X), scale.mean)
            yield sign * (y - scale.mean) / scale.std

    def are_allowed(self, X: Indices, rows: Floats) -> npt.NDArray[np.bool_]:
        """Return whether rows keep the exact constraints and have all exact measures, (n,)."""
        columns = {c.name: self.problem.exact_values(c.name, X) for c in self._hard}
        return np.isfinite(rows).all(axis=1) & (violation(self._hard, columns, len(X)) <= 0)

    def promise(self, rows: Floats) -> Indices:
        """Return the order of rows (n, d) by optimistic predictions, the best first."""
        mean, violations = np.zeros((len(rows), len(self.outcomes))), np.zeros(len(rows))
        std = np.zeros_like(mean)
        for k, outcome in enumerate(self.outcomes):
            if isinstance(outcome, int):
                mean[:, k] = rows[:, outcome]
            else:
                mean[:, k], std[:, k] = outcome.predict(rows[:, : self._features.shape[1]])
        for k, sign, level in self.limits:
            violations += np.maximum(sign * (mean[:, k] - level) - _BOLD * std[:, k], 0.0)
        optimistic = (mean + _BOLD * std)[:, : len(self.reference)]
        ranks = pareto.nondominated_ranks(optimistic, maximise=True)
        order: Indices = np.lexsort((ranks, violations))
        return order

    def leaders(self) -> Indices:
        """Return the rows of the measured front, or of the best successes if it is small."""
        ranks = pareto.nondominated_ranks(self._F)
        order = np.lexsort((self._F[:, 0], ranks, self._violations))
        front = int(((self._violations <= 0) & (ranks == 0)).sum())
        order = order[: max(front, _FEWEST_LEADERS)]
        return self.X[order[spaced_rows(len(order), _LEADERS)]]


def _fence(y: Floats, finite: npt.NDArray[np.bool_]) -> Floats:
    """Return values (n,), those below the lower fence raised to it: one bad subnet sets no scale.

    References:
        Tukey, Exploratory Data Analysis (1977), section 2D.
    """
    if not finite.any():
        return y
    low, high = np.quantile(y[finite], [0.25, 0.75])
    return np.asarray(np.maximum(y, low - _FENCE * (high - low)) if high > low else y)


class Climb:
    """Rows under consideration, best first, and the hill-climbing over their neighbours.

    Args:
        models: The models of the measures.
        codes: The codes of the measured and the pending rows.
    """

    def __init__(self, models: Models, codes: set[bytes]) -> None:
        self._models = models
        self._codes = set(codes)
        self.X = models.X[:0]
        self._has_scores = False
        self._rows = models.rows(self.X)

    @property
    def size(self) -> int:
        """The number of rows under consideration."""
        return len(self.X)

    def add(self, X: Indices) -> int:
        """Add the new and allowed ones of canonical rows, behind the others; return how many."""
        others = []
        for code, row in zip(row_codes(X), X, strict=True):
            if code not in self._codes:
                self._codes.add(code)
                others.append(row)
        if not others:
            return 0
        new = np.stack(others)
        rows = self._models.rows(new)
        allowed = self._models.are_allowed(new, rows)
        self.X = np.concatenate([self.X, new[allowed]])
        self._rows = np.concatenate([self._rows, rows[allowed]])
        return int(allowed.sum())

    def keep(self, most: int) -> None:
        """Keep `most` rows: those that scored best, or promise most where none has a score."""
        if self.size > most and not self._has_scores:
            self._order(np.sort(self._models.promise(self._rows)[:most]))
        self._order(np.arange(min(self.size, most)))

    def run(self, acquisition: _gp.Acquisition, rounds: int) -> None:
        """Score all rows, climb over neighbours for some rounds, and order all by their score."""
        values = acquisition(self._rows)
        centres: set[bytes] = set()
        for _ in range(rounds):
            best = np.argsort(-values, kind="stable")[:_BEAM]
            codes = zip(row_codes(self.X[best]), best, strict=True)
            starts = [i for code, i in codes if code not in centres]
            if not starts:
                break
            centres |= set(row_codes(self.X[starts]))
            space = self._models.problem.space
            if more := self.add(neighbour_rows(space, space.from_indices(self.X[starts]))):
                values = np.concatenate([values, acquisition(self._rows[-more:])])
        self._order(np.argsort(-values, kind="stable"))
        self._has_scores = True

    def pop(self) -> Indices:
        """Return the first row (1, n_choices), which leaves."""
        first, self.X, self._rows = self.X[:1], self.X[1:], self._rows[1:]
        return first

    def _order(self, order: Indices) -> None:
        self.X, self._rows = self.X[order], self._rows[order]
