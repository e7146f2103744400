# SPDX-License-Identifier: Apache-2.0
"""Progress of a search: a rich bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from lightning_subnet.history import Evaluation
from lightning_subnet.session import Session

_LINES = 10


class Progress:
    """Shows evaluations done, the best of every objective, failures and time left.

    Args:
        session: The search.
        enabled: Show anything at all.
    """

    def __init__(self, session: Session, *, enabled: bool = True) -> None:
        self._session = session
        self._enabled = enabled
        self._total = session.budget.evaluations
        self._bar: Any = None
        self._task: Any = None
        self._start = time.perf_counter()
        self._done = 0

    def __enter__(self) -> Progress:
        if not self._enabled:
            return self
        session = self._session
        if session.spent:
            print(f"{session.study.name}: goes on after {session.spent} evaluations", flush=True)
        if sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[best]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                session.study.name, total=self._total, completed=session.spent, best=self._best()
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, evaluation: Evaluation) -> None:
        """Show one more evaluation."""
        self._done += 1
        if not self._enabled:
            return
        spent = self._session.spent
        if not evaluation.ok:
            line = f"evaluation {evaluation.number} failed: {evaluation.reason}"
            (self._bar.console.print if self._bar else print)(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=spent, best=self._best())
        elif (
            self._total is None
            or spent == self._total
            or spent % max(self._total // _LINES, 1) == 0
        ):
            rate = (time.perf_counter() - self._start) / self._done
            left = "" if self._total is None else f"  {rate * (self._total - spent):.0f} s left"
            total = "" if self._total is None else f"/{self._total}"
            print(f"{self._session.study.name}: {spent}{total}  {self._best()}{left}", flush=True)

    def _best(self) -> str:
        session = self._session
        history = session.history
        parts = []
        for objective in session.problem.objectives:
            column = history.column(objective.name)
            column = column[column == column]  # noqa: PLR0124 - leaves NaN out
            if len(column):
                best = column.min() if objective.direction == "min" else column.max()
                parts.append(f"{objective.name} {best:.4g}")
        failed = int((~history.ok).sum()) if len(history) else 0
        return (
            "best " + ", ".join(parts) + (f"  {failed} failed" if failed else "") if parts else ""
        )
