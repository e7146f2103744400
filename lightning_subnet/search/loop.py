# SPDX-License-Identifier: Apache-2.0
"""The loop of a search: ask, measure, record, show."""

from __future__ import annotations

import numpy as np

from lightning_subnet.search.profile import check_feasible
from lightning_subnet.search.progress import Progress
from lightning_subnet.search.session import Session
from lightning_subnet.search.verify_front import verify_front
from lightning_subnet.study.evaluators import Evaluator


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
        evaluator: What measures.
        progress: Show progress.
        first_must_work: Give up where the first evaluations all fail.
        verify: Measure noisy measures of the front again at the end.
    """
    if not len(session.history):
        check_feasible(session.problem, seed=session.seed)
    with Progress(session, enabled=progress) as shown:
        while subnets := session.ask(1):
            try:
                evaluation = session.measure(subnets[0], evaluator)
            except BaseException:
                session.give_back(subnets[0])
                raise
            if first_must_work and session.only_failures:
                session.give_up()
            if evaluator is not None:
                evaluator.recorded(evaluation)
            shown.update(evaluation)
        changes = verify_front(session) if verify else {}
    if progress:
        for name, values in changes.items():
            print(
                f"{session.study.name}: {name} of {len(values)} subnets of the front measured "
                f"again, which changed it by {np.median(np.abs(values)):.1%} (median)",
                flush=True,
            )
