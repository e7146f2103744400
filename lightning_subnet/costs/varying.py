# SPDX-License-Identifier: Apache-2.0
"""Costs that are the same for every subnet, and so tell none from another."""

from __future__ import annotations

import numpy as np

from lightning_subnet._messages import warn
from lightning_subnet.errors import CostWarning
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure
from lightning_subnet.study.problem import Problem

_DRAWN = 4  # subnets that are compared where both ends of the space have one value
_OF_WEIGHTS = ("params", "size_mb")


def check_varies(problem: Problem) -> None:
    """Warn of each exact measure that has one value for all subnets that are looked at.

    These are the smallest and the largest, and where they do not differ a few random ones, so that
    the cost of it is mostly that of one subnet. A measure that fails is left for the search.

    Args:
        problem: Its objectives and constraints say which measures matter.

    Warns:
        CostWarning: One of them is the same for all of these subnets.

    Example:
        >>> import warnings
        >>> from lightning_subnet.study.measures import Measure
        >>> from lightning_subnet.study.objectives import Objective
        >>> one = Measure("one", lambda subnets: [1.0 for _ in subnets], exact=True)
        >>> space = SearchSpace(depth=[1, 2], width=[8, 16])
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     check_varies(Problem.of(space, (Objective("one", "min"),), (), [one]))
        >>> str(caught[0].message)[:48]
        "All 4 subnets that were compared have the same '"
    """
    space = problem.space
    ends = [space.smallest, space.largest]
    others = [s for s in space.sample(min(_DRAWN, space.size), rng=0) if s not in ends]
    for name in problem.names:
        measure = problem.exact.get(name)
        if measure is None:
            continue
        value = _common(measure, space, ends)
        if value is not None and others:
            value = _common(measure, space, [ends[0], *others])
        if value is None:
            continue
        n = len(ends) + len(others)
        who = f"All {n} subnets that were compared" if others else "Both subnets of the space"
        warn(
            f"{who} have the same {name!r} ({value:g}), so as an objective or a constraint it "
            f"tells none from another. {_advice(name)}",
            CostWarning,
        )


def _common(measure: Measure, space: SearchSpace, subnets: list[Subnet]) -> float | None:
    """Return the value that subnets have in common, or None."""
    try:
        values = measure.evaluate(space, space.indices(subnets))[0]
    except Exception:  # which the search reports where it meets it
        return None
    return float(values[0]) if np.isfinite(values).all() and np.ptp(values) == 0 else None


def _advice(name: str) -> str:
    if name in _OF_WEIGHTS:
        return (
            "Of a network that cannot be sliced, extract() gives a frozen copy that keeps all "
            "weights; its attribute `sliced` is False then. Give the network a method "
            f"extract(subnet) that returns the subnet alone, or leave {name!r} out; 'macs' tells "
            "such subnets apart."
        )
    return "Look whether activate() does what the space says (check_elastic), or leave it out."
