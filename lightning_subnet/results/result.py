# SPDX-License-Identifier: Apache-2.0
"""SearchResult: a record with its network; tables, plots, files and modules are made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from lightning_subnet.errors import SearchError
from lightning_subnet.results.record import SearchRecord
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.history import Evaluation, History, Verified
from lightning_subnet.study.problem import Problem

if TYPE_CHECKING:
    import pandas as pd

    from lightning_subnet.export.exporting import Exported
    from lightning_subnet.results.sensitivity_report import ElasticityReport

_Module = TypeVar("_Module")


class SearchResult(SearchRecord):
    """The result of a search: its record, with tables, pictures, files and networks made of it.

    Args:
        problem: Space, objectives and constraints of the search.
        history: Its evaluations, in order.
        name: The study's name.
        verified: Second (value, standard error) of noisy measures, by name, by key of the subnet.
            They decide the front, beside the first ones in `history`.
        extractor: Returns a subnet as a module of its own.
        measures: By name of a measure its `unit` and, where it is noisy, its `conditions`.

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
        measures: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        super().__init__(problem, history, name=name, verified=verified, measures=measures)
        self._extractor = extractor

    @classmethod
    def of_record(
        cls, record: SearchRecord, extractor: Callable[[Subnet], Any] | None = None
    ) -> Self:
        """Return a record as a result, which knows its network if an extractor does."""
        return cls(
            record.problem,
            record.history,
            name=record.name,
            verified=record.verified,
            extractor=extractor,
            measures=record.measures,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Return all evaluations, with a column `front` that marks those on the front.

        A measure that was taken again has a column `<name>_verified` with its second values.
        """
        from lightning_subnet.results.tables import frame

        return frame(self)

    def plot(self, x: str | None = None, y: str | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the front and what else was measured; one objective is drawn over the evaluations.

        Args:
            x: The measure along x; by default the last objective.
            y: The measure along y; by default the first objective.
            ax: Matplotlib axes to draw on.

        Returns:
            `(fig, ax)`.
        """
        from lightning_subnet.results.plots import draw_front

        return draw_front(self, x=x, y=y, ax=ax)

    def elasticity(self, **options: Any) -> ElasticityReport:
        """Report which choices the measures of this search depend on; see `elasticity_report`.

        Args:
            **options: `metrics`, `predictor` and `seed`; `measures`, by default the exact ones.

        Raises:
            SearchError: Too few evaluations, or an unknown metric.
        """
        from lightning_subnet.results.sensitivity_report import elasticity_report

        options.setdefault("measures", list(self.problem.exact.values()))
        return elasticity_report(self.history.space, result=self, **options)

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
            ParityError: The outputs differ by more than rounding explains; see `Checks`.
        """
        if self._extractor is None:
            msg = (
                "This result does not know the network: only that of fit() does. Use "
                "lightning_subnet.extract(model, subnet), after recalibrate() where it has "
                "BatchNorm."
            )
            raise SearchError(msg)
        chosen = subnet.subnet if isinstance(subnet, Evaluation) else subnet
        chosen = self.history.space.subnet(chosen)
        return self._remembered(self._extractor(chosen), chosen)

    def _remembered(self, module: Any, subnet: Subnet, part: str = "") -> Any:
        """Return a module that knows which subnet it is, and what was measured of it."""
        from lightning_subnet.results.checkpoints import remember_subnet

        evaluation = self.final.get(subnet)
        values = evaluation.values if evaluation is not None and evaluation.ok else {}
        remember_subnet(module, subnet, self.history.space, part=part, values=values)
        return module

    def example_input(self) -> Any:
        """Return the input of the network for a few samples of the search.

        Returns:
            A tuple of positional arguments; if it gets some by name, a dict of all.

        Raises:
            SearchError: This result has no network, or no samples that it runs on.
        """
        example = getattr(self._extractor, "example", None)
        if example is None:
            msg = (
                "This result does not know the input of its network: only that of fit() does. "
                "Pass example_input=."
            )
            raise SearchError(msg)
        return example()

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
        """Validate the front on other data, or on all of it, and report by how much it is worse.

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
        from lightning_subnet.results.remeasure import validate_front
        from lightning_subnet.training.validation.frozen_data import Source

        if calibration_images is None:
            calibration_images = getattr(self._extractor, "images", 512)
        source = Source(
            datamodule, dataloaders, train_dataloaders, split, calibration_images=calibration_images
        )
        score: Any = getattr(self._extractor, "score", "network")
        return validate_front(self, model, source, trainer, score)

    def export(
        self,
        directory: str | Path,
        *,
        formats: Sequence[str] = ("onnx",),
        subnets: Iterable[Evaluation | Subnet] | None = None,
        example_input: Any = None,
        dynamic_batch: bool = True,
        tolerance: float | None = None,
    ) -> list[Exported]:
        """Write the front as files that give the same outputs, and a README.md that explains them.

        Each subnet is extracted as `extract` does and written as `lightning_subnet.export.export`
        does: run by the runtime of its format and compared. Names sort along the front. README.md
        and an `ExportWarning` name what a format cannot take, and the rest is written. With
        matplotlib there is a front.png.

        Args:
            directory: A folder that is new or empty.
            formats: Some of `"onnx"`, `"torch"` and `"openvino"`.
            subnets: Subnets or evaluations to write; None: the front.
            example_input: As the network takes it; None: samples of the search.
            dynamic_batch: As in `lightning_subnet.export.export`.
            tolerance: As in `lightning_subnet.export.export`.

        Returns:
            The files, along the front.

        Raises:
            ExportError: A format is unknown or its extra is not installed, the folder holds files,
                or nothing at all could be written.
            SearchError: As `extract`; or there is no example.
        """
        from lightning_subnet.results.front_export import FrontExport

        job = FrontExport(self, Path(directory), formats, subnets)
        example = self.example_input() if example_input is None else example_input
        return job.run(self.extract, example, dynamic_batch=dynamic_batch, tolerance=tolerance)

    def to_module(self, model: _Module, subnet: Evaluation | Subnet) -> _Module:
        """Return a copy of a model in which the super-network is this subnet alone, to train it on.

        The copy has the losses, metrics, optimizers and hyperparameters of the model and no
        Trainer. Where the elastic part is a child, what `extract` returns stands in its place.
        Where the model is the super-network, the copy keeps it with the subnet in force for good,
        unless its own `extract` makes a module to train. Checkpoints of the copy hold the subnet,
        and `load_subnet` rebuilds it from them in another project.

        Args:
            model: The module that was searched, or another of the same space.
            subnet: An evaluation, or a subnet of the space.

        Returns:
            The copy, in train mode where the model is; its weights learn where the model's do.

        Raises:
            SearchError: The model has no elastic part, cannot be copied, or is itself the
                super-network, and its `extract` returns a network without a training step.
            ParityError: As `extract`.
        """
        from lightning_subnet.results.standalone import name_of_part, standalone

        chosen = subnet.subnet if isinstance(subnet, Evaluation) else subnet
        chosen = self.history.space.subnet(chosen)
        same = getattr(self._extractor, "model", None) is model
        calls = getattr(self._extractor, "calls", ())
        module = standalone(model, chosen, self._extractor if same else None, calls)
        return self._remembered(module, chosen, name_of_part(model))  # type: ignore[no-any-return] # a copy of the model

    def remeasure(self, measure: Any, **options: Any) -> SearchResult:
        """Return the front alone with new values of one measure, from here or from elsewhere.

        Args:
            measure: `Latency(...)` or another measure, a function of a subnet, or a mapping from
                subnets to values, as they come back from a phone.
            **options: `model`, `example_input` and `name`; see `results.remeasured`.

        Raises:
            SearchError: There is no front, or all of it failed.
        """
        from lightning_subnet.results.remeasure import remeasured

        return self.of_record(remeasured(self, measure, **options), self._extractor)

    def save(self, path: str | Path) -> None:
        """Write everything but the code of the measures as JSON; `load` reads it back."""
        from lightning_subnet.results.files import write_record

        write_record(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StorageError: The file is not one of these.
        """
        from lightning_subnet.results.files import read_record

        return cls.of_record(read_record(Path(path)))

    def __str__(self) -> str:
        from lightning_subnet.results.tables import text

        return text(self)
