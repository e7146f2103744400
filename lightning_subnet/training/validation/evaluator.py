# SPDX-License-Identifier: Apache-2.0
"""The evaluator that drives a Lightning Trainer: `trainer.validate` per subnet, on frozen data."""

from __future__ import annotations

import types
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lightning_subnet._json import digest
from lightning_subnet._messages import warn
from lightning_subnet._torch.contexts import random_state
from lightning_subnet._torch.fingerprints import (
    code_fingerprint,
    data_fingerprint,
    hashed,
    stable_text,
)
from lightning_subnet.costs.resolve import MEASURES, measure_names, resolve
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
    default_trainer,
    gather,
    is_overridden,
    launch,
    quiet,
    restore_metrics,
)
from lightning_subnet.training.validation.batch_input import first_input
from lightning_subnet.training.validation.extractor import Extractor
from lightning_subnet.training.validation.frozen_data import FrozenData, Source, frozen_data
from lightning_subnet.training.validation.recalibration import Recalibration
from lightning_subnet.training.validation.restore import StepState, module_state

# The same for every search, so that strategies and seeds are compared on the same data.
_SEED = 0


class TrainerEvaluator(Evaluator):
    """Validates subnets of a LightningModule; use it as a context.

    On entering, the data is set up once, under a seed. Before each validation BatchNorm statistics
    are reset and averaged over the same training samples. On leaving, the module, the datamodule,
    the trainer and all random states are as they were. With several processes all of them evaluate
    the same subnet, each on its share of the batches.

    Args:
        model: A LightningModule that is elastic or has exactly one elastic descendant.
        source: Its data.
        trainer: The Trainer that validates; None makes one on one device.
        loggers: Get one row per evaluation, besides those of the trainer.
        hashes: Whether weights, data and code are hashed, for values that are to be stored.

    Attributes:
        provenance: What a metric depends on besides the subnet, by name, mostly as hashes; empty
            before the context is entered.

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
    ) -> None:
        trainer = default_trainer() if trainer is None else trainer
        check(model, source.datamodule, trainer)
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
        self._stack = ExitStack()
        self._data = FrozenData()
        self._callbacks: list[Callback] = []
        self.built_in = tuple(measure_names())
        self._of_plugins: list[str] = []
        self.provenance: dict[str, str] = {}
        self._hashes = hashes
        self._digest = ""

    def __enter__(self) -> TrainerEvaluator:
        before = getattr(self._elastic, "active_subnet", None)
        with ExitStack() as stack:
            stack.enter_context(random_state(_SEED))
            launch(self.trainer)
            stack.enter_context(restore_metrics(self.trainer))
            stack.callback(self._elastic.activate, before or self.space.largest)
            self._buffers = stack.enter_context(module_state(self._model, self._source.datamodule))
            self._data = stack.enter_context(frozen_data(self._model, self._source, self.trainer))
            if self._data.calibration:
                self._callbacks = [Recalibration(self._data, self._model, self._elastic)]
            if self._hashes:
                self.provenance = self._provenance()
            self._digest = digest(self.provenance)
            self._state = StepState(self._model)
            # As a validation would; so costs are of the same types before and after the first.
            self.trainer.precision_plugin.convert_module(self._model)
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
        built_in = [name for name in names if name in self.built_in]
        self._of_plugins = [name for name in built_in if name in MEASURES.plugins]
        return [*resolve(self._model, measures, built_in, self._example).values()]

    def _example(self) -> Any:
        """Return one sample, as the module's forward takes it."""
        example = self._model.example_input_array
        if example is None:
            return first_input(self._data.loaders)
        return tree_map(lambda x: x[:1] if isinstance(x, torch.Tensor) and x.ndim else x, example)

    def evaluate(self, subnet: Subnet) -> Measured:
        """Activate the subnet, validate, and return every metric that was logged."""
        self._buffers.restore_values()  # a score depends on the subnet, not on those before it
        self._elastic.activate(subnet)
        target: dict[str, Any] = {"datamodule": self._source.datamodule}
        if self._source.datamodule is None:
            target = {"dataloaders": self._data.for_trainer}
        try:
            with random_state(_SEED), quiet(self.trainer, self._callbacks):
                rows = self.trainer.validate(self._model, verbose=False, **target)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
            raise
        except _DEVICE_ERRORS as error:
            msg = f"The device failed, and nothing can be measured on it any more: {error}"
            raise MeasurementError(msg) from error
        except Exception:
            self._state.restore()  # what the step has gathered so far is of this subnet
            raise
        logged: dict[str, Any] = dict(self.trainer.callback_metrics)
        for row in rows:
            logged.update(row)
        metrics = {name: float(value) for name, value in logged.items()}
        if not metrics:
            msg = (
                f"{type(self._model).__name__}.validation_step logged nothing. "
                "Log the objectives: self.log('val_acc', ...)."
            )
            raise MeasurementError(msg)
        for name in set(self._of_plugins) & metrics.keys():
            self._of_plugins.remove(name)
            warn(
                f"{name!r} is logged by {type(self._model).__name__}, and is a measure of another "
                "package, whose values are taken. To search what is logged, log it under another "
                "name.",
                PluginWarning,
            )
        return metrics

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
        example = None
        if not self._data.calibration:
            with suppress(SearchError):
                example = self._example()
        return Extractor.of(self.trainer, self._model, self._elastic, self._data, example)


_DEVICE_ERRORS: tuple[type[BaseException], ...] = tuple(
    error for error in (getattr(torch, "AcceleratorError", None),) if error is not None
)
