# SPDX-License-Identifier: Apache-2.0
"""SearchResult: the front, the best subnet under bounds, a second look, tables, plots, a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_subnet import pareto
from lightning_subnet.errors import (
    NoFeasibleSubnet,
    ObjectiveError,
    SearchError,
    StorageError,
    did_you_mean,
    listed,
)
from lightning_subnet.history import Evaluation, History
from lightning_subnet.objectives import (
    Constraint,
    Objective,
    minimised,
    parse_constraints,
    violation,
)
from lightning_subnet.problem import Problem
from lightning_subnet.space import SearchSpace
from lightning_subnet.studies import check_part
from lightning_subnet.subnet import Subnet
from lightning_subnet.verification import Verified, with_verified

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "lightning-subnet result 1"


class SearchResult:
    """What a search found.

    Args:
        problem: What was searched.
        history: What was measured.
        name: The study's name.
        verified: Second (value, standard error) of noisy measures, by name, by key of the subnet.
            They decide the front, beside the first ones in `history`.
        extractor: Gives a subnet as a module of its own.

    Attributes:
        final: The history with second values in place of the first; what the front is made of.

    Example:
        >>> from lightning_subnet import FunctionEvaluator, SearchSpace, SubnetSearch
        >>> search = SubnetSearch(space=SearchSpace(depth=[1, 2, 3, 4]), storage=None, budget=4,
        ...                       objectives={"error": "min", "depth_cost": "min"},
        ...                       strategy="random")
        >>> result = search.run(progress=False, evaluator=FunctionEvaluator(
        ...     lambda s: {"error": 1 / s["depth"], "depth_cost": s["depth"]}))
        >>> len(result.front), result.best("error", where={"depth_cost": "<= 2"}).subnet
        (4, Subnet(depth=2))
    """

    def __init__(
        self,
        problem: Problem,
        history: History,
        *,
        name: str = "",
        verified: Verified | None = None,
        extractor: Callable[[Subnet], Any] | None = None,
    ) -> None:
        self.problem = problem
        self.history = history
        self.name = name
        self.verified = dict(verified or {})
        self._extractor = extractor
        self.final = with_verified(history, self.verified) if self.verified else history

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What was optimised."""
        return self.problem.objectives

    @property
    def front(self) -> History:
        """The non-dominated, feasible evaluations, ordered by the first objective, best first."""
        return History(self.history.space, self.problem.front(self.final))

    @property
    def knee(self) -> Evaluation:
        """The evaluation of the front where giving up one objective stops to buy much of another.

        Raises:
            NoFeasibleSubnet: The front is empty.
        """
        front = self.front
        if not len(front):
            self._nothing("feasible", front)
        columns = {o.name: front.column(o.name) for o in self.objectives}
        return front[pareto.knee(minimised(self.objectives, columns))]

    def best(
        self, name: str, *, where: Mapping[str, str | Sequence[str]] | None = None
    ) -> Evaluation:
        """Return the best feasible evaluation by one measure.

        Args:
            name: An objective, or any recorded measure (then the smallest is the best).
            where: Further bounds, as in `constraints=`: `{"latency_ms": "<= 12"}`.

        Returns:
            The evaluation; of several equally good ones the first that no other dominates.

        Raises:
            NoFeasibleSubnet: Nothing satisfies the bounds; the error names the nearest.
            ObjectiveError: A measure that was not recorded.
        """
        recorded = dict.fromkeys(
            [*self.problem.names, *(key for e in self.final for key in e.values)]
        )
        bounds = parse_constraints(where)
        for key in [name, *(c.name for c in bounds)]:
            if key not in recorded and len(self.final):
                msg = (
                    f"{key!r} was not recorded.{did_you_mean(key, recorded)} "
                    f"Recorded: {listed(recorded)}."
                )
                raise ObjectiveError(msg)
        sign = (
            -1.0 if any(o.name == name and o.direction == "max" for o in self.objectives) else 1.0
        )
        extra = [self._absolute(c) for c in bounds]
        columns = {c.name: self.final.column(c.name) for c in extra}
        missed = self.problem.scores(self.final)[1] if len(self.final) else np.zeros(0)
        missed = missed + violation(extra, columns, len(self.final))
        values = sign * self.final.column(name)
        usable = (missed <= 0) & np.isfinite(values)
        if not usable.any():
            nearest = None
            if np.isfinite(missed).any():
                nearest = self.final[int(np.argmin(np.where(np.isfinite(missed), missed, np.inf)))]
            self._nothing(" and ".join(map(str, (*self.problem.constraints, *bounds))), nearest)
        equal = np.flatnonzero(usable & (values == values[usable].min()))
        F = self.minimised()[equal]  # of equally good ones, one that no other dominates
        return self.final[int(equal[np.argmax(pareto.nondominated(F))])]

    def _absolute(self, constraint: Constraint) -> Constraint:
        if not constraint.relative:
            return constraint
        largest = self.final.get(self.final.space.largest)
        return constraint.absolute(
            np.nan if largest is None else largest.values.get(constraint.name, np.nan)
        )

    def _nothing(self, asked: str, nearest: Any) -> None:
        failures = [e.reason for e in self.final if not e.ok]
        if isinstance(nearest, Evaluation):
            near = f"The nearest: {nearest}."
        elif failures:
            near = f"All {len(failures)} evaluations failed, the last with: {failures[-1]}."
        else:
            near = "Nothing was measured yet."
        msg = f"None of {len(self.final)} evaluations is {asked or 'successful'}. {near}"
        raise NoFeasibleSubnet(msg, nearest if isinstance(nearest, Evaluation) else None)

    def minimised(self) -> npt.NDArray[np.float64]:
        """Return all objectives, to be minimised, (n, m); NaN if infeasible or failed."""
        if not len(self.final):
            return np.zeros((0, len(self.objectives)))
        F, missed = self.problem.scores(self.final)
        return np.where((missed > 0)[:, None], np.nan, F)

    def hypervolume(self, reference: Mapping[str, float]) -> float:
        """Return the hypervolume of the front.

        Args:
            reference: A value of each objective that is worse than all that should count.

        Raises:
            ObjectiveError: An objective is missing from the reference.
        """
        if missing := [o.name for o in self.objectives if o.name not in reference]:
            msg = (
                f"The reference has no {missing[0]!r}. "
                f"Give a value for each of {listed(o.name for o in self.objectives)}."
            )
            raise ObjectiveError(msg)
        columns = {o.name: np.array([float(reference[o.name])]) for o in self.objectives}
        return pareto.hypervolume(self.minimised(), minimised(self.objectives, columns)[0])

    def to_dataframe(self) -> pd.DataFrame:
        """Return all evaluations, with a column `front` that marks those on the front.

        A measure that was taken again has a column `<name>_verified` with its second values.
        """
        frame = self.history.to_dataframe()
        again = [self.verified.get(e.subnet.key, {}) for e in self.history]
        for name in dict.fromkeys(key for pairs in again for key in pairs):
            frame[f"{name}_verified"] = [pairs.get(name, (np.nan, 0.0))[0] for pairs in again]
        on_front = {evaluation.number for evaluation in self.front}
        frame["front"] = [number in on_front for number in frame.index]
        return frame

    def plot(self, x: str | None = None, y: str | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the front and what else was measured; one objective is drawn over the evaluations.

        Args:
            x: The measure along x; by default the last objective.
            y: The measure along y; by default the first objective.
            ax: Matplotlib axes to draw on.

        Returns:
            `(fig, ax)`.
        """
        from lightning_subnet.plotting import draw_front

        return draw_front(self, x=x, y=y, ax=ax)

    def extract(self, subnet: Evaluation | Subnet) -> Any:
        """Return a subnet as a module of its own, with its own BatchNorm statistics.

        Args:
            subnet: An evaluation, or a subnet of the space, measured or not.

        Returns:
            The network in eval mode, as `lightning_subnet.extract` gives it, with a copy of the
            weights that the model has now: the elastic part of the model, without Trainer, loss and
            metrics. Its attribute `parity` is the largest absolute difference of its outputs to
            those of the super-network with this subnet in force, on a batch of samples.

        Raises:
            SearchError: This result has no network: it was loaded, or came from `run` or `ask`.
        """
        if self._extractor is None:
            msg = (
                "This result does not know the network: only that of fit() does. Use "
                "lightning_subnet.extract(model, subnet), after recalibrate() where it has "
                "BatchNorm."
            )
            raise SearchError(msg)
        chosen = subnet.subnet if isinstance(subnet, Evaluation) else subnet
        return self._extractor(self.history.space.subnet(chosen))

    def verify(
        self,
        model: Any,
        datamodule: Any = None,
        *,
        dataloaders: Any = None,
        train_dataloaders: Any = None,
        split: Literal["val", "test"] = "val",
        trainer: Any = None,
        calibration_images: int | None = None,
    ) -> pd.DataFrame:
        """Validate the front on other data, or on all of it, and report what is lost.

        A search picks the best of many values on the same samples, so its winners are a little
        flattered by them.

        Args:
            model: The LightningModule that was searched.
            datamodule: Data, as for `fit`.
            dataloaders: Dataloaders to validate on, instead.
            train_dataloaders: Training data that recalibrates BatchNorm, beside `dataloaders`.
            split: `"test"` validates on the datamodule's `test_dataloader` (by `validation_step`,
                under the names that it logs).
            trainer: The Trainer that validates; None makes one on one device.
            calibration_images: As in `SubnetSearch`; None takes as many as the search did.

        Returns:
            One row per subnet of the front, by number of evaluation: for each objective that the
            model logs, its value in the search, the new one (`<name>_verified`) and by how much
            that is worse (`<name>_drop`).

        Raises:
            SearchError: As `fit`.
        """
        import pandas as pd

        from lightning_subnet.data import Source
        from lightning_subnet.trainer_evaluator import TrainerEvaluator

        if calibration_images is None:
            calibration_images = getattr(self._extractor, "images", 512)
        source = Source(
            datamodule, dataloaders, train_dataloaders, split, calibration_images=calibration_images
        )
        front = self.front
        rows: list[dict[str, float]] = []
        with TrainerEvaluator(model, source, trainer=trainer) as evaluator:
            check_part(self.history.space, evaluator.space)
            for evaluation in front:
                logged = evaluator.evaluate(evaluation.subnet)
                rows.append({})
                if not any(o.name in logged for o in self.objectives):
                    msg = f"No objective was logged; logged: {listed(logged)}."
                    raise SearchError(msg)
                for objective in (o for o in self.objectives if o.name in logged):
                    name, worse = objective.name, 1.0 if objective.direction == "max" else -1.0
                    before, now = evaluation.values[name], float(logged[name])
                    rows[-1][name] = before
                    rows[-1][f"{name}_verified"] = now
                    rows[-1][f"{name}_drop"] = worse * (before - now)
        return pd.DataFrame(rows, index=pd.Index([e.number for e in front], name="number"))

    def remeasure(self, measure: Any, **options: Any) -> SearchResult:
        """Return the front alone with new values of one measure, from here or from elsewhere.

        Args:
            measure: `Latency(...)` or another measure, a function of a subnet, or a mapping from
                subnets to values, as they come back from a phone.
            **options: `model`, `example_input` and `name`; see `remeasuring.remeasured`.

        Raises:
            SearchError: There is no front, or all of it failed.
        """
        from lightning_subnet.remeasuring import remeasured

        problem, history, name = remeasured(self, measure, **options)
        return SearchResult(problem, history, name=name, extractor=self._extractor)

    def save(self, path: str | Path) -> None:
        """Write everything but the code of the measures as JSON; `load` reads it back."""
        data = {
            "format": _FORMAT,
            "name": self.name,
            "space": self.history.space.to_json(),
            "objectives": {o.name: o.direction for o in self.objectives},
            "constraints": [c.to_json() for c in self._stored_constraints()],
            "evaluations": [evaluation.to_json() for evaluation in self.history],
            "verified": self.verified,
        }
        Path(path).write_text(json.dumps(data, indent=1), encoding="utf-8")

    def _stored_constraints(self) -> tuple[Constraint, ...]:
        """Return the constraints with absolute bounds where an exact measure gave the reference."""
        exact = self.problem.exact_constraints
        return exact + tuple(
            c for c in self.problem.constraints if c.name not in self.problem.exact
        )

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what `save` wrote.

        Raises:
            StorageError: Not such a file.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise KeyError(data["format"])
            space = SearchSpace.from_json(data["space"])
            objectives = tuple(Objective(name, d) for name, d in data["objectives"].items())
            constraints = tuple(Constraint(**c) for c in data["constraints"])
            history = History(space, (Evaluation.from_json(e, space) for e in data["evaluations"]))
            verified = {
                key: {name: (float(value), float(error)) for name, (value, error) in pairs.items()}
                for key, pairs in data.get("verified", {}).items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            msg = (
                f"{path} holds no search result ({error!r:.80}). Write one with result.save(path)."
            )
            raise StorageError(msg) from error
        problem = Problem(space, objectives, constraints)
        return cls(problem, history, name=data["name"], verified=verified)

    def __str__(self) -> str:
        try:
            front = self.front
        except ObjectiveError as error:  # a relative bound whose reference failed
            return f"{self.name}: {len(self.history)} evaluations, no front. {error}"
        failed = int((~self.history.ok).sum()) if len(self.history) else 0
        head = (
            f"{self.name}: {len(self.history)} evaluations, {failed} failed, "
            f"{len(front)} on the front of {self.history.space.size:,} subnets"
        )
        if not len(front):
            return head
        names = list(dict.fromkeys([*self.problem.names, *(k for e in front for k in e.values)]))
        shown = [
            [f"{e.number}", *(f"{e.values.get(n, float('nan')):.6g}" for n in names)] for e in front
        ]
        rows = [["#", *names], *shown]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        subnets = ["subnet", *(repr(e.subnet)[7:-1] for e in front)]
        table = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            + "  "
            + subnet
            for row, subnet in zip(rows, subnets, strict=True)
        ]
        return "\n".join([head, *table])

    def __repr__(self) -> str:
        if self.problem.needs_reference:
            return f"<SearchResult {self.name!r}: {len(self.history)} evaluations>"
        return (
            f"<SearchResult {self.name!r}: {len(self.history)} evaluations, "
            f"{len(self.front)} on the front>"
        )
