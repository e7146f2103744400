# SPDX-License-Identifier: Apache-2.0
"""Budget: when a search stops."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from lightning_subnet.errors import SearchError


@dataclass(frozen=True, slots=True)
class Budget:
    """When a search stops: after so many evaluations, so many seconds of measuring, or either.

    Args:
        evaluations: Evaluations that the search asked for; failed and reused ones count.
        seconds: Seconds spent in measurements, over all runs of the study.

    Raises:
        SearchError: Neither is given, or one is not positive.
    """

    evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [limit for limit in (self.evaluations, self.seconds) if limit is not None]
        whole = self.evaluations is None or isinstance(self.evaluations, numbers.Integral)
        usable = all(
            isinstance(v, numbers.Real) and not isinstance(v, bool) and v > 0 for v in given
        )
        if not (given and whole and usable):
            msg = (
                f"A budget of evaluations={self.evaluations!r}, seconds={self.seconds!r} buys "
                "nothing. Give a positive whole number of evaluations (budget=250), "
                "Budget(seconds=3600), or both."
            )
            raise SearchError(msg)

    @classmethod
    def of(cls, budget: Budget | int) -> Budget:
        """Return the budget that `budget=` describes."""
        return budget if isinstance(budget, cls) else cls(evaluations=budget)  # type: ignore[arg-type] # checked there
