# SPDX-License-Identifier: Apache-2.0
"""The best of what a search measured under further bounds, or an error that names the nearest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.errors import NoFeasibleSubnet, ObjectiveError
from lightning_subnet.study import pareto
from lightning_subnet.study.history import Evaluation
from lightning_subnet.study.objectives import Constraint, violation
from lightning_subnet.study.problem import Searched


def best_of(found: Searched, name: str, bounds: Sequence[Constraint]) -> Evaluation:
    """Return the best feasible evaluation by one measure; see `SearchResult.best`.

    Args:
        found: What was searched and measured.
        name: An objective, or any recorded measure.
        bounds: Further bounds.
    """
    problem, final = found.problem, found.final
    recorded = dict.fromkeys([*problem.names, *(key for e in final for key in e.values)])
    for key in [name, *(c.name for c in bounds)]:
        if key not in recorded and len(final):
            msg = (
                f"{key!r} was not recorded.{did_you_mean(key, recorded)} "
                f"Recorded: {listed(recorded)}."
            )
            raise ObjectiveError(msg)
    upwards = any(o.name == name and o.direction == "max" for o in problem.objectives)
    extra = [_absolute(found, c) for c in bounds]
    columns = {c.name: final.column(c.name) for c in extra}
    F, missed = problem.scores(final) if len(final) else (np.zeros((0, 1)), np.zeros(0))
    infeasible = missed > 0
    missed = missed + violation(extra, columns, len(final))
    values = (-1.0 if upwards else 1.0) * final.column(name)
    usable = (missed <= 0) & np.isfinite(values)
    if not usable.any():
        nearest = None
        if np.isfinite(missed).any():
            nearest = final[int(np.argmin(np.where(np.isfinite(missed), missed, np.inf)))]
        raise nothing(found, " and ".join(map(str, (*problem.constraints, *bounds))), nearest)
    equal = np.flatnonzero(usable & (values == values[usable].min()))
    F = np.where(infeasible[:, None], np.nan, F)[equal]  # of equals, one that no other dominates
    return final[int(equal[np.argmax(pareto.nondominated(F))])]


def nothing(found: Searched, asked: str, nearest: Evaluation | None) -> NoFeasibleSubnet:
    """Return the error of a search in which nothing is what was asked."""
    failures = [e.reason for e in found.final if not e.ok]
    if nearest is not None:
        near = f"The nearest: {nearest}."
    elif failures:
        near = f"All {len(failures)} evaluations failed, the last with: {failures[-1]}."
    else:
        near = "Nothing was measured yet."
    msg = f"None of {len(found.final)} evaluations is {asked or 'successful'}. {near}"
    return NoFeasibleSubnet(msg, nearest)


def _absolute(found: Searched, constraint: Constraint) -> Constraint:
    if not constraint.relative:
        return constraint
    largest = found.final.get(found.final.space.largest)
    known = np.nan if largest is None else largest.values.get(constraint.name, np.nan)
    return constraint.absolute(known)
