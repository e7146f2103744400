# SPDX-License-Identifier: Apache-2.0
"""The subnets that an optimizer step trains: pure functions of the space, a seed and the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_subnet._checks import checked_int
from lightning_subnet._messages import did_you_mean
from lightning_subnet._types import Indices
from lightning_subnet.errors import ObjectiveError, SearchError
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure

Rule = Literal["random", "sandwich", "turns", "ranks"]
RULES = ("random", "sandwich", "turns", "ranks")
Draw = Callable[[int, int], list[Subnet]]  # (n, step) to at most n distinct subnets

_MOST = 20_000  # a space of so many is listed whole
_MOST_TO_TRACE = 256  # and of so many where each costs a traced forward pass
_TRIES = 8
_TILTS = (np.arange(33) + 0.5) / 33


def check_rule(rule: object, n_random: object) -> int:
    """Return the number of random subnets of a rule, 2 by default.

    Raises:
        SearchError: The rule is unknown, or the number is not one that it can have.

    Example:
        >>> check_rule("sandwich", None), check_rule("random", 4)
        (2, 4)
    """
    if rule not in RULES:
        msg = f"rule={rule!r} is unknown.{did_you_mean(rule, RULES)} It is one of {RULES}."
        raise SearchError(msg)
    if rule == "ranks" and n_random is not None:
        msg = (
            f"n_random={n_random!r} does not go with rule='ranks': every process trains one "
            "subnet, so the random ones are as many as there are processes, less two. Leave it out."
        )
        raise SearchError(msg)
    if n_random is None:
        return 2
    hint = "At least one random subnet per step is needed."
    return checked_int(n_random, "n_random", error=SearchError, hint=hint)


def uniform(space: SearchSpace, seed: int) -> Draw:
    """Return a function that draws a step's subnets uniformly from the distinct ones of a space.

    Example:
        >>> draw = uniform(SearchSpace(depth=[1, 2, 3], width=[8, 16]), seed=0)
        >>> draw(2, 7) == draw(2, 7), draw(2, 7) == draw(2, 8)
        (True, False)
    """

    def draw(n: int, step: int) -> list[Subnet]:
        return space.sample(min(n, space.size), np.random.default_rng([seed, step]))

    return draw


def step_subnets(
    rule: Rule,
    largest: Subnet,
    opened: SearchSpace | None,
    draw: Draw,
    *,
    step: int,
    n_random: int = 2,
    ranks: tuple[int, int] = (0, 1),
) -> list[Subnet]:
    """Return the subnets that one process trains in an optimizer step, the first first.

    Args:
        rule: See `SubnetSampling`.
        largest: The largest subnet of the whole space.
        opened: The part of it that is trained; None: the largest alone.
        draw: A function that draws from that part.
        step: The optimizer step.
        n_random: How many random ones; of `"turns"`, in how many steps for one with the smallest.
        ranks: The process, and how many there are.

    Example:
        >>> space = SearchSpace(depth=[1, 2, 3], width=[8, 16])
        >>> draw = uniform(space, seed=0)
        >>> step_subnets("sandwich", space.largest, space, draw, step=1, n_random=1)
        [Subnet(depth=3, width=16), Subnet(depth=1, width=8), Subnet(depth=2, width=16)]
        >>> step_subnets("ranks", space.largest, space, draw, step=0, ranks=(3, 4))
        [Subnet(depth=1, width=8)]
    """
    if opened is None:
        return [largest]
    if rule == "ranks":
        return [_of_rank(largest, opened, draw, step, *ranks)]
    if rule == "random":
        return draw(n_random, step)
    if rule == "turns":
        others = [_in_turn(opened, draw, step, n_random)]
    else:
        others = [opened.smallest, *draw(n_random, step)]
    return list(dict.fromkeys([largest, *others]))


def _in_turn(opened: SearchSpace, draw: Draw, step: int, n_random: int) -> Subnet:
    """Return the smallest in one step, and a random one in each of the next n_random steps."""
    turn, at = divmod(step, n_random + 1)
    if at == 0:
        return opened.smallest
    return draw(1, step - turn - 1)[0]  # no number of a draw is left out: strata count on it


def _of_rank(
    largest: Subnet, opened: SearchSpace, draw: Draw, step: int, rank: int, n_ranks: int
) -> Subnet:
    """Return the largest for the first process, the smallest for the last, random ones between.

    Of two processes the last trains the smallest and a random one in turn: else nothing between the
    ends would ever be trained.
    """
    if rank == 0:
        return largest
    if n_ranks == 2:  # noqa: PLR2004 - the two ends
        return _in_turn(opened, draw, step, 1)
    if rank == n_ranks - 1:
        return opened.smallest
    subnets = draw(n_ranks - 2, step)
    return subnets[(rank - 1) % len(subnets)]


class Strata:
    """Draws subnets from bands of equal width in an exact cost, from each band equally often.

    Uniform draws pile up around the middle: a sum over many choices is nearly normal. Here the
    bands come in an order of their own in every round, and n subnets of step t are from bands
    n * t, n * t + 1, ... of that sequence, so they are a function of (seed, t). Within a band, a
    space of at most 20,000 subnets is listed and drawn from uniformly. From a larger one a random
    path is drawn, on which every ordered choice grows from its first value to its last at a pace of
    its own, and from the path a subnet within the band.

    Args:
        space: The space of the training.
        measure: An exact cost.
        seed: The seed of the draws.
        n_bands: How many bands.

    Raises:
        ObjectiveError: The measure is noisy, or traces one subnet at a time and the space has more
            than 256.

    References:
        Wang et al., AttentiveNAS, CVPR 2021 (subnets drawn by a distribution of their FLOPs).

    Example:
        >>> space = SearchSpace({f"width.{i}": [1, 2, 3, 4] for i in range(12)})
        >>> macs = Measure("macs", lambda X: (X + 1).sum(1), exact=True, takes="indices")
        >>> strata = Strata(space, macs, seed=0, n_bands=3)
        >>> sorted(sum(s.values()) for s in strata.draw(3, step=0))  # thirds of 12 to 48
        [23, 30, 36]
    """

    def __init__(
        self, space: SearchSpace, measure: Measure, seed: int = 0, *, n_bands: int = 8
    ) -> None:
        if not measure.exact:
            msg = (
                f"Subnets cannot be stratified by {measure.name!r}, which is not exact: a band "
                "would be another at every call. Take 'macs' or 'params'."
            )
            raise ObjectiveError(msg)
        listed = space.size <= (_MOST if measure.vectorised else _MOST_TO_TRACE)
        listed = listed or (space.is_pool and measure.vectorised)
        if not listed and not measure.vectorised:
            msg = (
                f"{measure.name!r} of this network is counted one subnet at a time, too slow for "
                f"{space.size:.3g} subnets. Give a table: stratify=additive_measure(...), or a "
                "Measure(..., exact=True, takes='indices')."
            )
            raise ObjectiveError(msg)
        self.space, self.measure, self.seed, self.n_bands = space, measure, seed, n_bands
        self._rows: Indices | None = np.concatenate([*space.index_blocks()]) if listed else None
        ends = space.indices([space.smallest, space.largest]) if self._rows is None else self._rows
        self._costs = self.cost(ends)
        self.low, self.high = float(self._costs.min()), float(self._costs.max())
        self._values = [
            np.array([choice.values.index(value) for value in space.values[name]])
            for name, choice in space.choices.items()
        ]
        self._ordered = np.array([choice.ordered for choice in space.choices.values()])

    def cost(self, X: Indices) -> npt.NDArray[np.float64]:
        """Return the cost of index rows, (n,)."""
        return self.measure.evaluate(self.space, X)[0]

    def band(self, costs: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the band of each cost, 0 for the smallest."""
        width = (self.high - self.low) / self.n_bands or 1.0
        number = np.floor((np.asarray(costs, dtype=float) - self.low) / width)
        return np.clip(number, 0, self.n_bands - 1).astype(np.int64)

    def draw(self, n: int, step: int) -> list[Subnet]:
        """Return at most n distinct subnets of the next n bands."""
        rng = np.random.default_rng([self.seed, step])
        rows: dict[bytes, Indices] = {}
        for at in range(n * step, n * step + n):
            turn = np.random.default_rng([self.seed, at // self.n_bands, 1])
            band = int(turn.permutation(self.n_bands)[at % self.n_bands])
            X, costs = self._rows_and_costs(rng)
            new = np.array([code not in rows for code in row_codes(X)])
            X, costs = (X[new], costs[new]) if new.any() else (X, costs)
            inside = np.flatnonzero(self.band(costs) == band)
            if not len(inside):  # no subnet costs so much: those that come nearest
                middle = self.low + (band + 0.5) * (self.high - self.low) / self.n_bands
                distance = np.abs(costs - middle)
                inside = np.flatnonzero(distance == distance.min())
            row = X[rng.choice(inside)]
            rows.setdefault(row_codes(row[None])[0], row)
        return self.space.from_indices(np.stack([*rows.values()]))

    def _rows_and_costs(self, rng: np.random.Generator) -> tuple[Indices, npt.NDArray[np.float64]]:
        """Return rows to choose from, and their costs: all, or those of some random paths."""
        if self._rows is not None:
            return self._rows, self._costs
        pace = rng.random((_TRIES, 1, len(self._values)))
        power = ((1 - _TILTS) / _TILTS)[:, None]  # from almost 0 everywhere to almost 1
        share = np.where(self._ordered, pace**power, pace).reshape(-1, len(self._values))
        X = np.stack(
            [
                values[np.minimum((share[:, j] * len(values)).astype(np.int64), len(values) - 1)]
                for j, values in enumerate(self._values)
            ],
            axis=1,
        )
        X = self.space.canonical(X)
        return X, self.cost(X)
