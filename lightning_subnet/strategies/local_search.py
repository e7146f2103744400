# SPDX-License-Identifier: Apache-2.0
"""Local search: the neighbours of the best are measured, and where none is new it starts again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies._toolkit.ranking import front_ranks
from lightning_subnet.strategies._toolkit.sampling import in_order, neighbour_rows
from lightning_subnet.strategies.base import Strategy, check_positive, fill, known_codes
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem


class LocalSearch(Strategy):
    """Measure subnets that differ in one choice from the best so far, and are new.

    The first batch is drawn at random. Then the neighbours of the front are measured: its members
    take turns in random order, each with a random one of its new neighbours. When all neighbours
    of the front are measured, the search starts again from a random batch, with a front of its own;
    the runs are read off the history. Failed evaluations are on no front; while nothing is
    feasible, the subnets that violate the constraints least take the place of the front.

    With one objective this is hill climbing with restarts. The smaller the batch, the sooner a
    better neighbour is climbed from: `batch_size=1` is the published variant that moves at the
    first improvement; the other measures all neighbours before it moves.

    Args:
        batch_size: The number of proposals a generation.

    References:
        White et al., Local Search is State of the Art for NAS Benchmarks, arXiv:2005.02960,
        algorithm 1; the multi-objective form is that of whittle's `LocalSearch`.

    Example:
        >>> from lightning_subnet import FunctionEvaluator, SearchSpace, SubnetSearch
        >>> space = SearchSpace({f"x.{i}": range(4) for i in range(5)})
        >>> search = SubnetSearch(space=space, objectives={"error": "min"}, budget=120,
        ...                       strategy=LocalSearch(batch_size=5), storage=None)
        >>> evaluator = FunctionEvaluator(lambda s: {"error": 15.0 - sum(s.values())})
        >>> search.run(evaluator, progress=False).best("error").values["error"]
        0.0
    """

    name = "local-search"

    def __init__(self, *, batch_size: int = 10) -> None:
        check_positive(batch_size=batch_size)
        self.batch_size = batch_size

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return new neighbours of the front of the current run; see `Strategy.propose`."""
        rows = problem.space.indices([])
        if len(history):
            codes = known_codes(history, pending)
            near = _Neighbours(problem.space)
            front = rng.permutation(_front_of_run(problem, history, near))
            around = [rng.permutation(near.new(history[int(i)].subnet, codes)) for i in front]
            turns = [row for row in chain(*zip_longest(*around)) if row is not None]
            rows = np.stack(turns) if turns else rows
        return fill(problem, history, pending, n, rng, in_order(problem, rows))


class _Neighbours:
    """The neighbours of subnets, looked up once for each."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._rows: dict[Subnet, tuple[Indices, list[bytes]]] = {}

    def new(self, subnet: Subnet, codes: set[bytes]) -> Indices:
        """Return the neighbours of a subnet without those of these codes (n, n_choices)."""
        if subnet not in self._rows:
            X = neighbour_rows(self._space, [subnet])
            self._rows[subnet] = X, row_codes(X)
        X, codes_of_rows = self._rows[subnet]
        return X[[code not in codes for code in codes_of_rows]]


def _front_of_run(problem: Problem, history: History, near: _Neighbours) -> Indices:
    """Return the evaluations that the current run climbs from (n,).

    A run ends with the generation that has measured the last new neighbour of its front.
    """
    F, violations = problem.scores(history)
    codes = row_codes(history.indices)
    begin, front = 0, np.zeros(0, dtype=np.int64)
    measured: set[bytes] = set()
    for end in _ends_of_generations(history):
        rows = np.concatenate([front, np.arange(begin, end)])
        front = rows[_best(F[rows], violations[rows])]
        measured.update(codes[begin:end])
        begin = end
        if not any(len(near.new(history[int(i)].subnet, measured)) for i in front):
            front = front[:0]
    return front


def _ends_of_generations(history: History) -> Iterator[int]:
    """Yield the number of evaluations at the end of each generation."""
    at = [evaluation.generation for evaluation in history]
    yield from (i for i in range(1, len(at)) if at[i] != at[i - 1])
    yield len(at)


def _best(F: Floats, violations: Floats) -> Indices:
    """Return the rows of the feasible front, or those nearest to feasible; none if all failed."""
    ranks, violations = front_ranks(F, violations)
    least = violations.min()
    return np.flatnonzero((violations == least) & (ranks == 0) & np.isfinite(violations))
