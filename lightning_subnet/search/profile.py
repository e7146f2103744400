# SPDX-License-Identifier: Apache-2.0
"""Profile: feasibility by exact measures, before any budget is spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_subnet._types import Indices
from lightning_subnet.errors import SearchError
from lightning_subnet.space.members import distinct_rows
from lightning_subnet.space.minimise import least_rows
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.problem import Problem

_ENUMERATED = 100_000  # subnets of a space that is examined whole
_SAMPLED = 20_000  # subnets of a larger one
_TRACED = 100  # of either, where an exact measure takes milliseconds a subnet
_STEPS = 200
_STARTS = 64  # subnets from which a search for the least violation begins


@dataclass(frozen=True, slots=True)
class Range:
    """Values of an exact measure over a space: least, median, greatest, the largest subnet's."""

    least: float
    median: float
    greatest: float
    largest: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Feasibility by exact measures.

    Args:
        size: The number of subnets in the space.
        ranges: By exact measure, over the examined subnets.
        constraints: The exact constraints, with absolute bounds, as texts.
        unchecked: Constraints on other measures, which only a measurement can check.
        examined: The number of subnets whose exact measures were computed.
        complete: Whether those are all.
        feasible: The share of them that satisfies the exact constraints.
        nearest: A feasible subnet, or the one that violates the constraints least.
        nearest_values: Its exact measures.
        satisfiable: Whether there is a feasible subnet among them.
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
        """Return the profile of a problem: of a small space whole, else by sample and search.

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
        violations = problem.exact_violation(X)
        best = X[int(np.argmin(violations))]
        if violations.min() > 0 and not complete and traced:
            best = _descend(problem, best)
        elif violations.min() > 0 and not complete:
            near = X[np.argsort(violations, kind="stable")[:_STARTS]]
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
            feasible=float((violations <= 0).mean()),
            nearest=space.from_indices(best[None])[0],
            nearest_values=values,
            satisfiable=bool(problem.exact_violation(best[None])[0] <= 0),
        )

    def __str__(self) -> str:
        part = (
            "all of them"
            if self.complete
            else f"{self.examined:,} of them, and a search from the best"
        )
        lines = [f"{self.size:,} subnets; examined {part}."]
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
            lines.append(f"  No feasible subnet was found. The nearest: {self._nearest_text()}")
        if self.unchecked:
            lines.append(f"  Only a measurement can tell: {', '.join(self.unchecked)}")
        return "\n".join(lines)

    def _nearest_text(self) -> str:
        values = ", ".join(f"{name} = {value:.6g}" for name, value in self.nearest_values.items())
        return f"{values} at {self.nearest}"

    def check(self) -> None:
        """Raise `SearchError` if no subnet of the space satisfies the exact constraints.

        Only a space that was examined as a whole can be refused; a larger one is searched.
        """
        if self.satisfiable or not self.complete:
            return
        msg = (
            f"None of the {self.size:,} subnets satisfies {' and '.join(self.constraints)}. "
            f"The nearest: {self._nearest_text()}. Loosen the constraint."
        )
        raise SearchError(msg)


def _descend(problem: Problem, row: Indices) -> Indices:
    """Return the row that is reached by going to the best neighbour while that is better."""
    space = problem.space
    violation = problem.exact_violation(row[None])[0]
    for _ in range(_STEPS):
        near = space.indices(space.neighbours(space.from_indices(row[None])[0]))
        if not len(near) or violation <= 0:
            break
        violations = problem.exact_violation(near)
        best = int(np.argmin(violations))
        if violations[best] >= violation:
            break
        row, violation = near[best], violations[best]
    return row
