# SPDX-License-Identifier: Apache-2.0
"""Budget: when a search stops."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from lightning_subnet._checks import checked_int
from lightning_subnet.errors import SearchError

_HINT = "Give a number of evaluations (budget=250), Budget(seconds=3600), or both."


@dataclass(frozen=True, slots=True)
class Budget:
    """The end of a search: after so many evaluations, so many seconds of measuring, or either.

    Args:
        evaluations: Evaluations that the search asked for; failed and reused ones count.
        seconds: Seconds spent in measurements, over all runs of the study.

    Raises:
        SearchError: Both are None, or one is not positive.

    Example:
        >>> Budget(evaluations=250)
        Budget(evaluations=250, seconds=None)
    """

    evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.evaluations is not None:
            n = checked_int(self.evaluations, "evaluations", error=SearchError, hint=_HINT)
            object.__setattr__(self, "evaluations", n)
        seconds = self.seconds
        if seconds is None:
            usable = self.evaluations is not None
        else:
            usable = isinstance(seconds, Real) and not isinstance(seconds, bool) and seconds > 0
        if not usable:
            msg = (
                f"A budget of evaluations={self.evaluations!r}, seconds={seconds!r} buys nothing. "
                f"{_HINT}"
            )
            raise SearchError(msg)

    @classmethod
    def of(cls, budget: Budget | int) -> Budget:
        """Return the budget that `budget=` describes."""
        return budget if isinstance(budget, cls) else cls(evaluations=budget)  # type: ignore[arg-type] # checked there
