# SPDX-License-Identifier: Apache-2.0
"""SubnetSearch: the search as its user sees it. Its settings are a `Plan`, its work a `Session`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_subnet._messages import did_you_mean
from lightning_subnet.errors import SearchError, TellError
from lightning_subnet.results.record import unit_and_conditions
from lightning_subnet.results.result import SearchResult
from lightning_subnet.search.budget import Budget
from lightning_subnet.search.loop import loop
from lightning_subnet.search.plan import Plan
from lightning_subnet.search.profile import Profile
from lightning_subnet.search.session import Session
from lightning_subnet.search.settings import Settings
from lightning_subnet.search.study_header import Resume
from lightning_subnet.search.verify_front import verified_values
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.study.evaluators import Evaluator
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.measures import Measure, NetworkMeasure
from lightning_subnet.study.objectives import Constraint, Objective

if TYPE_CHECKING:
    import pandas as pd

    from lightning_subnet.study.storage import Storage
    from lightning_subnet.training.validation.checks import Checks, Score
    from lightning_subnet.training.validation.evaluator import TrainerEvaluator


class SubnetSearch:
    """A search for the best subnets of a space.

    Three ways to run it: `fit(model, datamodule)` drives a Lightning Trainer; `run(evaluator)`
    calls a function or a table; `ask()` and `tell()` leave the loop to you. All of them commit
    every step to `storage`, and a search of the same `name` goes on where the last one stopped,
    exactly.

    Args:
        objectives: The measures to optimise, in any number: `{"val_acc": "max", "macs": "min"}`.
        constraints: Bounds that must hold: `{"macs": "<= 3e8"}`, or relative to the largest subnet
            `{"params": "<= 60%"}`; several bounds on one measure as a list.
        space: The space to search. `fit` takes it from the model, unless a part of the model's
            space is passed here, such as `space.restricted_to(...)`.
        measures: Measures that the search computes. Values of other names are told by you, or
            measured by the evaluator.
        strategy: A name (`lightning_subnet.strategies.names()`) or a `Strategy`.
        budget: The number of evaluations to make, or a `Budget`.
        storage: A database URL, or a `Storage` that several searches share; None keeps the study
            in memory.
        name: The study's name, by which it is resumed. None makes a new name each time.
        seed: The seed of all proposals.
        resume: `"auto"` goes on with an existing study of that name, `"never"` refuses one, and
            `"must"` refuses to begin a new one.
        warm_start: Subnets to measure first: subnets or evaluations; or the front of a result, of a
            study by name (`"cpu"`) in this storage, or elsewhere (`("sqlite:///b.db", "cpu")`), at
            most a fifth of the budget; or a list of these. A study keeps what it started from.
        trainer: The Trainer that `fit` validates with.
        calibration_images: The number of training samples with which `fit` recalibrates BatchNorm
            before each validation; 0 leaves its statistics alone.
        score: What `fit` validates: `"network"`, the super-network with the subnet in force;
            `"extracted"`, the extracted subnet in its place, which is chosen by itself where the
            super-network does not run in eval mode; `"onnxruntime"` or `"openvino"`, the file of
            the extracted subnet in that runtime, in which a `Latency` is then measured too.
        checks: Whether `fit` checks its own numbers; a `training.Checks` leaves some checks out.
        verify_front: Let `fit` end with a second measurement of noisy measures (latency) on the
            front, outside the budget, so that a lucky draw does not win.

    Attributes:
        plan: The arguments as they are meant; see `lightning_subnet.search.plan.Plan`.

    Raises:
        SubnetError: An argument makes no sense; the message says what was expected.
        StudyMismatchError: A stored study of this name was made with other settings.

    Example:
        >>> from lightning_subnet import SearchSpace, SubnetSearch
        >>> search = SubnetSearch(space=SearchSpace(depth=[1, 2, 3], width=[8, 16, 32]),
        ...                       objectives={"error": "min", "cost": "min"}, strategy="random",
        ...                       budget=5, storage=None)
        >>> while subnets := search.ask(2):
        ...     for subnet in subnets:
        ...         cost = subnet["depth"] * subnet["width"]
        ...         _ = search.tell(subnet, error=1 / cost, cost=cost)
        >>> len(search.history), len(search.result().front)
        (5, 5)
    """

    def __init__(  # noqa: PLR0913 - the settings of a search, each optional but the first
        self,
        *,
        objectives: Mapping[str, str],
        constraints: Mapping[str, str | Sequence[str]] | None = None,
        space: SearchSpace | None = None,
        measures: Sequence[Measure | NetworkMeasure] = (),
        strategy: str | Strategy = "hybrid",
        budget: int | Budget = 250,
        storage: str | Storage | None = "sqlite:///subnet_search.db",
        name: str | None = None,
        seed: int = 0,
        resume: Resume = "auto",
        warm_start: Any = (),
        trainer: Any = None,
        calibration_images: int = 512,
        verify_front: bool = True,
        score: Score = "network",
        checks: bool | Checks = True,
    ) -> None:
        self.plan = Plan.of(
            Settings(
                objectives=objectives,
                constraints=constraints,
                space=space,
                measures=measures,
                strategy=strategy,
                budget=budget,
                storage=storage,
                name=name,
                seed=seed,
                resume=resume,
                warm_start=warm_start,
                trainer=trainer,
                calibration_images=calibration_images,
                verify_front=verify_front,
                score=score,
                checks=checks,
            )
        )
        self._session: Session | None = self.plan.resumed()

    def replace(self, **changes: Any) -> SubnetSearch:
        """Return a search with the same settings but for those that are passed.

        Example:
            >>> from lightning_subnet import SearchSpace
            >>> search = SubnetSearch(space=SearchSpace(depth=[1, 2]), objectives={"error": "min"},
            ...                       storage=None)
            >>> search.replace(seed=3).seed
            3
        """
        settings = vars(self.plan.settings)
        if unknown := [key for key in changes if key not in settings]:
            hint = did_you_mean(unknown[0], settings)
            msg = f"{unknown[0]!r} is not a setting of a search.{hint}"
            raise SearchError(msg)
        return SubnetSearch(**{**settings, **changes})

    @property
    def name(self) -> str:
        """The study's name."""
        return self.plan.name

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The measures that are optimised, with their directions."""
        return self.plan.objectives

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The bounds that must hold."""
        return self.plan.constraints

    @property
    def measures(self) -> tuple[Measure | NetworkMeasure, ...]:
        """The measures that the search computes."""
        return self.plan.measures

    @property
    def strategy(self) -> Strategy:
        """The strategy, as an object."""
        return self.plan.strategy

    @property
    def budget(self) -> Budget:
        """The budget of all runs of the study together."""
        return self.plan.budget

    @property
    def seed(self) -> int:
        """The seed of all proposals."""
        return self.plan.settings.seed

    @property
    def space(self) -> SearchSpace | None:
        """The space; None before `fit` if the model brings it."""
        return self._session.problem.space if self._session else self.plan.space

    @property
    def history(self) -> History:
        """All evaluations so far, those of earlier runs of the study too."""
        space = self.plan.space
        if self._session is None and space is not None:  # nothing is created by looking
            study = self.plan.find_study()
            return History(space, study.evaluations(space) if study else ())
        return self._open().history

    def _open(self) -> Session:
        """Return the session, opening the study on first use."""
        if self._session is None:
            self._session = self.plan.open()
        return self._session

    # Running

    def ask(self, n: int = 1) -> list[Subnet]:
        """Return 1 to n subnets to measure, or an empty list when the search is over.

        They come from the open generation, so there may be fewer than n. A new process first gets
        those that an earlier one got and never told.

        Args:
            n: How many at most.

        Raises:
            SearchError: n is not a whole number from 1, or the search has no space.
        """
        return self._open().ask(n)

    def tell(
        self,
        subnet: Subnet | Mapping[str, Any],
        values: Mapping[str, Any] | None = None,
        /,
        **more: Any,
    ) -> Evaluation:
        """Record the measured values of a subnet.

        A subnet that was not asked for is accepted as attached: it is part of the history and the
        front, strategies learn from it, and it does not count towards the budget. A value that is
        NaN or infinite makes the evaluation a failed one.

        Args:
            subnet: The subnet, or its values by name.
            values: Numbers, or pairs (value, standard error), by name of measure.
            **more: The same as keywords.

        Returns:
            The evaluation, with the measures that the search computed.

        Raises:
            TellError: The subnet was told before, or a value is missing, unknown or not a number;
                nothing is recorded then.
        """
        if values is not None and not isinstance(values, Mapping):
            msg = (
                f"tell() got {values!r:.60} as the values. "
                "Give them by name of measure: tell(subnet, error=0.1)."
            )
            raise TellError(msg)
        return self._open().tell(subnet, {**(values or {}), **more})

    def fail(self, subnet: Subnet | Mapping[str, Any], reason: str) -> Evaluation:
        """Record that a subnet could not be measured, and why."""
        return self._open().fail(subnet, reason)

    def run(self, evaluator: Evaluator | None = None, *, progress: bool = True) -> SearchResult:
        """Measure subnets with an evaluator until the budget is spent or the space exhausted.

        Args:
            evaluator: Measures what `measures=` does not compute.
            progress: Show progress.

        Returns:
            The result of the search.
        """
        if evaluator is not None and not isinstance(evaluator, Evaluator):
            msg = (
                f"run({evaluator!r:.60}): this is not an evaluator. "
                "Wrap a function that returns values by name: run(FunctionEvaluator(fn))."
            )
            raise SearchError(msg)
        session = self._open()
        loop(session, evaluator, progress=progress)
        return self.result()

    def fit(
        self,
        model: Any,
        datamodule: Any = None,
        *,
        dataloaders: Any = None,
        train_dataloaders: Any = None,
        progress: bool = True,
    ) -> SearchResult:
        """Search the subnets of a trained model by validating them with a Lightning Trainer.

        Evaluation 0 is the largest subnet, the reference of relative constraints. The model, the
        datamodule and the trainer are left as they were, whatever happens.

        Args:
            model: A LightningModule with `search_space()` and `activate(subnet)` (`SubnetMixin`),
                or with one descendant that has them, whose `validation_step` logs the objectives.
            datamodule: The data; its `prepare_data` and `setup("fit")` run once.
            dataloaders: Validation dataloaders, instead of a datamodule.
            train_dataloaders: Training data that recalibrates BatchNorm, beside `dataloaders`.
            progress: Show progress.

        Returns:
            The result of the search.

        Raises:
            SearchError: The model is not a super-network, data is missing, nothing satisfies the
                exact constraints, or the first five evaluations fail (and are not recorded).
            MeasurementError: An objective is never logged, or not reduced over processes; a subnet
                that is scored twice gets two values, or validation changes weights.
            ParityError: A subnet that is extracted or converted gives other outputs than where it
                is scored.
        """
        from lightning_subnet.search.fit import run_fit

        evaluator = self._evaluator(model, datamodule, dataloaders, train_dataloaders)
        try:
            session, extractor = run_fit(
                self.plan, evaluator, progress=progress, on_open=self._keep
            )
        except BaseException:
            if self._session is not None and not len(self._session.history):
                self._session = None  # nothing was spent: the next call may have other settings
            raise
        return result_of(session, extractor)

    def _keep(self, session: Session) -> None:
        """Keep a session from its start, so that a run that is interrupted has its history here."""
        self._session = session

    def _evaluator(
        self, model: Any, datamodule: Any, dataloaders: Any, train: Any = None, **changes: Any
    ) -> TrainerEvaluator:
        from lightning_subnet.training.validation.evaluator import TrainerEvaluator
        from lightning_subnet.training.validation.frozen_data import Source

        settings = dataclasses.replace(self.plan.settings, **changes)
        images = settings.calibration_images
        source = Source(datamodule, dataloaders, train, calibration_images=images)
        return TrainerEvaluator(
            model, source, trainer=settings.trainer, score=settings.score, checks=settings.checks
        )

    def result(self, extractor: Callable[[Subnet], Any] | None = None) -> SearchResult:
        """Return the result so far.

        Args:
            extractor: Returns a subnet as a module, for `result.extract`; `fit` passes its own.
        """
        return result_of(self._open(), extractor)

    def profile(
        self,
        model: Any = None,
        datamodule: Any = None,
        *,
        dataloaders: Any = None,
    ) -> Profile:
        """Return the feasibility by exact measures, before any budget is spent.

        Args:
            model: The model, where the space or an exact measure (`macs`) comes from it.
            datamodule: The data, where the model has no `example_input_array`.
            dataloaders: Validation dataloaders, instead of a datamodule.

        Returns:
            The range of every exact measure, the share of feasible subnets and, if there are none,
            the nearest.
        """
        if model is not None:
            from lightning_subnet.search.fit import profile_of

            nothing: dict[str, Any] = {"score": "network", "checks": False, "calibration_images": 0}
            evaluator = self._evaluator(model, datamodule, dataloaders, **nothing)
            return profile_of(self.plan, evaluator)
        if self.plan.space is None:
            msg = "This search has no space: call profile(model, datamodule), or give space=."
            raise SearchError(msg)
        return Profile.of(self.plan.problem(), seed=self.seed)

    def predictors(self) -> pd.DataFrame:
        """Return how well the expensive measures can be predicted from the evaluations so far.

        Returns:
            One row per measure that is not exact, of objectives and constraints: `predictor`, the
            one that the automatic choice takes; `tau`, Kendall's rank correlation on left-out
            folds, and its standard deviation over them, `spread`; `mape`, the mean absolute error
            in % of the value; and `n`, the evaluations that it knows.

        Raises:
            SearchError: Nothing was measured yet, or all measures are exact.
        """
        from lightning_subnet.predictors.quality import expensive_report

        if self.space is None:
            return expensive_report(self.name, None, None)
        problem = self._session.problem if self._session else self.plan.problem()
        return expensive_report(self.name, problem, self.history)


def result_of(session: Session, extractor: Callable[[Subnet], Any] | None = None) -> SearchResult:
    """Return the result of a session so far.

    Args:
        session: The search.
        extractor: Returns a subnet as a module, for `result.extract`.
    """
    return SearchResult(
        session.problem,
        session.history,
        name=session.study.name,
        verified=verified_values(session),
        extractor=extractor,
        measures={name: unit_and_conditions(m) for name, m in session.measures.items()},
    )
