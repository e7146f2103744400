# SPDX-License-Identifier: Apache-2.0
"""How `SubnetSearch.fit` runs: in one process, or in several of which the first one leads."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_subnet.errors import MeasurementError, SearchError
from lightning_subnet.results.result import SearchResult
from lightning_subnet.search.loop import loop
from lightning_subnet.search.profile import Profile
from lightning_subnet.search.session import Session
from lightning_subnet.search.verify_front import keep_verified, verified_values
from lightning_subnet.search.warm_start import WarmStart
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.evaluators import Evaluator, Measured
from lightning_subnet.study.history import Evaluation, Verified
from lightning_subnet.study.measures import Measure
from lightning_subnet.study.problem import check_part
from lightning_subnet.study.storage import Storage
from lightning_subnet.training._lightning import gathered
from lightning_subnet.training.evaluator import TrainerEvaluator
from lightning_subnet.training.frozen_data import Source

if TYPE_CHECKING:
    from lightning_subnet.search.search import SubnetSearch

_log = logging.getLogger(__name__)
_DEV_RUN = 3


def run_fit(
    search: SubnetSearch,
    model: Any,
    *,
    trainer: Any,
    progress: bool,
    loggers: Sequence[Any] = (),
    **data: Any,
) -> SearchResult:
    """Search the subnets of a model; see `SubnetSearch.fit`."""
    source = Source(calibration_images=search.calibration_images, **data)
    evaluator = TrainerEvaluator(model, source, trainer=trainer, loggers=loggers)
    if getattr(evaluator.trainer, "fast_dev_run", False):
        few = min(search.budget.evaluations or _DEV_RUN, _DEV_RUN)
        _log.info("fast_dev_run: %d evaluations, kept in memory only.", few)
        return fit(search.replace(budget=few, storage=None), evaluator, progress=progress)
    try:
        return fit(search, evaluator, progress=progress)
    except BaseException:
        if search._session is not None and not len(search._session.history):
            search._session = None  # nothing was spent: the next call may have other settings
        raise


def profile_of(search: SubnetSearch, model: Any, datamodule: Any, dataloaders: Any) -> Profile:
    """Return what the exact measures of a model allow; see `SubnetSearch.profile`."""
    source = Source(datamodule, dataloaders, calibration_images=0)
    with TrainerEvaluator(model, source, trainer=search.trainer) as evaluator:
        space, bound, _ = bind(search, evaluator)
        return Profile.of(search._make_problem(space, bound), seed=search.seed)


def fit(search: SubnetSearch, evaluator: TrainerEvaluator, *, progress: bool) -> SearchResult:
    """Run a search with an evaluator whose context is not entered yet; return what was found."""
    trainer = evaluator.trainer
    with evaluator:
        space, measures, told = bind(search, evaluator)
        if trainer.global_rank:
            found = follow(evaluator)
            take_over(search, space, measures, found)
        else:
            leader = evaluator if trainer.world_size == 1 else Leader(evaluator, told)

            def run() -> Session:
                session = search._start(
                    space,
                    measures,
                    first=[space.largest],
                    conditions={"measures": told, **evaluator.conditions},
                )
                loop(
                    session,
                    leader,
                    progress=progress,
                    first_must_work=True,
                    verify=search.verify_front,
                )
                return session

            lead(trainer, run)
        return search.result(evaluator.extractor())


class Leader(Evaluator):
    """The evaluator of process 0: all processes evaluate the subnets that it is given.

    Args:
        evaluator: This process' own.
        names: The metrics that the search needs; each must be equal in all processes.
    """

    def __init__(self, evaluator: TrainerEvaluator, names: Sequence[str]) -> None:
        self._own = evaluator
        self._names = names
        self.built_in = evaluator.built_in

    def fingerprint(self, name: str) -> str | None:
        """Return the fingerprint of a logged metric."""
        return self._own.fingerprint(name)

    def recorded(self, evaluation: Evaluation) -> None:
        """Log one row."""
        self._own.recorded(evaluation)

    def evaluate(self, subnet: Subnet) -> Measured:
        """Let all processes evaluate the subnet; return what they agree on."""
        try:
            self._own.trainer.strategy.broadcast(("evaluate", subnet.to_json()))
        except Exception as lost:
            msg = f"Another process has ended, and the search cannot go on: {lost}"
            raise MeasurementError(msg) from lost
        outcomes = evaluated_together(self._own, subnet)
        for rank, (metrics, error) in enumerate(outcomes):
            if isinstance(error, MeasurementError):
                raise error
            if metrics is None:
                msg = f"process {rank}: {error}"
                raise RuntimeError(msg)
        told = [metrics for metrics, _ in outcomes if metrics is not None]
        agreed = {n: v for n, v in told[0].items() if all(_same(v, m.get(n)) for m in told)}
        if apart := [name for name in self._names if name in told[0] and name not in agreed]:
            values = " and ".join(f"{metrics.get(apart[0])}" for metrics in told[:2])
            msg = (
                f"{apart[0]!r} differs between the processes ({values}): each has logged the value "
                f"of its own samples. Write self.log({apart[0]!r}, ..., sync_dist=True), or log a "
                "torchmetrics metric object."
            )
            raise MeasurementError(msg)
        return agreed


Outcome = tuple[dict[str, float] | None, MeasurementError | str | None]


def evaluated_together(evaluator: TrainerEvaluator, subnet: Subnet) -> list[Outcome]:
    """Return what each process measured of a subnet, or why it could not."""
    outcome: Outcome
    try:
        outcome = dict(evaluator.evaluate(subnet)), None
    except MeasurementError as error:
        outcome = None, error
    except Exception as error:  # which may hold what cannot be sent
        outcome = None, f"{type(error).__name__}: {error}"
    try:
        return gathered(evaluator.trainer, outcome)
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
class Found:
    """What process 0 sends to the others at the end."""

    evaluations: list[dict[str, Any]]
    verified: Verified


def lead(trainer: Any, search: Callable[[], Session]) -> None:
    """Search in process 0, and tell the others how it ended."""
    if trainer.world_size == 1:
        search()
        return
    try:
        session = search()
        found = Found([e.to_json() for e in session.history], verified_values(session))
    except Exception as error:
        trainer.strategy.broadcast(("failed", f"{type(error).__name__}: {error}"))
        raise
    trainer.strategy.broadcast(("done", found))


def follow(evaluator: TrainerEvaluator) -> Found:
    """Evaluate in another process what process 0 asks for; return what that found."""
    while True:
        waiting: tuple[str, Any] = ("", None)
        order, content = evaluator.trainer.strategy.broadcast(waiting)
        if order == "failed":
            msg = f"Process 0 ended the search: {content}"
            raise SearchError(msg)
        if order == "done":
            found: Found = content
            return found
        evaluated_together(evaluator, evaluator.space.subnet(content))


def bind(
    search: SubnetSearch, evaluator: TrainerEvaluator
) -> tuple[SearchSpace, list[Measure], list[str]]:
    """Return the space, the measures and the metrics of a search with this evaluator."""
    wanted = [*(o.name for o in search.objectives), *(c.name for c in search.constraints)]
    measures = evaluator.bound_measures(search.measures, wanted)
    own = {measure.name for measure in measures}
    space = search._settings["space"] or evaluator.space
    if space is not evaluator.space:
        check_part(space, evaluator.space, measures)
    return space, measures, list(dict.fromkeys(n for n in wanted if n not in own))


def take_over(
    search: SubnetSearch, space: SearchSpace, measures: Sequence[Measure], found: Found
) -> None:
    """Hold what another process found."""
    search._storage = Storage(None)
    search.warm_start = WarmStart((), search._storage)  # it is among what was found
    session = search._start(space, measures)
    for item in found.evaluations:
        session.study.add_evaluation(Evaluation.from_json(item, space))
    session.sync()
    keep_verified(session, found.verified)
