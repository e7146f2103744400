# SPDX-License-Identifier: Apache-2.0
"""The contract of a strategy, and the one helper that keeps every strategy within it."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lightning_subnet._checks import checked_int
from lightning_subnet._types import Indices
from lightning_subnet.errors import SpaceExhausted, StrategyError
from lightning_subnet.space.choices import plain
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem

Draw = Callable[[int, np.random.Generator], Indices]
"""A source of proposals: called as `draw(k, rng)`, returns about k rows of value indices."""

_TRIES = 20
_MOST_ROWS = 4096  # new subnets at a time: small spaces are gone through whole
_TRACED_TRIES = 3  # where an exact measure takes milliseconds a subnet


@dataclass(frozen=True)
class Opening:
    """The first evaluations of a strategy, which follow no measurement.

    A budget that an opening uses up leaves nothing to learn from: a search warns of it, and names
    the setting to change.

    Args:
        size: The number of subnets before the first that follows a measurement.
        setting: The argument of the constructor that sets it; empty where there is none.

    Example:
        >>> from lightning_subnet.strategies import NSGA2
        >>> NSGA2(population=20).opening
        Opening(size=20, setting='population')
    """

    size: int = 0
    setting: str = ""


class Strategy(ABC):
    """Proposes subnets from a history; keeps no state of its own between calls.

    Subclass it to bring a strategy of your own: set `name`, accept your settings in the
    constructor, keep each under its own name (see `settings`), set `batch_size`, and implement
    `propose`, for which `fill` does most. A strategy that begins with a population or a design
    says so by a property `opening`.

    Attributes:
        name: The name in `strategy=` and in a study.
        batch_size: The number of subnets of a generation, one call of `propose`.
    """

    name: ClassVar[str]
    batch_size: int

    @property
    def opening(self) -> Opening:
        """The evaluations that come before the first that learns; none unless overridden."""
        return Opening()

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON-able data; a study is resumed only with equal ones."""
        return {
            key: plain(value) if not isinstance(value, (list, tuple, dict)) else value
            for key, value in vars(self).items()
            if not key.startswith("_")
        }

    @abstractmethod
    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        """Return up to n subnets to measure next, a pure function of its arguments.

        Args:
            problem: Space, objectives, constraints and exact measures.
            history: The evaluations so far; failed ones are in it too.
            n: The most subnets to return.
            rng: The only source of randomness.
            pending: Subnets that are being measured.

        Returns:
            1 to n canonical, distinct subnets, none of them in `history` or `pending`.

        Raises:
            SpaceExhausted: No such subnet is left.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.settings().items())
        return f"{type(self).__name__}({settings})"


def check_positive(**settings: int) -> None:
    """Raise `StrategyError` for a setting that is not a whole number from 1.

    Example:
        >>> check_positive(population=50, batch_size=0)
        Traceback (most recent call last):
        lightning_subnet.errors.StrategyError: batch_size=0 must be a whole number from 1...
    """
    for name, value in settings.items():
        checked_int(value, name, error=StrategyError)


def check_probability(**settings: float | None) -> None:
    """Raise `StrategyError` for a setting that is neither None nor a number from 0 to 1."""
    for name, value in settings.items():
        if value is not None and not (isinstance(value, numbers.Real) and 0 <= value <= 1):
            msg = f"{name}={value!r:.60} must be a probability, a number from 0 to 1."
            raise StrategyError(msg)


def known_codes(history: History, pending: Sequence[Subnet]) -> set[bytes]:
    """Return the codes of the measured and the pending rows, which no strategy proposes again."""
    return history.codes | set(row_codes(history.space.indices(pending)))


def are_new(X: Indices, history: History, pending: Sequence[Subnet]) -> npt.NDArray[np.bool_]:
    """Return whether each canonical row of X is neither measured nor pending, (n,)."""
    codes = known_codes(history, pending)
    return np.array([code not in codes for code in row_codes(X)], dtype=bool)


def checked_proposals(
    strategy: Strategy,
    proposals: Any,
    problem: Problem,
    history: History,
    pending: Sequence[Subnet],
) -> list[Subnet]:
    """Return the proposals of a strategy, perhaps the user's own, that keep its contract.

    Args:
        strategy: The strategy, for the message.
        proposals: The return value of `propose`.
        problem: The problem of the search.
        history: The evaluations so far.
        pending: Subnets that are being measured.

    Raises:
        StrategyError: There is no proposal, or one is not a subnet of the space, or not new.
    """
    subnets = list(proposals) if isinstance(proposals, Iterable) else [proposals]
    if strange := [item for item in subnets if item not in problem.space]:
        msg = (
            f"{strategy!r} proposed {strange[0]!r:.80}, which is not a subnet of the space. "
            "A strategy returns a list of subnets: space.from_indices, space.subnet or "
            "strategies.fill make them."
        )
        raise StrategyError(msg)
    codes = set(row_codes(problem.space.indices(subnets)))
    before = known_codes(history, pending)
    if not codes or len(codes) < len(subnets) or before & codes:
        msg = (
            f"{strategy!r} proposed {len(subnets)} subnets, {len(codes - before)} of "
            "them new. A strategy returns one or more distinct subnets that are not in history "
            "or pending, or raises SpaceExhausted: strategies.fill does that for any "
            "source of proposals."
        )
        raise StrategyError(msg)
    return subnets


def fill(
    problem: Problem,
    history: History,
    pending: Sequence[Subnet],
    n: int,
    rng: np.random.Generator,
    draw: Draw,
) -> list[Subnet]:
    """Return up to n new subnets from a source of proposals, whatever that source repeats.

    Proposals are brought into canonical form, mapped into a pool where the space is one, and
    dropped if they were measured, are pending or came before. Those that break an exact constraint
    wait, and are taken, least violation first, only if feasible ones run out. After a bounded
    number of tries the rest is drawn uniformly from what is left.

    Args:
        problem: The problem of the search.
        history: The evaluations so far.
        pending: Subnets that are being measured.
        n: The most subnets to return.
        rng: The source of randomness.
        draw: Called as `draw(k, rng)`; returns about k proposals as value indices (k, n_choices).

    Raises:
        SpaceExhausted: Every subnet is measured or pending.

    Example:
        >>> from lightning_subnet import History, Objective, SearchSpace
        >>> problem = Problem(SearchSpace(depth=[2, 3, 4]), (Objective("error", "min"),))
        >>> rng, history = np.random.default_rng(0), History(problem.space)
        >>> fill(problem, history, [], 2, rng, lambda k, rng: np.array([[2], [2], [1]]))
        [Subnet(depth=4), Subnet(depth=3)]
    """
    space = problem.space
    codes = known_codes(history, pending)
    left = space.size - len(codes)
    if left < 1:
        msg = f"All {space.size} subnets of the space are measured or pending."
        raise SpaceExhausted(msg)
    n = min(n, left)
    feasible: list[Indices] = []
    spare: list[tuple[float, int, Indices]] = []

    def sort_in(X: Indices) -> None:
        X = space.nearest(space.canonical(X), codes)
        new = []
        for code, row in zip(row_codes(X), X, strict=True):
            if code not in codes:
                codes.add(code)
                new.append(row)
        if not new:
            return
        for violation, row in zip(problem.exact_violation(np.stack(new)), new, strict=True):
            if violation > 0:
                spare.append((float(violation), len(spare), row))
            else:
                feasible.append(row)

    traced = any(not problem.exact[c.name].vectorised for c in problem.exact_constraints)
    tries = _TRACED_TRIES if traced else _TRIES
    for _ in range(tries):
        if len(feasible) < n:
            sort_in(draw(n - len(feasible), rng))
    for attempt in range(tries):
        if len(feasible) < n and len(feasible) + len(spare) < left:
            # Enough draws to expect so many new ones, more each time: feasible ones may be rare.
            least = min((n - len(feasible)) << attempt, _MOST_ROWS)
            k = least * space.size // (space.size - len(codes)) + 1
            sort_in(space.sample_indices(min(space.size, k), rng))
    if len(feasible) + len(spare) < n:  # so many distinct draws hold enough new ones for certain
        sort_in(space.sample_indices(min(space.size, n + len(codes)), rng))
    rows = feasible + [row for _, _, row in sorted(spare)]
    return space.from_indices(np.stack(rows[:n]))


def uniform_draws(problem: Problem) -> Draw:
    """Return a source of subnets that are drawn uniformly from the problem's space."""
    return lambda k, rng: problem.space.sample_indices(min(k, problem.space.size), rng)
