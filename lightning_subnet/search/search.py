# SPDX-License-Identifier: Apache-2.0
"""SubnetSearch: the search as its user sees it. Settings here, the work in `Session`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_subnet._messages import did_you_mean
from lightning_subnet.errors import SearchError, TellError
from lightning_subnet.results.result import SearchResult
from lightning_subnet.search.budget import Budget
from lightning_subnet.search.loop import loop
from lightning_subnet.search.profile import Profile
from lightning_subnet.search.session import Session
from lightning_subnet.search.settings import parse
from lightning_subnet.search.study_header import Resume, make_header, open_study
from lightning_subnet.search.warm_start import WarmStart, most_of
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.study import measures as measures_module
from lightning_subnet.study.evaluators import Evaluator
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.measures import Measure, NetworkMeasure
from lightning_subnet.study.problem import Problem

if TYPE_CHECKING:
    import pandas as pd

    from lightning_subnet.study.storage import Storage

_log = logging.getLogger(__name__)


class SubnetSearch:
    """A search for the best subnets of a space.

    Three ways to run it: `fit(model, datamodule)` drives a Lightning Trainer; `run(evaluator)`
    calls a function or a table; `ask()` and `tell()` leave the loop to you. All of them commit
    every step to `storage`, and a search of the same `name` goes on where the last one stopped,
    exactly.

    Args:
        objectives: What to optimise: `{"val_acc": "max", "macs": "min"}`, in any number.
        constraints: What must hold: `{"macs": "<= 3e8"}`, or relative to the largest subnet
            `{"params": "<= 60%"}`; several bounds on one measure as a list.
        space: What may vary. `fit` takes it from the model, unless a part of the model's space is
            given here, such as `space.restricted_to(...)`.
        measures: Measures that the search computes. Names that are not among them are told by you,
            or measured by the evaluator.
        strategy: A name (`lightning_subnet.strategies.names()`) or a `Strategy`.
        budget: How many evaluations to make, or a `Budget`.
        storage: A database URL, or a `Storage` that several searches share; None keeps the study
            in memory.
        name: The study's name, by which it is resumed. None makes a new name each time.
        seed: The seed of all proposals.
        resume: What to do with an existing study of that name: `"auto"` goes on with it, `"never"`
            refuses, `"must"` refuses if there is none.
        warm_start: What to measure first: subnets or evaluations; or the front of a result, of a
            study by name (`"cpu"`) in this storage, or elsewhere (`("sqlite:///b.db", "cpu")`), at
            most a fifth of the budget; or a list of these. A study keeps what it started from.
        trainer: The Trainer that `fit` validates with.
        calibration_images: How many training samples `fit` recalibrates BatchNorm with, before each
            validation; 0 leaves its statistics alone.
        verify_front: Let `fit` end with a second measurement of noisy measures (latency) on the
            front, outside the budget, so that a lucky draw does not win.

    Raises:
        SubnetError: Any argument that makes no sense; each says what was expected.
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
    ) -> None:
        self._settings = {
            key: value for key, value in locals().items() if key not in ("self", "__class__")
        }
        parsed = parse(self._settings)
        self.objectives, self.constraints = parsed.objectives, parsed.constraints
        self.measures, self.strategy, self.budget = parsed.measures, parsed.strategy, parsed.budget
        self.seed, self.calibration_images = parsed.seed, parsed.calibration_images
        self.name, self.trainer, self.verify_front = parsed.name, trainer, bool(verify_front)
        from lightning_subnet.study.storage import Storage

        self._storage = storage if isinstance(storage, Storage) else Storage(storage)
        self.warm_start = self._settings["warm_start"] = WarmStart.of(warm_start, self._storage)
        self._session: Session | None = None
        if space is not None:
            self._make_problem(space, self.measures)  # what makes no sense shows now
            self._first(space)
            self._load(space)
        elif self._storage.find_study(self.name) is None:
            self.warm_start.check()

    def replace(self, **changes: Any) -> SubnetSearch:
        """Return a search with the same settings but for the given ones.

        Example:
            >>> from lightning_subnet import SearchSpace
            >>> search = SubnetSearch(space=SearchSpace(depth=[1, 2]), objectives={"error": "min"},
            ...                       storage=None)
            >>> search.replace(seed=3).seed
            3
        """
        if unknown := [key for key in changes if key not in self._settings]:
            hint = did_you_mean(unknown[0], self._settings)
            msg = f"{unknown[0]!r} is no setting of a search.{hint}"
            raise SearchError(msg)
        return SubnetSearch(**{**self._settings, **changes})

    # Setting up

    def _make_problem(self, space: SearchSpace, measures: Sequence[Measure]) -> Problem:
        return Problem.of(space, self.objectives, self.constraints, measures)

    def _first(self, space: SearchSpace, before: Sequence[Subnet] = ()) -> list[Subnet]:
        """Return what is measured first; of an existing study what it was then."""
        stored = self.warm_start.stored(self._storage.find_study(self.name), space)
        if stored is not None:
            return stored
        most = most_of(self.budget.evaluations, self.strategy.batch_size)
        return [*map(space.subnet, before), *self.warm_start.subnets(space, most=most)]

    def _load(self, space: SearchSpace) -> None:
        """Open an existing study at once, so that a mismatch shows now; `fit` opens its own."""
        study = self._storage.find_study(self.name)
        by_fit = study is not None and study.header["evaluator"]
        loose = any(not isinstance(item, Measure) for item in self.measures)
        if (study is not None or self._settings["resume"] == "must") and not by_fit and not loose:
            self._start(space, self.measures)

    def _start(
        self,
        space: SearchSpace,
        measures: Sequence[Measure],
        *,
        first: Sequence[Subnet] = (),
        conditions: Mapping[str, Any] | None = None,
    ) -> Session:
        """Open or create the study and the session over it."""
        problem = self._make_problem(space, measures)
        first = [*first, *([space.largest] if problem.needs_reference else [])]
        first = self._first(space, first)
        header = make_header(
            problem,
            self.strategy,
            measures=measures,
            conditions=conditions or {},
            seed=self.seed,
            first=first,
            warm_from=self.warm_start.names,
        )
        study = open_study(self._storage, self.name, header, problem, self._settings["resume"])
        self._session = Session(
            problem,
            self.strategy,
            measures=measures_module.by_name(measures),
            study=study,
            budget=self.budget,
            seed=self.seed,
            first=first,
        )
        if len(self._session.history):
            _log.info(
                "Study %r goes on after %d evaluations.", self.name, len(self._session.history)
            )
        return self._session

    def _opened(self) -> Session:
        """Return the session, opening the study on first use."""
        if self._session is None:
            space = self._settings["space"]
            if loose := [m for m in self.measures if not isinstance(m, Measure)]:
                msg = (
                    f"{loose[0].name!r} measures networks, and this search has none. Call "
                    "fit(model, datamodule), or leave it out of measures= and tell its values."
                )
                raise SearchError(msg)
            if space is None:
                msg = (
                    "This search has no space. Give space=SearchSpace({...}) for ask/tell and "
                    "run(), or call fit(model, datamodule), which takes it from the model."
                )
                raise SearchError(msg)
            self._start(space, self.measures)
        assert self._session is not None
        return self._session

    @property
    def space(self) -> SearchSpace | None:
        """What may vary; None before `fit` if the model brings it."""
        return self._session.problem.space if self._session else self._settings["space"]

    @property
    def history(self) -> History:
        """All evaluations so far, those of earlier runs of the study too."""
        space = self._settings["space"]
        if self._session is None and space is not None:  # nothing is created by looking
            study = self._storage.find_study(self.name)
            return History(space, study.evaluations(space) if study else ())
        return self._opened().history

    # Running

    def ask(self, n: int = 1) -> list[Subnet]:
        """Return 1 to n subnets to measure, or an empty list when the search is over.

        They come from the open generation, so there may be fewer than n. A new process first gets
        those that an earlier one was given and never told.

        Args:
            n: How many at most.

        Raises:
            SearchError: n is not positive, or the search has no space.
        """
        return self._opened().ask(n)

    def tell(
        self,
        subnet: Subnet | Mapping[str, Any],
        values: Mapping[str, Any] | None = None,
        /,
        **more: Any,
    ) -> Evaluation:
        """Record what was measured of a subnet.

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
            TellError: The subnet was told before, or a value is missing, unknown or no number;
                nothing is recorded then.
        """
        if values is not None and not isinstance(values, Mapping):
            msg = (
                f"tell() got {values!r:.60} as the values. "
                "Give them by name of measure: tell(subnet, error=0.1)."
            )
            raise TellError(msg)
        return self._opened().tell(subnet, {**(values or {}), **more})

    def fail(self, subnet: Subnet | Mapping[str, Any], reason: str) -> Evaluation:
        """Record that a subnet could not be measured, and why."""
        return self._opened().fail(subnet, reason)

    def run(self, evaluator: Evaluator | None = None, *, progress: bool = True) -> SearchResult:
        """Measure subnets with an evaluator until the budget is spent or the space exhausted.

        Args:
            evaluator: Measures what `measures=` does not compute.
            progress: Show progress.

        Returns:
            What was found.
        """
        if evaluator is not None and not isinstance(evaluator, Evaluator):
            msg = (
                f"run({evaluator!r:.60}) is no evaluator. "
                "Wrap a function that returns values by name: run(FunctionEvaluator(fn))."
            )
            raise SearchError(msg)
        session = self._opened()
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
            What was found.

        Raises:
            SearchError: The model is no super-network, data is missing, nothing satisfies the exact
                constraints, or the first five evaluations fail (and are not recorded).
            MeasurementError: An objective is never logged, or not reduced over processes.
        """
        return self._fit(
            model,
            trainer=self.trainer,
            progress=progress,
            datamodule=datamodule,
            dataloaders=dataloaders,
            train_dataloaders=train_dataloaders,
        )

    def _fit(
        self, model: Any, *, trainer: Any, progress: bool, loggers: Sequence[Any] = (), **data: Any
    ) -> SearchResult:
        from lightning_subnet.search.fit import run_fit

        return run_fit(self, model, trainer=trainer, progress=progress, loggers=loggers, **data)

    def result(self, extractor: Callable[[Subnet], Any] | None = None) -> SearchResult:
        """Return what was found so far.

        Args:
            extractor: Gives a subnet as a module, for `result.extract`; `fit` passes its own.
        """
        return SearchResult.of(self._opened(), self.name, extractor)

    def profile(
        self,
        model: Any = None,
        datamodule: Any = None,
        *,
        dataloaders: Any = None,
    ) -> Profile:
        """Say what the exact measures allow, before any budget is spent.

        Args:
            model: The model, where the space or an exact measure (`macs`) comes from it.
            datamodule: The data, where the model has no `example_input_array`.
            dataloaders: Validation dataloaders, instead of a datamodule.

        Returns:
            The range of every exact measure, the share of feasible subnets and, if there are none,
            the nearest.
        """
        space = self._settings["space"]
        if model is not None:
            from lightning_subnet.search.fit import profile_of

            return profile_of(self, model, datamodule, dataloaders)
        if space is None:
            msg = "This search has no space: call profile(model, datamodule), or give space=."
            raise SearchError(msg)
        return Profile.of(self._make_problem(space, self.measures), seed=self.seed)

    def predictors(self) -> pd.DataFrame:
        """Say how well the expensive measures can be predicted from what was measured so far.

        Returns:
            One row per measure that is not exact, of objectives and constraints: `predictor`, what
            the automatic choice takes; `tau`, Kendall's rank correlation on left-out folds, and its
            standard deviation over them, `spread`; `mape`, the mean absolute error in % of the
            value; and `n`, the evaluations that it knows.

        Raises:
            SearchError: Nothing was measured yet, or all measures are exact.
        """
        from lightning_subnet.predictors.quality import expensive_report

        if (space := self.space) is None:
            return expensive_report(self.name, None, None)
        problem = self._session.problem if self._session else None
        problem = problem or self._make_problem(space, self.measures)
        return expensive_report(self.name, problem, self.history)
