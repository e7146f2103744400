# SPDX-License-Identifier: Apache-2.0
"""The order of evaluated rows: by constraint violation, front and crowding, as NSGA-II has it."""

from __future__ import annotations

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.study import pareto


def best_first(F: Floats, violations: Floats) -> Indices:
    """Return the order of rows by violation, then by front, then by crowding distance; (n,).

    Args:
        F: Objectives to be minimised (n, m).
        violations: Sums of violations (n,), 0 where feasible.

    References:
        Deb et al., NSGA-II, IEEE TEC 6(2), 2002, section III-B.

    Example:
        >>> F = np.array([[3.0, 3.0], [1.0, 2.0], [0.0, 0.0], [2.0, 1.0]])
        >>> best_first(F, np.array([0.0, 0.0, 9.0, 0.0])).tolist()
        [1, 3, 0, 2]
    """
    ranks, violations = front_ranks(F, violations)
    if F.shape[1] == 1:
        return np.lexsort((F[:, 0], violations))
    from lightning_subnet.strategies._toolkit._pymoo import crowding

    room = np.zeros(len(F))
    feasible = violations <= 0
    for rank in np.unique(ranks[feasible]):
        at = np.flatnonzero(feasible & (ranks == rank))
        room[at] = crowding(F[at])
    return np.lexsort((-room, ranks, violations))


def front_ranks(F: Floats, violations: Floats) -> tuple[Indices, Floats]:
    """Return the number of each feasible row's front, and violations, infinite where F has a NaN.

    Args:
        F: Objectives to be minimised (n, m).
        violations: Sums of violations (n,), 0 where feasible.

    Returns:
        Numbers from 0 (n,), 0 also where a row is not feasible; violations (n,).

    Example:
        >>> F = np.array([[3.0, 3.0], [1.0, 2.0], [np.nan, 0.0]])
        >>> front_ranks(F, np.zeros(3))
        (array([1, 0, 0]), array([ 0.,  0., inf]))
    """
    violations = np.where(np.isnan(F).any(axis=1), np.inf, violations)
    ranks = np.zeros(len(F), dtype=np.int64)
    if (feasible := violations <= 0).any():
        ranks[feasible] = pareto.nondominated_ranks(F[feasible])
    return ranks, violations
