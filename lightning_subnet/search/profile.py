# SPDX-License-Identifier: Apache-2.0
"""Profile: what the exact measures of a space allow, before any budget is spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_subnet._types import Indices
from lightning_subnet.errors import SearchError
from lightning_subnet.space.members import distinct_rows, row_codes
from lightning_subnet.space.minimise import least_rows
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.problem import Problem

_ENUMERATED = 100_000
_SAMPLED = 20_000
_TRACED = 100  # where an exact measure takes milliseconds a subnet
_STEPS = 200
_STARTS = 64  # of which a search for the least violation begins


@dataclass(frozen=True, slots=True)
class Range:
    """What an exact measure is over a space: least, median, greatest, and the largest subnet's."""

    least: float
    median: float
    greatest: float
    largest: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Feasibility by exact measures.

    Args:
        size: The number of subnets in the space.
        ranges: By exact measure, over the looked-at subnets.
        constraints: The exact constraints, with absolute bounds, as texts.
        unchecked: Constraints on measures that only a measurement can tell.
        examined: How many subnets were looked at.
        complete: Whether those are all.
        feasible: The share of them that satisfies the exact constraints.
        nearest: A feasible subnet, or the one that violates the constraints least.
        nearest_values: Its exact measures.
        satisfiable: Whether any feasible subnet was found.
    """

    size: int
    ranges: Mapping[str, Range]
    constraints: tuple[str, ...]
    unchecked: tuple[str, ...]
    examined: int
    complete: bool
    feasible: float
    nearest: Subnet
    nearest_values: Mapping[str, float]
    satisfiable: bool

    @classmethod
    def of(cls, problem: Problem, *, seed: int = 0) -> Profile:
        """Return the profile of a problem: small spaces whole, others by sampling and searching.

        Example:
            >>> from lightning_subnet import SearchSpace, SubnetSearch, measure
            >>> @measure("cost", exact=True)
            ... def cost(subnets):
            ...     return [s["depth"] * s["width"] for s in subnets]
            >>> search = SubnetSearch(space=SearchSpace(depth=[1, 2], width=[8, 16]),
            ...                       measures=[cost], objectives={"error": "min"},
            ...                       constraints={"cost": "<= 4"}, storage=None)
            >>> profile = search.profile()
            >>> profile.satisfiable, profile.nearest_values
            (False, {'cost': 8.0})
        """
        space = problem.space
        traced = not all(measure.vectorised for measure in problem.exact.values())
        rng = np.random.default_rng(seed)
        ends = space.indices([space.smallest, space.largest])
        limit = _TRACED if traced else _SAMPLED
        complete = space.size <= (_TRACED if traced else _ENUMERATED)
        if complete:
            X = np.concatenate(list(space.index_blocks()))
        else:
            X = np.concatenate([ends, space.sample_indices(limit, rng)])
            X = X[distinct_rows(X)]
        columns = {name: problem.exact_values(name, X) for name in problem.exact}
        at_largest = {name: problem.exact_values(name, ends)[1] for name in problem.exact}
        missed = problem.exact_violation(X)
        best = X[int(np.argmin(missed))]
        if missed.min() > 0 and not complete and traced:
            best = _descend(problem, best)
        elif missed.min() > 0 and not complete:
            near = X[np.argsort(missed, kind="stable")[:_STARTS]]
            best = least_rows(space, problem.exact_violation, rng=rng, start=near)[0]
        values = {name: float(problem.exact_values(name, best[None])[0]) for name in problem.exact}
        return cls(
            size=space.size,
            ranges={
                name: Range(
                    float(np.nanmin(column)),
                    float(np.nanmedian(column)),
                    float(np.nanmax(column)),
                    float(at_largest[name]),
                )
                for name, column in columns.items()
            },
            constraints=tuple(str(c) for c in problem.exact_constraints),
            unchecked=tuple(str(c) for c in problem.constraints if c.name not in problem.exact),
            examined=len(X),
            complete=complete,
            feasible=float((missed <= 0).mean()),
            nearest=space.from_indices(best[None])[0],
            nearest_values=values,
            satisfiable=bool(problem.exact_violation(best[None])[0] <= 0),
        )

    def __str__(self) -> str:
        looked = (
            "all of them"
            if self.complete
            else f"{self.examined:,} of them, and a search from the best"
        )
        lines = [f"{self.size:,} subnets; looked at {looked}."]
        lines += [
            f"  {name}: {r.least:.4g} to {r.greatest:.4g}, median {r.median:.4g}, "
            f"largest subnet {r.largest:.4g}"
            for name, r in self.ranges.items()
        ]
        if self.constraints:
            lines.append(
                f"  {' and '.join(self.constraints)}: {self.feasible:.1%} of these are feasible"
            )
        if self.constraints and not self.satisfiable:
            reached = ", ".join(f"{k} = {v:.6g}" for k, v in self.nearest_values.items())
            lines.append(
                f"  No feasible subnet was found. The nearest: {reached} at {self.nearest}"
            )
        if self.unchecked:
            lines.append(f"  Only a measurement can tell: {', '.join(self.unchecked)}")
        return "\n".join(lines)


def check_feasible(problem: Problem, *, seed: int = 0) -> None:
    """Raise `SearchError` if the exact constraints leave nothing of a space.

    Only a space that was looked at as a whole can be refused; a larger one is searched.
    """
    if not problem.exact_constraints:
        return
    profile = Profile.of(problem, seed=seed)
    if profile.satisfiable or not profile.complete:
        return
    reached = ", ".join(f"{k} = {v:.6g}" for k, v in profile.nearest_values.items())
    msg = (
        f"None of the {profile.size:,} subnets satisfies {' and '.join(profile.constraints)}. "
        f"The nearest: {reached} at {profile.nearest}. Loosen the constraint."
    )
    raise SearchError(msg)


def _descend(problem: Problem, row: Indices) -> Indices:
    """Walk to the neighbour of least violation until none is better."""
    space = problem.space
    missed = problem.exact_violation(row[None])[0]
    seen = set(row_codes(row[None]))
    for _ in range(_STEPS):
        steps = space.indices(space.neighbours(space.from_indices(row[None])[0]))
        if not len(steps) or missed <= 0:
            break
        there = problem.exact_violation(steps)
        best = int(np.argmin(there))
        if there[best] >= missed or row_codes(steps[best][None])[0] in seen:
            break
        row, missed = steps[best], there[best]
    return row
