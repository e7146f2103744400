# SPDX-License-Identifier: Apache-2.0
"""Plan: the settings of a search as they are meant, and how its study is opened."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from lightning_subnet._messages import warn
from lightning_subnet.errors import BudgetWarning, SearchError
from lightning_subnet.search.budget import Budget
from lightning_subnet.search.session import Session
from lightning_subnet.search.settings import Settings
from lightning_subnet.search.study_header import make_header, open_study
from lightning_subnet.search.warm_start import WarmStart, most_of
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.strategies.registry import resolve
from lightning_subnet.study.measures import Measure, NetworkMeasure, by_name
from lightning_subnet.study.objectives import (
    Constraint,
    Objective,
    parse_constraints,
    parse_objectives,
)
from lightning_subnet.study.problem import Problem
from lightning_subnet.study.storage import Storage, Study

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Plan:
    """A search before it runs.

    A plan never changes. Where something of it is known later, as the space and the measures of a
    model in `fit`, another plan is made by `dataclasses.replace`.

    Args:
        settings: The arguments of the search; `measures` and `warm_start` in the form that can be
            read again, where an iterator was passed.
        objectives: The measures to optimise.
        constraints: The bounds that must hold.
        space: The space to search; None where the model brings it.
        measures: The measures that the search computes; one that is not a `Measure` waits for a
            network.
        strategy: Proposes subnets.
        budget: When to stop.
        storage: The place of the study.
        name: The study's name; a new one where the settings have none.
        warm_start: The subnets to measure first.

    Example:
        >>> from lightning_subnet import SubnetSearch
        >>> search = SubnetSearch(space=SearchSpace(depth=[1, 2, 3]), objectives={"error": "min"},
        ...                       strategy="random", storage=None)
        >>> plan = search.plan
        >>> plan.names, plan.problem().space.size, plan.open().ask(9)[0] in plan.space
        (('error',), 3, True)
    """

    settings: Settings
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    space: SearchSpace | None
    measures: tuple[Measure | NetworkMeasure, ...]
    strategy: Strategy
    budget: Budget
    storage: Storage
    name: str
    warm_start: WarmStart

    @classmethod
    def of(cls, settings: Settings) -> Plan:
        """Return the plan that settings mean, with a `BudgetWarning` if nothing can be learnt.

        Raises:
            SubnetError: A setting that makes no sense; the message says what was expected.
        """
        measures: Any = settings.measures
        lone = isinstance(measures, (Measure, NetworkMeasure))
        measures = (measures,) if lone else tuple(measures)
        by_name(measures)  # refuses two of one name
        storage = settings.storage
        storage = storage if isinstance(storage, Storage) else Storage(storage)
        # Kept in this form, so that `replace` still finds what an iterator has yielded, and looks
        # for the studies of a warm start where they were.
        start = WarmStart.of(settings.warm_start, storage)
        plan = cls(
            settings=replace(settings, measures=measures, warm_start=start),
            objectives=parse_objectives(settings.objectives),
            constraints=parse_constraints(settings.constraints),
            space=settings.space,
            measures=measures,
            strategy=resolve(settings.strategy),
            budget=Budget.of(settings.budget),
            storage=storage,
            name=settings.name or _new_name(),
            warm_start=start,
        )
        plan._warn_of_small_budget()
        return plan

    def _warn_of_small_budget(self) -> None:
        limit, name = self.budget.evaluations, self.settings.strategy
        if limit is None or not isinstance(name, str):
            return  # whoever passes an object has chosen its numbers
        if limit > (opening := self.strategy.opening).size:
            return
        smaller = f"{type(self.strategy).__name__}({opening.setting}={max(limit // 4, 2)})"
        advice = (
            f"Give fewer: strategy={smaller}, from lightning_subnet.strategies."
            if opening.setting
            else "Give a larger budget."
        )
        warn(
            f"strategy={name!r} begins with {opening.size} subnets that follow no measurement, and "
            f"the budget is {limit}. {advice}",
            BudgetWarning,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All measures that objectives and constraints speak of, each once."""
        objectives = (objective.name for objective in self.objectives)
        constraints = (constraint.name for constraint in self.constraints)
        return tuple(dict.fromkeys([*objectives, *constraints]))

    def find_study(self) -> Study | None:
        """Return the study of this name, if there is one; nothing is created."""
        return self.storage.find_study(self.name)

    def require_space(self) -> SearchSpace:
        """Return the space, or raise `SearchError` if it is not known yet."""
        if self.space is None:
            msg = (
                "This search has no space. Give space=SearchSpace({...}) for ask/tell and "
                "run(), or call fit(model, datamodule), which takes it from the model."
            )
            raise SearchError(msg)
        return self.space

    def problem(self) -> Problem:
        """Return the problem that a strategy gets.

        Raises:
            SearchError: The space is not known yet.
            ObjectiveError: Two things have one name, or exact constraints contradict each other.
        """
        measures = [m for m in self.measures if isinstance(m, Measure)]
        return Problem.of(self.require_space(), self.objectives, self.constraints, measures)

    def first(self, before: Sequence[Subnet] = ()) -> list[Subnet]:
        """Return the subnets to measure first; of an existing study those that it began with.

        Args:
            before: Subnets that come before those of the warm start.
        """
        space = self.require_space()
        stored = self.warm_start.stored(self.find_study(), space)
        if stored is not None:
            return stored
        most = most_of(self.budget.evaluations, self.strategy.batch_size)
        return [*map(space.subnet, before), *self.warm_start.subnets(space, most=most)]

    def resumed(self) -> Session | None:
        """Check what can be checked without a model, and open the study if it can go on by itself.

        Called when a search is made, so that a mistake or a study of other settings shows then.

        Returns:
            The session of the study. None if there is no study yet, if it is one of `fit`, which
            opens it again, or if the plan needs a model.
        """
        study = self.find_study()
        if self.space is None:
            if study is None:
                self.warm_start.check()
            return None
        self.problem()
        self.first()
        if any(not isinstance(measure, Measure) for measure in self.measures):
            return None
        if study is None:
            return self.open() if self.settings.resume == "must" else None
        return None if study.header["evaluator"] else self.open()

    def open(
        self,
        *,
        first: Sequence[Subnet] = (),
        provenance: Mapping[str, Any] | None = None,
        hardware: str = "",
    ) -> Session:
        """Open or create the study, and return the session over it.

        Args:
            first: Subnets to measure before all others.
            provenance: All that the values of an evaluator depend on besides the subnet.
            hardware: What these are computed on, in words; noted in a new study.

        Raises:
            SearchError: A measure waits for a network, the space is not known, or `resume` forbids
                to open the study.
            StudyMismatchError: A stored study of this name was made with other settings.
        """
        measures: list[Measure] = []
        for measure in self.measures:
            if not isinstance(measure, Measure):
                msg = (
                    f"{measure.name!r} measures networks, and this search has none. Call "
                    "fit(model, datamodule), or leave it out of measures= and tell its values."
                )
                raise SearchError(msg)
            measures.append(measure)
        problem = self.problem()
        reference = [problem.space.largest] if problem.needs_reference else []
        first = self.first([*first, *reference])
        header = make_header(
            problem,
            self.strategy,
            measures=measures,
            provenance=provenance or {},
            seed=self.settings.seed,
            first=first,
            warm_from=self.warm_start.names,
        )
        session = Session(
            problem,
            self.strategy,
            measures=by_name(measures),
            study=open_study(
                self.storage, self.name, header, problem, self.settings.resume, hardware=hardware
            ),
            budget=self.budget,
            seed=self.settings.seed,
            first=first,
        )
        if len(session.history):
            _log.info("Study %r goes on after %d evaluations.", self.name, len(session.history))
        return session


def _new_name() -> str:
    return f"search-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
