# SPDX-License-Identifier: Apache-2.0
"""SearchRecord: the measurements of a search, its front and its best; data and NumPy only."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._types import Floats
from lightning_subnet.errors import NoFeasibleSubnet, ObjectiveError, SubnetError
from lightning_subnet.study import pareto
from lightning_subnet.study.history import Evaluation, History, Verified, with_verified
from lightning_subnet.study.measures import Measure
from lightning_subnet.study.objectives import (
    Constraint,
    Objective,
    minimised,
    parse_constraints,
    violation,
)
from lightning_subnet.study.problem import Problem


class SearchRecord:
    """The measurements of a search, with all that follows from them alone.

    `SearchResult` adds the network, tables, pictures and files; what makes those takes a record.

    Args:
        problem: Space, objectives and constraints of the search.
        history: Its evaluations, in order.
        name: The study's name.
        verified: Second (value, standard error) of noisy measures, by name, by key of the subnet.
            They decide the front, beside the first ones in `history`.
        measures: By name of a measure its `unit` and, where it is noisy, its `conditions`.

    Attributes:
        final: The history with second values in place of the first; what the front is made of.

    Example:
        >>> from lightning_subnet import Evaluation, History, Objective, SearchSpace
        >>> space = SearchSpace(depth=[1, 2, 3])
        >>> problem = Problem(space, (Objective("error", "min"), Objective("cost", "min")))
        >>> values = [(0.3, 1), (0.2, 2), (0.2, 3)]
        >>> history = History(space, [
        ...     Evaluation(i, space.subnet(depth=i + 1), {"error": error, "cost": cost})
        ...     for i, (error, cost) in enumerate(values)])
        >>> record = SearchRecord(problem, history)
        >>> [e.number for e in record.front], record.best("error").subnet
        ([1, 0], Subnet(depth=2))
    """

    def __init__(
        self,
        problem: Problem,
        history: History,
        *,
        name: str = "",
        verified: Verified | None = None,
        measures: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.problem = problem
        self.history = history
        self.name = name
        self.verified = dict(verified or {})
        self.measures = {key: dict(facts) for key, facts in (measures or {}).items()}
        self.final = with_verified(history, self.verified) if self.verified else history

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The measures that were optimised, with their directions."""
        return self.problem.objectives

    @property
    def front(self) -> History:
        """The non-dominated, feasible evaluations, ordered by the first objective, best first."""
        return History(self.history.space, self.problem.front(self.final))

    @property
    def knee(self) -> Evaluation:
        """The evaluation of the front where giving up one objective stops to buy much of another.

        Raises:
            NoFeasibleSubnet: The front is empty.
        """
        front = self.front
        if not len(front):
            raise self._no_subnet("feasible", None)
        columns = {o.name: front.column(o.name) for o in self.objectives}
        return front[pareto.knee(minimised(self.objectives, columns))]

    def best(
        self, name: str, *, where: Mapping[str, str | Sequence[str]] | None = None
    ) -> Evaluation:
        """Return the best feasible evaluation by one measure.

        Args:
            name: An objective, or any recorded measure (then the smallest is the best).
            where: Further bounds, as in `constraints=`: `{"latency_ms": "<= 12"}`.

        Returns:
            The evaluation; of several equally good ones the first that no other dominates.

        Raises:
            NoFeasibleSubnet: Nothing satisfies the bounds; the error names the nearest.
            ObjectiveError: A measure that was not recorded.
        """
        problem, final, bounds = self.problem, self.final, parse_constraints(where)
        if len(final):
            check_recorded([name, *(c.name for c in bounds)], self.names_of(final))
        upwards = any(o.name == name and o.direction == "max" for o in problem.objectives)
        absolute = [self._absolute(c) for c in bounds]
        columns = {c.name: final.column(c.name) for c in absolute}
        F, missed = problem.scores(final) if len(final) else (np.zeros((0, 1)), np.zeros(0))
        infeasible = missed > 0
        missed = missed + violation(absolute, columns, len(final))
        values = (-1.0 if upwards else 1.0) * final.column(name)
        usable = (missed <= 0) & np.isfinite(values)
        if not usable.any():
            nearest = None
            if np.isfinite(missed).any():
                nearest = final[int(np.argmin(np.where(np.isfinite(missed), missed, np.inf)))]
            raise self._no_subnet(" and ".join(map(str, (*problem.constraints, *bounds))), nearest)
        equal = np.flatnonzero(usable & (values == values[usable].min()))
        F = np.where(infeasible[:, None], np.nan, F)[equal]
        return final[int(equal[np.argmax(pareto.nondominated(F))])]

    def minimised(self) -> Floats:
        """Return all objectives, to be minimised, (n, m); NaN if infeasible or failed."""
        if not len(self.final):
            return np.zeros((0, len(self.objectives)))
        F, missed = self.problem.scores(self.final)
        return np.where((missed > 0)[:, None], np.nan, F)

    def hypervolume(self, reference: Mapping[str, float]) -> float:
        """Return the hypervolume of the front.

        Args:
            reference: A value of each objective that is worse than all that should count.

        Raises:
            ObjectiveError: An objective is missing from the reference.
        """
        if missing := [o.name for o in self.objectives if o.name not in reference]:
            msg = (
                f"The reference has no {missing[0]!r}. "
                f"Give a value for each of {listed(o.name for o in self.objectives)}."
            )
            raise ObjectiveError(msg)
        columns = {o.name: np.array([float(reference[o.name])]) for o in self.objectives}
        return pareto.hypervolume(self.minimised(), minimised(self.objectives, columns)[0])

    def names_of(self, evaluations: Iterable[Evaluation]) -> list[str]:
        """Return the names of objectives, constraints and other values of evaluations, in order."""
        return list(
            dict.fromkeys([*self.problem.names, *(k for e in evaluations for k in e.values)])
        )

    def _no_subnet(self, bounds: str, nearest: Evaluation | None) -> NoFeasibleSubnet:
        """Return the error of a search in which no evaluation satisfies the bounds."""
        failures = [e.reason for e in self.final if not e.ok]
        if nearest is not None:
            near = f"The nearest: {nearest}."
        elif failures:
            near = f"All {len(failures)} evaluations failed, the last with: {failures[-1]}."
        else:
            near = "Nothing was measured yet."
        msg = f"None of {len(self.final)} evaluations is {bounds or 'successful'}. {near}"
        return NoFeasibleSubnet(msg, nearest)

    def _absolute(self, constraint: Constraint) -> Constraint:
        if not constraint.relative:
            return constraint
        largest = self.final.get(self.final.space.largest)
        reference = np.nan if largest is None else largest.values.get(constraint.name, np.nan)
        return constraint.absolute(reference)

    def __repr__(self) -> str:
        kind, n = type(self).__name__, len(self.history)
        if self.problem.needs_reference:  # the front may not be known
            return f"<{kind} {self.name!r}: {n} evaluations>"
        return f"<{kind} {self.name!r}: {n} evaluations, {len(self.front)} on the front>"


def check_recorded(
    names: Iterable[str], recorded: Collection[str], *, error: type[SubnetError] = ObjectiveError
) -> None:
    """Raise an error if a measure was not recorded; it names the nearest and those that were.

    Args:
        names: The measures that are asked for.
        recorded: The names of all that were recorded.
        error: The class that is raised.

    Raises:
        SubnetError: Of the class `error`.

    Example:
        >>> check_recorded(["mss"], ["acc", "ms"])
        Traceback (most recent call last):
        lightning_subnet.errors.ObjectiveError: 'mss' was not recorded. Did you mean 'ms'? \
Recorded: 'acc', 'ms'.
    """
    for name in names:
        if name not in recorded:
            msg = f"{name!r} was not recorded.{did_you_mean(name, recorded)} "
            raise error(msg + f"Recorded: {listed(recorded)}.")


def unit_and_conditions(measure: Measure) -> dict[str, str]:
    """Return the unit of a measure and, without its hash, what a noisy one depends on."""
    text = re.sub(r", [0-9a-f]{12,}$", "", measure.fingerprint or "")
    conditions = "" if measure.exact else text.removeprefix(f"{measure.name}: ")
    return {"unit": measure.unit} | ({"conditions": conditions} if conditions else {})
