# SPDX-License-Identifier: Apache-2.0
"""Problem: space, objectives and constraints, and a history's scores and front under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Indices
from lightning_subnet.errors import (
    InvalidSubnetError,
    MeasurementError,
    ObjectiveError,
    SearchError,
)
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study import pareto
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.measures import Measure, by_name
from lightning_subnet.study.objectives import (
    Constraint,
    Objective,
    check_consistent,
    minimised,
    violation,
)


@dataclass(frozen=True, eq=False)
class Problem:
    """Space, objectives, constraints and exact measures of a search.

    Args:
        space: What may vary.
        objectives: One or more.
        constraints: Bounds that must hold; relative ones refer to the largest subnet.
        exact: Measures that are free of noise and cost, by name.

    Example:
        >>> space = SearchSpace(depth=[1, 2, 3])
        >>> problem = Problem(space, (Objective("error", "min"), Objective("macs", "min")))
        >>> history = History(space)
        >>> for i, (subnet, error) in enumerate(zip(space, [0.3, 0.1, 0.4])):
        ...     history.add(Evaluation(i, subnet, {"error": error, "macs": 10 * subnet["depth"]}))
        >>> [evaluation.number for evaluation in problem.front(history)]
        [1, 0]
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()
    exact: Mapping[str, Measure] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        space: SearchSpace,
        objectives: tuple[Objective, ...],
        constraints: tuple[Constraint, ...],
        measures: Sequence[Measure],
    ) -> Problem:
        """Return the problem of a search that computes these measures, exact or not.

        Raises:
            ObjectiveError: Two things have one name, or exact constraints contradict each other.
        """
        named = by_name(measures)
        exact = {name: measure for name, measure in named.items() if measure.exact}
        if twice := [n for n in (*named, *(o.name for o in objectives)) if n in space.choices]:
            msg = f"{twice[0]!r} is a choice of the space and a measure. Rename one of them."
            raise ObjectiveError(msg)
        problem = cls(space, objectives, constraints, exact)
        _ = problem.exact_constraints  # contradictions between relative and absolute bounds
        return problem

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All measures of objectives and constraints."""
        return tuple(
            dict.fromkeys([o.name for o in self.objectives] + [c.name for c in self.constraints])
        )

    @cached_property
    def needs_reference(self) -> tuple[str, ...]:
        """Measures with a relative bound whose reference is measured on the largest subnet."""
        return tuple(
            {c.name: None for c in self.constraints if c.relative and c.name not in self.exact}
        )

    @cached_property
    def exact_constraints(self) -> tuple[Constraint, ...]:
        """The constraints that can be checked without a measurement, with absolute bounds."""
        largest = self.space.indices([self.space.largest])
        bounds = tuple(
            c.absolute(
                float(self.exact[c.name].evaluate(self.space, largest)[0][0]) if c.relative else 0.0
            )
            for c in self.constraints
            if c.name in self.exact
        )
        check_consistent(bounds)
        return bounds

    def bounds(self, history: History) -> tuple[Constraint, ...]:
        """Return all constraints with absolute bounds.

        Raises:
            ObjectiveError: A relative bound refers to the largest subnet, which is not measured.
        """
        if not self.needs_reference:
            others = tuple(c for c in self.constraints if c.name not in self.exact)
            return self.exact_constraints + others
        largest = history.get(self.space.largest)
        if largest is None or any(name not in largest.values for name in self.needs_reference):
            if largest is not None:
                msg = (
                    f"The bound on {self.needs_reference[0]!r} is relative to the largest subnet, "
                    f"which failed ({largest.reason}). Give an absolute bound under another name=."
                )
                raise ObjectiveError(msg)
            msg = (
                f"The bound on {self.needs_reference[0]!r} is relative to the largest subnet, "
                "which has no successful evaluation yet. Measure and tell space.largest first, "
                "or give an absolute bound."
            )
            raise ObjectiveError(msg)
        rest = (c for c in self.constraints if c.name not in self.exact)
        bounds = self.exact_constraints + tuple(
            c.absolute(largest.values.get(c.name, 0.0)) for c in rest
        )
        check_consistent(bounds)
        return bounds

    def exact_violation(self, X: Indices) -> npt.NDArray[np.float64]:
        """Return the violation of the exact constraints of index rows, (n,); 0 is feasible."""
        names = {c.name for c in self.exact_constraints}
        columns = {name: self.exact_values(name, X) for name in sorted(names)}
        return violation(self.exact_constraints, columns, len(X))

    def exact_values(self, name: str, X: Indices) -> npt.NDArray[np.float64]:
        """Return an exact measure of index rows, NaN where it fails for a subnet alone."""
        measure = self.exact[name]
        try:
            return measure.evaluate(self.space, X)[0]
        except (ObjectiveError, MeasurementError):
            raise
        except Exception:
            values = np.full(len(X), np.nan)
            for i in range(len(X)):
                with suppress(Exception):
                    values[i] = measure.evaluate(self.space, X[i : i + 1])[0][0]
            if np.isnan(values).all():
                raise  # it is the measure that is broken
            return values

    def scores(self, history: History) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return objectives to be minimised (n, m) and violations (n,) of the evaluations.

        Failed evaluations have NaN objectives and infinite violation.
        """
        columns = {name: history.column(name) for name in self.names}
        F = minimised(self.objectives, columns)
        violations = violation(self.bounds(history), columns, len(history))
        return F, np.where(np.isnan(F).any(axis=1), np.inf, violations)

    def feasible(self, history: History) -> npt.NDArray[np.bool_]:
        """Return a mask (n,) of the evaluations that succeeded and satisfy every constraint."""
        return np.asarray(self.scores(history)[1] <= 0)

    def front(self, history: History) -> list[Evaluation]:
        """Return the non-dominated feasible evaluations, ordered by the first objective.

        Exact ties all stay; ties of the first objective keep the order of measurement.
        """
        if not len(history):
            return []
        F, violations = self.scores(history)
        F = np.where((violations > 0)[:, None], np.nan, F)
        rows = np.flatnonzero(pareto.nondominated(F))
        return [history[int(i)] for i in rows[np.argsort(F[rows, 0], kind="stable")]]


def check_part(space: SearchSpace, whole: SearchSpace, measures: Sequence[Measure] = ()) -> None:
    """Raise `SearchError` if a space is not a part of the model's.

    Args:
        space: The space to search.
        whole: The model's.
        measures: Measures to compute. Those of value indices need a part in the model's indices.
    """
    try:
        for end in (space.smallest, space.largest):
            whole.subnet(end.active)
    except InvalidSubnetError as error:
        msg = (
            f"space= does not fit the model's own space: {error}\n"
            "Leave space= out, or give a part: model.search_space().restricted_to(...)."
        )
        raise SearchError(msg) from error
    other = space.choices != whole.choices or space.names != whole.names
    if other and (by_index := [m.name for m in measures if m.vectorised]):
        msg = (
            f"space= has other choices than the model's own, and {by_index[0]!r} would read its "
            "value indices as the model's.\nNarrow the model's space instead: "
            "model.search_space().narrowed_to({'depth': [2, 3]}), say."
        )
        raise SearchError(msg)
