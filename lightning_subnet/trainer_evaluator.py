# SPDX-License-Identifier: Apache-2.0
"""The evaluator that drives a Lightning Trainer: `trainer.validate` per subnet, on frozen data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lightning_subnet._lightning import (
    Callback,
    LightningModule,
    Trainer,
    check,
    default_trainer,
    gathered,
    is_overridden,
    launch,
    quiet,
    run_on_batch,
)
from lightning_subnet.choices import digest
from lightning_subnet.codeprint import code_fingerprint
from lightning_subnet.costs.counts import BUILT_IN as COUNTS
from lightning_subnet.costs.counts import traced_measures
from lightning_subnet.data import (
    FrozenData,
    Source,
    cloned,
    data_fingerprint,
    first_input,
    frozen_data,
    update,
)
from lightning_subnet.elasticity.calibration import n_samples, recalibrate
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.errors import MeasurementError, SearchError
from lightning_subnet.evaluators import Evaluator, Measured
from lightning_subnet.history import Evaluation
from lightning_subnet.measures import Measure, NetworkMeasure
from lightning_subnet.randomness import random_state
from lightning_subnet.restore import BufferState, module_state
from lightning_subnet.space import SearchSpace
from lightning_subnet.subnet import Subnet

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
            stack.callback(self._elastic.activate, before or self.space.largest)
            self._buffers = stack.enter_context(module_state(self._model, self._source.datamodule))
            self._data = stack.enter_context(frozen_data(self._model, self._source, self.trainer))
            if self._data.calibration:
                step = self._calibration_step()
                self._callbacks = [_Recalibration(self._data.calibration, step)]
            self.conditions = self._conditions()
            self._digest = digest(self.conditions)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for logger in self._loggers:
            logger.save()
        self._stack.close()

    def _conditions(self) -> dict[str, str]:
        """Return hashes of what a metric depends on besides the subnet."""
        weights = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(
            {**dict(self._model.named_buffers()), **self._model.state_dict()}.items()
        ):
            update(weights, [name, tensor])
        calibration = hashlib.blake2b(digest_size=8)
        update(calibration, self._data.calibration)
        return {
            "weights": weights.hexdigest(),
            "data": "+".join(gathered(self.trainer, data_fingerprint(self._data.loaders))),
            "calibration": calibration.hexdigest() if self._data.calibration else "none",
            "code": code_fingerprint(self._model),
            "hparams": repr(sorted(self._model.hparams.items())),
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
            from lightning_subnet.costs.latency import Latency

            missing.remove("latency_ms")
            loose.append(Latency())
        part = self._elastic
        assert isinstance(part, nn.Module), "the elastic part of a module is a module"
        bound += [
            measure.bind(part, None if _has_input(measure) else self._example())
            for measure in loose
        ]
        tables = getattr(part, "exact_measures", None)
        exact = {m.name: m for m in tables()} if missing and callable(tables) else {}
        if any(name not in exact for name in missing):
            exact = traced_measures(self._model, part, self._example()) | exact
        for name in missing:  # an input that does not fit shows before anything is measured
            exact[name].evaluate(self.space, self.space.indices([self.space.largest]))
        return [*bound, *(exact[name] for name in missing)]

    def _example(self) -> Any:
        example = self._model.example_input_array
        return first_input(self._data.loaders) if example is None else example

    def evaluate(self, subnet: Subnet) -> Measured:
        """Activate the subnet, validate, and return every metric that was logged."""
        self._buffers.restore_values()  # a score depends on the subnet, not on those before it
        self._elastic.activate(subnet)
        target: dict[str, Any] = {"datamodule": self._source.datamodule}
        if self._source.datamodule is None or self._source.split != "val":
            target = {"dataloaders": self._data.loaders}
        try:
            with random_state(_SEED), quiet(self.trainer, self._callbacks):
                logged = self.trainer.validate(self._model, verbose=False, **target)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
            raise
        metrics = {name: float(value) for values in logged for name, value in values.items()}
        if not metrics:
            msg = (
                f"{type(self._model).__name__}.validation_step logged nothing. "
                "Log the objectives: self.log('val_acc', ...)."
            )
            raise MeasurementError(msg)
        return metrics

    def _calibration_step(self) -> Callable[[Any], Any]:
        """Return what is run on a training batch to recalibrate BatchNorm."""
        own: Callable[[Any], Any] | None = getattr(self._model, "calibration_step", None)
        if own is not None:
            return own
        part: Any = self._elastic
        return self._model if is_overridden("forward", self._model) else part

    def recorded(self, evaluation: Evaluation) -> None:
        """Log one row through the user's loggers, with the number of the evaluation as its step."""
        row = {**evaluation.values, "seconds": evaluation.seconds, "failed": not evaluation.ok}
        for logger in self._loggers:
            logger.log_metrics(
                {f"search/{name}": float(value) for name, value in row.items()},
                step=evaluation.number,
            )

    def extractor(self) -> Extractor:
        """Return what gives a subnet as a module; it stays valid when the evaluator is closed."""
        calibration = self._data.calibration
        samples = [calibration[0]] if calibration else []
        if not samples:
            with suppress(SearchError):
                samples = [first_input(self._data.loaders)]
        part: Any = self._elastic
        return Extractor(part, self._calibration_step(), calibration, samples)


@dataclass(frozen=True)
class Extractor:
    """Gives a subnet as a module of its own, with BatchNorm statistics as it was measured with.

    Args:
        part: What activates subnets.
        step: Runs the network on a batch.
        calibration: Batches that recalibrate BatchNorm.
        samples: A batch to compare the outputs of the module and the super-network on.
    """

    part: Any
    step: Callable[[Any], Any]
    calibration: list[Any]
    samples: list[Any]

    def __call__(self, subnet: Subnet) -> nn.Module:
        """Return the subnet; its attribute `parity` is the largest difference of the outputs."""
        device = next(self.part.parameters()).device
        buffers = BufferState(self.part)
        training = {child: child.training for child in self.part.modules()}
        try:
            with activated(self.part, subnet), torch.no_grad():
                if self.calibration:
                    recalibrate(
                        self.part,
                        (cloned(batch, device) for batch in self.calibration),
                        max_images=sum(n_samples(batch) for batch in self.calibration),
                        forward=self.step,
                    )
                plain = extract(self.part, subnet)
                self.part.eval()
                plain.parity = self._parity(plain, device)
        finally:
            buffers.restore()
            for child, flag in training.items():
                child.training = flag
        return plain

    def _parity(self, plain: nn.Module, device: torch.device) -> Any:
        """Return the largest absolute difference of outputs; NaN where they are no tensors."""
        seen: list[Any] = []

        def remember(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                seen.append((plain(*args, **kwargs) - output).abs().max().item())

        hook = self.part.register_forward_hook(remember, with_kwargs=True)
        try:
            for batch in self.samples:
                self.step(cloned(batch, device))
        finally:
            hook.remove()
        return max(seen, default=math.nan)


def _has_input(measure: NetworkMeasure) -> bool:
    return getattr(measure, "input", None) is not None


class _Recalibration(Callback):
    """Gives the subnet in force its own BatchNorm statistics, when the module is in place."""

    def __init__(self, batches: list[Any], step: Callable[[Any], Any]) -> None:
        self._batches, self._step = batches, step
        self._works = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            recalibrate(
                pl_module,
                self._batches,
                max_images=sum(n_samples(batch) for batch in self._batches),
                forward=lambda batch: run_on_batch(trainer, self._step, cloned(batch)),
            )
        except Exception as error:
            if self._works:
                raise  # it is this subnet
            name = type(pl_module).__name__
            msg = (
                f"{type(self._step).__name__} failed on the input of a training batch, which was "
                f"to recalibrate BatchNorm: {error}. Give {name} a forward(x) that takes the first "
                "item of a batch, or a calibration_step(batch); or set calibration_images=0."
            )
            raise MeasurementError(msg) from error
        self._works = True
