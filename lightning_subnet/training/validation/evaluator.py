# SPDX-License-Identifier: Apache-2.0
"""The evaluator that drives a Lightning Trainer: `trainer.validate` per subnet, on frozen data."""

from __future__ import annotations

import logging
import types
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lightning_subnet._json import digest
from lightning_subnet._messages import warn
from lightning_subnet._torch.contexts import evaluating, muted, random_state
from lightning_subnet._torch.fingerprints import (
    code_fingerprint,
    data_fingerprint,
    hashed,
    stable_text,
)
from lightning_subnet._torch.inputs import arguments, cloned
from lightning_subnet.costs.resolve import MEASURES, ValidationSample, measure_names, resolve
from lightning_subnet.elasticity.ends import check_ends
from lightning_subnet.elasticity.parity import Call
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import MeasurementError, PluginWarning, SearchError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.evaluators import Evaluator, Measured
from lightning_subnet.study.history import Evaluation
from lightning_subnet.study.measures import Measure, NetworkMeasure
from lightning_subnet.training._lightning import (
    Callback,
    LightningModule,
    Trainer,
    check,
    check_idle,
    default_trainer,
    gather,
    in_precision,
    is_overridden,
    launch,
    quiet,
    restore_metrics,
    run_validation_step,
    transfer,
)
from lightning_subnet.training.validation.batch_input import (
    calls_of,
    few_rows,
    first_input,
    model_input,
    network_of,
    run_on,
)
from lightning_subnet.training.validation.checks import FORMATS, Checks, Score, checked_score
from lightning_subnet.training.validation.extractor import Extractor
from lightning_subnet.training.validation.frozen_data import FrozenData, Source, frozen_data
from lightning_subnet.training.validation.gathered import GatheredState, attributes_digest
from lightning_subnet.training.validation.guards import (
    OwnWeights,
    Passed,
    WeightGuard,
    check_logged,
    check_repeats,
    warn_of_renewal,
)
from lightning_subnet.training.validation.parity import check_subnets, runs
from lightning_subnet.training.validation.place import Place
from lightning_subnet.training.validation.recalibration import Recalibration
from lightning_subnet.training.validation.restore import module_state
from lightning_subnet.training.validation.scoring import (
    Conversion,
    Extraction,
    InForce,
    extracted,
)

_log = logging.getLogger(__name__)

# The same for every search, so that strategies and seeds are compared on the same data.
_SEED = 0
_ROWS = 16  # of a batch, on which outputs are compared


class TrainerEvaluator(Evaluator):
    """Validates subnets of a LightningModule; use it as a context.

    On entering, the data is set up once, under a seed. Before each validation BatchNorm statistics
    are reset and averaged over the same training samples, and what the module has gathered is
    emptied. On leaving, the module, the datamodule, the trainer and all random states are as they
    were. With several processes all of them evaluate the same subnet, each on its share of the
    batches.

    Args:
        model: A LightningModule that is elastic or has exactly one elastic descendant.
        source: Its data.
        trainer: The Trainer that validates; None makes one on one device.
        loggers: Get one row per evaluation, besides those of the trainer.
        hashes: Whether weights, data and code are hashed, for values that are to be stored.
        score: `"network"` validates the super-network with the subnet in force, `"extracted"` the
            extracted subnet in its place, `"onnxruntime"` and `"openvino"` its file.
        checks: What is checked of the numbers.

    Attributes:
        provenance: What a metric depends on besides the subnet, by name, mostly as hashes; empty
            before the context is entered.
        score: How subnets are scored: as asked for, or `"extracted"` where the super-network does
            not run in eval mode.
        passed: The checks that the model has passed in this process.
        directions: `"max"` or `"min"` of the metrics that the search optimises, where it says so.

    Raises:
        SearchError: The parts do not fit; nothing has been measured then.
    """

    def __init__(
        self,
        model: LightningModule,
        source: Source,
        *,
        trainer: Trainer | None = None,
        loggers: Sequence[Any] = (),
        hashes: bool = True,
        score: Score = "network",
        checks: Checks | bool = True,
    ) -> None:
        trainer = default_trainer() if trainer is None else trainer
        check(model, source.datamodule, trainer)
        check_idle(trainer)
        if is_overridden("configure_model", model):
            model.configure_model()  # which may build the network; Lightning calls it again
        self._model = model
        self._source = source
        self._loggers = [*trainer.loggers, *loggers]
        self.trainer = trainer
        self._elastic = elastic_part(model)
        space = self._elastic.search_space()
        if not isinstance(space, SearchSpace):
            msg = (
                f"{type(self._elastic).__name__}.search_space() returned {space!r:.60}. "
                "Return a SearchSpace."
            )
            raise SearchError(msg)
        self.space = space
        self.score: Score = checked_score(score)
        self.checks = Checks.of(checks)
        self.directions: Mapping[str, str] = {}
        self._place = Place(model, self._elastic)
        self._stack = ExitStack()
        self._data = FrozenData()
        self._in_force = InForce(self._elastic)
        self._recalibration: Recalibration | None = None
        self._extraction: Extraction | None = None
        self._calls: list[Call] | None = None
        self._guard: WeightGuard | None = None
        self._own_weights: OwnWeights | None = None
        self._first: tuple[Subnet, dict[str, float]] | None = None  # that was scored, with metrics
        self._changed_by_first: list[str] = []  # attributes
        self._unchecked = True  # whether no score was compared yet
        self._needed: frozenset[str] = frozenset()
        self._to_log: frozenset[str] = frozenset()
        self.built_in = tuple(measure_names())
        self._of_plugins: list[str] = []
        self.provenance: dict[str, str] = {}
        self._hashes = hashes
        self._digest = ""
        self.passed = Passed(model, None)

    def __enter__(self) -> TrainerEvaluator:
        before = getattr(self._elastic, "active_subnet", None)
        with ExitStack() as stack:
            stack.enter_context(random_state(_SEED))
            launch(self.trainer)
            stack.enter_context(restore_metrics(self.trainer))
            stack.callback(self._elastic.activate, before or self.space.largest)
            self._buffers = stack.enter_context(module_state(self._model, self._source.datamodule))
            self._data = stack.enter_context(frozen_data(self._model, self._source, self.trainer))
            # As a validation would; so costs are of the same types before and after the first.
            self.trainer.precision_plugin.convert_module(self._model)
            self._gathered = GatheredState(self._model, self._elastic)
            stack.callback(self._gathered.restore)
            if self.checks.weights:
                self._guard = WeightGuard(self._model)
                self._own_weights = OwnWeights(self._guard, self._place)
            if self._data.calibration:
                self._recalibration = Recalibration(self._data, self._place)
            if self.checks.parity or self.score != "network":
                self._choose_score()
            if self._hashes:
                self.provenance = self._provenance()
                self._elastic.activate(self.space.largest)  # which may set attributes
                key = (digest(self.provenance), attributes_digest(self._model), self.checks)
                self.passed = Passed(self._model, key)
            self._digest = digest(self.provenance)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        try:
            for logger in self._loggers:
                logger.save()
        finally:
            self._stack.close()

    def _provenance(self) -> dict[str, str]:
        weights = {**dict(self._model.named_buffers()), **self._model.state_dict()}
        calibration = [self._data.images, self._data.calibration]
        return {
            "weights": hashed([list(item) for item in sorted(weights.items())], size=8),
            "data": "+".join(gather(self.trainer, data_fingerprint(self._data.loaders))),
            "calibration": hashed(calibration, size=8) if self._data.calibration else "none",
            "code": code_fingerprint(self._model),
            "hparams": str({k: stable_text(v) for k, v in sorted(self._model.hparams.items())}),
            "precision": str(self.trainer.precision),
            "limit_val_batches": str(self.trainer.limit_val_batches),
            # Studies of super-networks in force were made before there was another way.
            **({} if self.score == "network" else {"score": self.score}),
        }

    def fingerprint(self, name: str) -> str | None:
        """Return the fingerprint of a logged metric."""
        return f"{name}:{self._digest}"

    def bound_measures(
        self, measures: Sequence[Measure | NetworkMeasure], names: Sequence[str]
    ) -> list[Measure]:
        """Return the user's measures, and the built-in ones of these names.

        Args:
            measures: The user's; those of any network are bound to this one.
            names: Names of measures that the search needs, and of logged metrics.
        """
        self._needed = frozenset(names)
        self._to_log = self._needed - {*self.built_in, *(measure.name for measure in measures)}
        built_in = [name for name in names if name in self.built_in]
        self._of_plugins = [name for name in built_in if name in MEASURES.plugins]
        sample = ValidationSample(self._example, self._call)
        return [*resolve(self._model, measures, built_in, sample).values()]

    def _example(self) -> Any:
        """Return one sample, as the module's forward takes it."""
        example = self._model.example_input_array
        if example is None:
            return first_input(self._data.loaders, self._model)
        return tree_map(lambda x: x[:1] if isinstance(x, torch.Tensor) and x.ndim else x, example)

    def _call(self) -> Call | None:
        """Return the arguments that the elastic part gets of one sample in a validation."""
        return few_rows(self.calls[0], 1) if self.calls else None

    @property
    def n_samples(self) -> int:
        """The number of validation samples in memory; 0 if they are not there."""
        return self._data.n_samples

    # What is scored

    @property
    def calls(self) -> list[Call]:
        """Arguments of the elastic part's forward pass in a validation, on a few samples."""
        if self._calls is None:
            self._calls, _ = self._first_calls()
        return self._calls

    def _first_calls(self) -> tuple[list[Call], Exception | None]:
        """Return the arguments of the part in the first validation step, and what ended that.

        If it runs the part in another way, they are those of its forward pass on a batch, or on
        the module's example.
        """
        model, part = self._model, self._place.part
        several = len(self._data.loaders) > 1
        batch = next(iter(self._data.loaders[0]))

        def step() -> None:
            ready = transfer(self.trainer, model, cloned(batch), _device(model))
            run_validation_step(model, ready, several=several)

        def forward() -> None:
            run = network_of(model, part)
            ready = transfer(self.trainer, model, cloned(batch), _device(model))
            run_on(run, model_input(ready, model))

        def example() -> None:
            args, kwargs = arguments(model, model.example_input_array)
            model(*args, **kwargs)

        first: Exception | None = None
        for run in (step, forward, example):
            with ExitStack() as stack:
                stack.callback(self._gathered.restore)
                stack.callback(self._buffers.restore_values)
                stack.enter_context(random_state(_SEED))
                stack.enter_context(quiet(self.trainer, []))
                stack.enter_context(muted(model))
                stack.enter_context(evaluating(model))
                stack.enter_context(torch.no_grad())
                stack.enter_context(in_precision(self.trainer))
                part.activate(self.space.largest)
                calls, error = calls_of(part, run)
            first = first or error
            if calls:
                return [few_rows(call, _ROWS) for call in calls], first
        return [], first

    def _choose_score(self) -> None:
        """Find out whether the super-network can be validated in place, or its subnets apart."""
        self._calls, error = self._first_calls()
        if self._guard is not None:
            self._guard.check()
        part, name = self._place.part, type(self._elastic).__name__
        if self.score == "network":
            reason = runs(part, self._calls[0]) if error is not None and self._calls else None
            if reason is None or not callable(getattr(part, "extract", None)):
                return  # an error of the step itself is that of the first validation
            self.score = "extracted"
            _log.info("%s does not run in eval mode: %s.", name, reason)
        if not self._calls:
            msg = (
                f"score={self.score!r} needs an input of {name}.forward(), which no validation "
                "batch goes through. Let validation_step call the network itself, or set "
                "example_input_array in the model."
            )
            raise SearchError(msg)
        plain = extracted(part, self.space.largest, self._calls, only="inference")
        if not plain.sliced:
            msg = (
                f"score={self.score!r} cannot be had, as {name} cannot be cut apart: extraction "
                f"gives a copy of all of it{_why(plain)}. Write score='network', or give it a "
                "method extract(subnet)."
            )
            raise SearchError(msg)
        self._extraction = Extraction(self._place, self._calls)

    def check_subnets(self, measures: Sequence[Measure | NetworkMeasure] = ()) -> None:
        """Compare a few subnets in the super-network, extracted and converted, and their costs.

        Args:
            measures: The user's; where they measure in a runtime that has files, those are tried.

        Raises:
            ParityError: One differs; the message says which.
            ElasticityError: The largest subnet costs less than the smallest.
        """
        runtimes = {getattr(measure, "runtime", "") for measure in measures} & FORMATS.keys()
        if self.passed.has("subnets", *sorted(runtimes)):
            return
        if self.checks.parity:
            with random_state(_SEED):
                check_subnets(
                    self._elastic,
                    self.space,
                    self.calls,
                    runtimes=sorted(runtimes - {self.score}),
                    tolerance=self.checks.tolerance,
                )
        if self.checks.order and self.calls:
            check_ends(self._place.part, *self.calls[0])
        self.passed.add("subnets", *sorted(runtimes))

    def evaluate(self, subnet: Subnet) -> Measured:
        """Activate the subnet, validate, and return every metric that was logged."""
        metrics = self.confirm(subnet)
        if self._unchecked and not self.passed.has("scores"):
            self._unchecked = False
            self._check_first(subnet, metrics)
            self.passed.add("scores")
        return metrics

    def confirm(self, subnet: Subnet) -> Measured:
        """Return what `evaluate` does; that a score repeats is left for the next one to check."""
        metrics = self._validated(subnet)
        if self._own_weights is not None:
            self._own_weights.check()
        if self._first is None:
            self._first = subnet, metrics
        return metrics

    def _validated(self, subnet: Subnet, *, renewed: bool = True) -> dict[str, float]:
        """Return the metrics of a subnet.

        Args:
            subnet: The subnet.
            renewed: Whether its statistics are renewed, or those of the super-network.
        """
        self._gathered.restore()
        self._buffers.restore_values()  # a score depends on the subnet, not on those before it
        self._elastic.activate(subnet)
        self._in_force.subnet = subnet
        target: dict[str, Any] = {"datamodule": self._source.datamodule}
        if self._source.datamodule is None:
            target = {"dataloaders": self._data.for_trainer}
        try:
            with random_state(_SEED), quiet(self.trainer, self._callbacks(subnet, renewed)):
                rows = self.trainer.validate(self._model, verbose=False, **target)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
            raise
        except _DEVICE_ERRORS as error:
            msg = f"The device failed, and nothing can be measured on it any more: {error}"
            raise MeasurementError(msg) from error
        finally:
            self._place.restore()
            if self._recalibration is not None:
                self._recalibration.end()
            if self._own_weights is not None:
                self._own_weights.end()
            if self._guard is not None:
                self._guard.check()
            if self._first is None:
                self._changed_by_first = self._gathered.changed()
        logged: dict[str, Any] = dict(self.trainer.callback_metrics)
        for row in rows:
            logged.update(row)
        metrics = {name: float(value) for name, value in logged.items()}
        check_logged(metrics, self._to_log, self._model, self.trainer)
        for name in set(self._of_plugins) & metrics.keys():
            self._of_plugins.remove(name)
            warn(
                f"{name!r} is logged by {type(self._model).__name__}, and is a measure of another "
                "package, whose values are taken. To search what is logged, log it under another "
                "name.",
                PluginWarning,
            )
        return metrics

    def _callbacks(self, subnet: Subnet, renewed: bool) -> list[Callback]:
        """Return what happens before the first batch: in the order in which it does."""
        callbacks: list[Callback] = [self._in_force]
        if (
            self._own_weights is not None and self._first is None
        ):  # before another network is in place
            self._own_weights.in_place = self._extraction is None
            callbacks.append(self._own_weights)
        if self._extraction is not None:
            self._extraction.subnet = subnet
            callbacks.append(self._extraction)
        if self._recalibration is not None and renewed:
            callbacks.append(self._recalibration)
        if self.score in FORMATS:
            callbacks.append(Conversion(self._place, self.calls, self.score, self.checks.tolerance))
        return callbacks

    def _check_first(self, subnet: Subnet, metrics: Mapping[str, float]) -> None:
        """Score the first subnet again after another score, and its own statistics if it is whole.

        Raises:
            MeasurementError: The second score is another one.
        """
        assert self._first is not None, "a subnet was scored"
        first, before = self._first
        if first == subnet:
            own = self.checks.calibration and self._recalibration is not None
            if own and subnet == self.space.largest:
                with suppress(Exception):
                    of_training = self._validated(subnet, renewed=False)
                    if not self.trainer.global_rank:
                        n = self.n_samples
                        warn_of_renewal(of_training, metrics, self.directions, n)
            elif self.checks.repeat:
                other = self.space.smallest
                other = self.space.largest if subnet == other else other
                with suppress(Exception):  # it fails when it is evaluated
                    self._validated(other)
        if self.checks.repeat:
            again = self._validated(first)
            check_repeats(before, again, needed=self._needed, changed=self._changed_by_first)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Log one row through the user's loggers, with the number of the evaluation as its step."""
        row = {**evaluation.values, "seconds": evaluation.seconds, "failed": not evaluation.ok}
        for logger in self._loggers:
            logger.log_metrics(
                {f"search/{name}": float(value) for name, value in row.items()},
                step=evaluation.number,
            )

    def extractor(self) -> Extractor:
        """Return an `Extractor` of the model, which stays valid when the evaluator is closed."""
        with random_state(_SEED):  # of what moves calibration batches to the device
            return Extractor.of(
                self.trainer, self._place, self._data, self.calls, self.score, self.checks
            )


def _device(module: torch.nn.Module) -> torch.device:
    """Return where the weights of a module are."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _why(plain: Any) -> str:
    reason = getattr(plain, "unsliced_because", "")
    return f" ({reason})" if reason else ""


_DEVICE_ERRORS: tuple[type[BaseException], ...] = tuple(
    error for error in (getattr(torch, "AcceleratorError", None),) if error is not None
)
