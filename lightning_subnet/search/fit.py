# SPDX-License-Identifier: Apache-2.0
"""Searches by a Lightning Trainer: in one process, or in several of which the first one leads."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_subnet.costs.varying import check_varies
from lightning_subnet.errors import MeasurementError, SearchError, StudyMismatchError
from lightning_subnet.search.budget import Budget
from lightning_subnet.search.loop import loop
from lightning_subnet.search.plan import Plan
from lightning_subnet.search.profile import Profile
from lightning_subnet.search.session import Session
from lightning_subnet.search.verify_front import keep_verified, verified_values
from lightning_subnet.search.warm_start import WarmStart
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.evaluators import Evaluator, Measured
from lightning_subnet.study.history import Evaluation, Verified
from lightning_subnet.study.problem import check_part
from lightning_subnet.study.storage import Storage
from lightning_subnet.training._lightning import gather
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.extractor import Extractor
from lightning_subnet.training.validation.guards import check_stored, hardware_of

_log = logging.getLogger(__name__)
_EXTRACTED = (
    "the super-network does not run in eval mode, so each subnet is extracted, and validated as "
    "what ships (score='extracted')"
)
_REHEARSAL = 3  # evaluations under fast_dev_run


def run_fit(
    plan: Plan,
    evaluator: TrainerEvaluator,
    *,
    progress: bool,
    on_open: Callable[[Session], None] | None = None,
) -> tuple[Session, Extractor]:
    """Search the subnets of a model; see `SubnetSearch.fit`.

    Under `fast_dev_run` three evaluations are made, and kept in memory only.

    Args:
        plan: The search. Its space and measures may wait for the model.
        evaluator: Validates subnets of the model; its context is entered here.
        progress: Show progress.
        on_open: Called with the session before anything is measured, so that the evaluations of a
            search that is interrupted are not lost to its caller. Not called under `fast_dev_run`.

    Returns:
        The session of the search that has ended, the same in all processes, and what returns
        subnets as modules.
    """
    trainer = evaluator.trainer
    if getattr(trainer, "fast_dev_run", False):
        n = min(plan.budget.evaluations or _REHEARSAL, _REHEARSAL)
        _log.info("fast_dev_run: %d evaluations, kept in memory only.", n)
        plan, on_open = replace(plan, budget=Budget(n), storage=Storage(None)), None
    measures = plan.measures
    with evaluator:
        plan = bind(plan, evaluator)
        evaluator.check_subnets(measures)
        if evaluator.score != plan.settings.score and progress and not trainer.global_rank:
            print(f"{plan.name}: {_EXTRACTED}", flush=True)
        if trainer.global_rank:
            session = _copied(plan, follow(evaluator))
            if on_open is not None:
                on_open(session)
        else:
            session = lead(trainer, lambda: _search(plan, evaluator, progress, on_open))
        return session, evaluator.extractor()


def profile_of(plan: Plan, evaluator: TrainerEvaluator) -> Profile:
    """Return the profile of a model's space; see `SubnetSearch.profile`."""
    with evaluator:
        return Profile.of(bind(plan, evaluator).problem(), seed=plan.settings.seed)


def bind(plan: Plan, evaluator: TrainerEvaluator) -> Plan:
    """Return a plan with the space and the measures of the evaluator's model.

    Raises:
        SearchError: The plan has a space that is not a part of the model's.
    """
    evaluator.directions = {o.name: o.direction for o in plan.objectives}
    measures = evaluator.bound_measures(plan.measures, plan.names)
    space = plan.space or evaluator.space
    if space is not evaluator.space:
        check_part(space, evaluator.space, measures)
    return replace(plan, space=space, measures=tuple(measures))


def _search(
    plan: Plan,
    evaluator: TrainerEvaluator,
    progress: bool,
    on_open: Callable[[Session], None] | None,
) -> Session:
    """Run a search in the process that leads, or is alone."""
    check_varies(plan.problem())
    computed = {measure.name for measure in plan.measures}
    metrics = [name for name in plan.names if name not in computed]
    session = plan.open(
        first=[plan.require_space().largest],
        provenance={"measures": metrics, **evaluator.provenance},
        hardware=hardware_of(evaluator.trainer),
    )
    if on_open is not None:
        on_open(session)
    alone = evaluator.trainer.world_size == 1
    scorer = evaluator if alone else Leader(evaluator, metrics)
    confirm(session, evaluator, scorer)
    loop(
        session,
        scorer,
        progress=progress,
        first_must_work=True,
        verify=plan.settings.verify_front,
    )
    return session


def confirm(
    session: Session, evaluator: TrainerEvaluator, scorer: TrainerEvaluator | Leader
) -> None:
    """Score a subnet again whose values are stored, before they are taken for those of this model.

    Weights, data and code are compared by hashes; attributes of the model and globals are not.

    Raises:
        StudyMismatchError: It has other values now.
    """
    storage, names = session.study.storage, session.names_to_tell
    in_memory = storage.url.partition(":///")[2] in ("", ":memory:")
    check = ("stored", storage.url, str(id(storage)) if in_memory else "")
    if not evaluator.checks.repeat or evaluator.passed.has(*check):
        return
    subnet = session.problem.space.largest
    stored: Mapping[str, float] = {}
    prints = {name: evaluator.fingerprint(name) or "" for name in names}
    scored = [e for e in session.history if e.ok and e.generation is not None]
    if scored:
        evaluation = next((e for e in scored if e.subnet == subnet), scored[0])
        subnet, stored = evaluation.subnet, evaluation.values
    elif not len(session.history):  # other studies may have values that it takes
        stored = {name: value for name, (value, _) in storage.known_values(prints, subnet).items()}
    if stored := {name: stored[name] for name in names if name in stored}:
        try:
            fresh = scorer.confirm(subnet)
        except MeasurementError:
            raise
        except Exception as error:
            msg = (
                f"{subnet!r:.200} has values in study {session.study.name!r}, and fails now: "
                f"{type(error).__name__}: {error!s:.200}. Look at the model and the data."
            )
            raise StudyMismatchError(msg) from error
        check_stored(
            stored,
            fresh,
            subnet=subnet,
            study=session.study,
            hardware=hardware_of(evaluator.trainer),
            n=evaluator.n_samples,
        )
    evaluator.passed.add(*check)


class Leader(Evaluator):
    """The evaluator of process 0: every subnet is evaluated by all processes.

    Args:
        evaluator: The evaluator of this process.
        metrics: The metrics that the search needs; each must be equal in all processes.
    """

    def __init__(self, evaluator: TrainerEvaluator, metrics: Sequence[str]) -> None:
        self._evaluator = evaluator
        self._metrics = metrics
        self.built_in = evaluator.built_in

    def fingerprint(self, name: str) -> str | None:
        """Return the fingerprint of a logged metric."""
        return self._evaluator.fingerprint(name)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Log one row."""
        self._evaluator.on_evaluation(evaluation)

    def evaluate(self, subnet: Subnet) -> Measured:
        """Let all processes evaluate the subnet; return the metrics on which they agree."""
        return self._together("evaluate", subnet)

    def confirm(self, subnet: Subnet) -> Measured:
        """Do the same with `TrainerEvaluator.confirm`."""
        return self._together("confirm", subnet)

    def _together(self, order: Order, subnet: Subnet) -> Measured:
        try:
            self._evaluator.trainer.strategy.broadcast((order, subnet.to_json()))
        except Exception as failure:
            msg = f"Another process has ended, and the search cannot go on: {failure}"
            raise MeasurementError(msg) from failure
        outcomes = evaluated_together(self._evaluator, subnet, order)
        for rank, (metrics, error) in enumerate(outcomes):
            if isinstance(error, MeasurementError):
                raise error
            if metrics is None:
                msg = f"process {rank}: {error}"
                raise RuntimeError(msg)
        by_rank = [metrics for metrics, _ in outcomes if metrics is not None]
        first = by_rank[0]
        equal = {n: v for n, v in first.items() if all(_same(v, m.get(n)) for m in by_rank)}
        if unequal := [name for name in self._metrics if name in first and name not in equal]:
            name = unequal[0]
            values = " and ".join(f"{metrics.get(name)}" for metrics in by_rank[:2])
            msg = (
                f"{name!r} differs between the processes ({values}): each has logged the value "
                f"of its own samples. Write self.log({name!r}, ..., sync_dist=True), or log a "
                "torchmetrics metric object."
            )
            raise MeasurementError(msg)
        return equal


Outcome = tuple[dict[str, float] | None, MeasurementError | str | None]
"""The metrics that a process has logged, or None and its error."""


Order = Literal["evaluate", "confirm"]
"""What process 0 asks for: the method that all call."""


def evaluated_together(
    evaluator: TrainerEvaluator, subnet: Subnet, order: Order = "evaluate"
) -> list[Outcome]:
    """Return the outcome of each process, all of which call this for the same subnet."""
    outcome: Outcome
    try:
        outcome = dict(getattr(evaluator, order)(subnet)), None
    except MeasurementError as error:
        outcome = None, error
    except Exception as error:  # which may hold what cannot be sent
        outcome = None, f"{type(error).__name__}: {error}"
    try:
        return gather(evaluator.trainer, outcome)
    except Exception as error:
        msg = (
            f"The processes lost one another ({error}); this one had: {outcome[1] or 'no error'}. "
            "An error in one of them alone leaves the others waiting: look at their output."
        )
        raise MeasurementError(msg) from error


def _same(one: float, other: float | None) -> bool:
    if other is None:
        return False
    return math.isclose(one, other, rel_tol=1e-6) or (math.isnan(one) and math.isnan(other))


@dataclass(frozen=True)
class Measurements:
    """All values of a search, which process 0 sends to the others at the end."""

    evaluations: list[dict[str, Any]]
    verified: Verified


def lead(trainer: Any, search: Callable[[], Session]) -> Session:
    """Search in process 0, tell the others how it ended, and return the session."""
    if trainer.world_size == 1:
        return search()
    try:
        session = search()
        values = Measurements([e.to_json() for e in session.history], verified_values(session))
    except Exception as error:
        trainer.strategy.broadcast(("failed", f"{type(error).__name__}: {error}"))
        raise
    trainer.strategy.broadcast(("done", values))
    return session


def follow(evaluator: TrainerEvaluator) -> Measurements:
    """Evaluate in another process what process 0 asks for, and return its values at the end.

    Raises:
        SearchError: Process 0 has failed.
    """
    while True:
        placeholder: tuple[Any, Any] = ("", None)
        order, content = evaluator.trainer.strategy.broadcast(placeholder)
        if order == "failed":
            msg = f"Process 0 ended the search: {content}"
            raise SearchError(msg)
        if order == "done":
            values: Measurements = content
            return values
        evaluated_together(evaluator, evaluator.space.subnet(content), order)


def _copied(plan: Plan, values: Measurements) -> Session:
    """Return a session in memory with all values of process 0."""
    memory = Storage(None)
    start = WarmStart((), memory)  # its subnets are among the evaluations
    settings = replace(plan.settings, resume="auto")  # "must" is for the study of process 0
    session = replace(plan, settings=settings, storage=memory, warm_start=start).open()
    for item in values.evaluations:
        session.study.add_evaluation(Evaluation.from_json(item, session.problem.space))
    session.sync()
    keep_verified(session, values.verified)
    return session
