# SPDX-License-Identifier: Apache-2.0
"""The evaluator that drives a Lightning Trainer: `trainer.validate` per subnet, on frozen data."""

from __future__ import annotations

import types
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_subnet._json import digest
from lightning_subnet._torch.contexts import evaluating, random_state
from lightning_subnet._torch.fingerprints import (
    code_fingerprint,
    data_fingerprint,
    hashed,
    stable_text,
)
from lightning_subnet._torch.inputs import arguments
from lightning_subnet.costs.counts import BUILT_IN as COUNTS, count_measures
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import MeasurementError, SearchError
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
    gathered,
    is_overridden,
    kept_metrics,
    launch,
    quiet,
)
from lightning_subnet.training.extractor import Extractor
from lightning_subnet.training.frozen_data import FrozenData, Source, first_input, frozen_data
from lightning_subnet.training.recalibration import Recalibration
from lightning_subnet.training.restore import StepState, module_state

# The same for every search, so that strategies and seeds are compared on the same data.
_SEED = 0


class TrainerEvaluator(Evaluator):
    """Validates subnets of a LightningModule; use it as a context.

    On entering, the data is set up once, under a seed; before each validation BatchNorm statistics
    are reset and averaged over the same training samples; on leaving, the module, the datamodule,
    the trainer and all random states are as they were. With several processes all of them evaluate
    the same subnet, each on its share of the batches.

    Args:
        model: A LightningModule that is elastic or has exactly one elastic descendant.
        source: Its data.
        trainer: The Trainer that validates; None makes one on one device.
        loggers: Get one row per evaluation, besides those of the trainer.

    Raises:
        SearchError: The parts do not fit; nothing has been measured then.
    """

    built_in = (*COUNTS, "latency_ms")

    def __init__(
        self,
        model: LightningModule,
        source: Source,
        *,
        trainer: Trainer | None = None,
        loggers: Sequence[Any] = (),
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
        self.conditions: dict[str, str] = {}
        self._digest = ""

    def __enter__(self) -> TrainerEvaluator:
        before = getattr(self._elastic, "active_subnet", None)
        with ExitStack() as stack:
            stack.enter_context(random_state(_SEED))
            launch(self.trainer)
            stack.enter_context(kept_metrics(self.trainer))
            stack.callback(self._elastic.activate, before or self.space.largest)
            self._buffers = stack.enter_context(module_state(self._model, self._source.datamodule))
            self._data = stack.enter_context(frozen_data(self._model, self._source, self.trainer))
            if self._data.calibration:
                self._callbacks = [Recalibration(self._data, self._model, self._elastic)]
            self.conditions = self._conditions()
            self._digest = digest(self.conditions)
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

    def _conditions(self) -> dict[str, str]:
        """Return hashes of what a metric depends on besides the subnet."""
        weights = {**dict(self._model.named_buffers()), **self._model.state_dict()}
        calibration = [self._data.images, self._data.calibration]
        return {
            "weights": hashed([list(item) for item in sorted(weights.items())], size=8),
            "data": "+".join(gathered(self.trainer, data_fingerprint(self._data.loaders))),
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
        self, measures: Sequence[Measure | NetworkMeasure], wanted: Sequence[str]
    ) -> list[Measure]:
        """Return the user's measures and those built-in ones that are wanted by name."""
        given = {measure.name for measure in measures}
        missing = [
            name for name in dict.fromkeys(wanted) if name not in given and name in self.built_in
        ]
        loose = [measure for measure in measures if not isinstance(measure, Measure)]
        bound = [measure for measure in measures if isinstance(measure, Measure)]
        if "latency_ms" in missing:
            from lightning_subnet.costs.latency.latency import Latency

            missing.remove("latency_ms")
            loose.append(Latency())
        part = self._elastic
        assert isinstance(part, nn.Module), "the elastic part of a module is a module"
        bound += [
            measure.bind(part, None if _has_input(measure) else self._part_example())
            for measure in loose
        ]
        return [*bound, *count_measures(self._model, part, missing, self._example)]

    def _example(self) -> Any:
        """Return one sample, as the module's forward takes it."""
        example = self._model.example_input_array
        if example is None:
            return first_input(self._data.loaders)
        return tree_map(lambda x: x[:1] if isinstance(x, torch.Tensor) and x.ndim else x, example)

    def _part_example(self) -> Any:
        """Return one sample as the elastic part takes it, which the module may have prepared."""
        example = self._example()
        part: Any = self._elastic
        if part is self._model or not is_overridden("forward", self._model):
            return example
        seen: list[tuple[Any, ...]] = []
        hook = part.register_forward_pre_hook(lambda _module, args: seen.append(args))
        args, named = arguments(self._model, example)
        try:
            # What does not fit is told by Latency.
            with evaluating(self._model), torch.no_grad(), suppress(Exception):
                self._model(*args, **named)
        finally:
            hook.remove()
        tensors = seen and seen[0] and all(isinstance(x, torch.Tensor) for x in seen[0])
        return tuple(x.detach() for x in seen[0]) if tensors else example

    def evaluate(self, subnet: Subnet) -> Measured:
        """Activate the subnet, validate, and return every metric that was logged."""
        self._buffers.restore_values()  # a score depends on the subnet, not on those before it
        self._elastic.activate(subnet)
        target: dict[str, Any] = {"datamodule": self._source.datamodule}
        if self._source.datamodule is None:
            target = {"dataloaders": self._data.given}
        try:
            with random_state(_SEED), quiet(self.trainer, self._callbacks):
                returned = self.trainer.validate(self._model, verbose=False, **target)
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
        for values in returned:
            logged.update(values)
        metrics = {name: float(value) for name, value in logged.items()}
        if not metrics:
            msg = (
                f"{type(self._model).__name__}.validation_step logged nothing. "
                "Log the objectives: self.log('val_acc', ...)."
            )
            raise MeasurementError(msg)
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
        """Return what gives a subnet as a module; it stays valid when the evaluator is closed."""
        example = None
        if not self._data.calibration:
            with suppress(SearchError):
                example = self._example()
        return Extractor.of(self.trainer, self._model, self._elastic, self._data, example)


_DEVICE_ERRORS: tuple[type[BaseException], ...] = tuple(
    error for error in (getattr(torch, "AcceleratorError", None),) if error is not None
)


def _has_input(measure: NetworkMeasure) -> bool:
    return getattr(measure, "input", None) is not None
