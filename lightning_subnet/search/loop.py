# SPDX-License-Identifier: Apache-2.0
"""The loop of a search: ask, measure, record, and show how far it is."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import numpy as np

from lightning_subnet._messages import warn
from lightning_subnet.errors import ElasticityWarning, ObjectiveError
from lightning_subnet.search.profile import Profile
from lightning_subnet.search.session import Session
from lightning_subnet.search.verify_front import verify_front
from lightning_subnet.study import pareto
from lightning_subnet.study.evaluators import Evaluator
from lightning_subnet.study.history import Evaluation

_LINES = 10  # of progress, where there is no terminal
_EQUAL = 5  # evaluations after which equal values are told
_FIRST = 10  # feasible evaluations, to whose hypervolume the later one is compared


def loop(
    session: Session,
    evaluator: Evaluator | None,
    *,
    progress: bool,
    first_must_work: bool = False,
    verify: bool = False,
) -> None:
    """Measure subnets until the budget is spent or the space exhausted.

    Args:
        session: The search.
        evaluator: Measures what the session does not compute.
        progress: Show progress.
        first_must_work: Give up where the first evaluations all fail.
        verify: Take noisy measures of the front again at the end.
    """
    if not len(session.history) and session.problem.exact_constraints:
        Profile.of(session.problem, seed=session.seed).check()
    with Progress(session, enabled=progress) as display:
        while subnets := session.ask(1):
            try:
                evaluation = session.measure(subnets[0], evaluator)
            except BaseException:
                session.give_back(subnets[0])
                raise
            if first_must_work and session.only_failures:
                session.give_up()
            if evaluator is not None:
                evaluator.on_evaluation(evaluation)
                if len(session.history) == _EQUAL:
                    warn_of_equal(session)
            display.update(evaluation)
        changes = verify_front(session) if verify else {}
    if progress:
        for name, values in changes.items():
            print(
                f"{session.study.name}: {name} of {len(values)} subnets of the front measured "
                f"again, which changed it by {np.median(np.abs(values)):.1%} (median)",
                flush=True,
            )


def warn_of_equal(session: Session) -> None:
    """Warn if the first subnets all have the same value of what an evaluator measures."""
    for name in session.names_to_tell:
        values = [e.values[name] for e in session.history if name in e.values]
        if len(values) >= _EQUAL and len(set(values)) == 1:
            warn(
                f"The first {len(values)} subnets all have {name} = {values[0]!r}, equal to the "
                "last digit. If the subnet has no effect, activate() or the network does not use "
                "it: check_elastic(model, example_input) tells which choices do nothing. If it "
                "has, validate on more samples.",
                ElasticityWarning,
            )


class Progress:
    """A display of evaluations done, best values, hypervolume, failures and time left.

    On a terminal it is a bar, elsewhere a line for every tenth of the evaluations.

    The hypervolume is that of the front over that of the first ten feasible evaluations, whose
    worst values are the reference point; so it starts at 1 and grows.

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
        if not evaluation.ok:
            line = f"evaluation {evaluation.number} failed: {evaluation.reason}"
            (self._bar.console.print if self._bar else print)(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._session.spent, best=self._best())
        else:
            self._print_line()

    def _print_line(self) -> None:
        """Print a line if it is time for one; where only seconds end the search, it always is."""
        spent, total = self._session.spent, self._total
        if total is not None and spent != total and spent % max(total // _LINES, 1):
            return
        rate = (time.perf_counter() - self._start) / self._done
        left = "" if total is None else f"  {rate * (total - spent):.0f} s left"
        of = "" if total is None else f"/{total}"
        print(f"{self._session.study.name}: {spent}{of}  {self._best()}{left}", flush=True)

    def _best(self) -> str:
        session = self._session
        history = session.history
        parts = []
        for objective in session.problem.objectives:
            column = history.column(objective.name)
            column = column[~np.isnan(column)]
            if len(column):
                best = column.min() if objective.direction == "min" else column.max()
                parts.append(f"{objective.name} {best:.4g}")
        text = "best " + ", ".join(parts) if parts else ""
        if (growth := self._hypervolume()) is not None:
            text += f"  hypervolume x{growth:.2f}"
        failed = int((~history.ok).sum()) if len(history) else 0
        return text + (f"  {failed} failed" if failed else "")

    def _hypervolume(self) -> float | None:
        """Return the hypervolume over that of the first evaluations; None while it means nothing.

        It is also None where the first evaluations agree in an objective, or with one objective.
        """
        problem, history = self._session.problem, self._session.history
        if len(problem.objectives) == 1 or len(history) <= _FIRST:
            return None
        try:
            F, violations = problem.scores(history)
        except ObjectiveError:  # a relative bound whose reference failed
            return None
        F = F[violations <= 0]
        reference = F[:_FIRST].max(axis=0) if len(F) > _FIRST else np.zeros(0)
        start = pareto.hypervolume(F[:_FIRST], reference) if len(F) > _FIRST else 0.0
        return pareto.hypervolume(F, reference) / start if start > 0 else None
