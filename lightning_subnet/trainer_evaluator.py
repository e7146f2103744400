# SPDX-License-Identifier: Apache-2.0
"""The evaluator that drives a Lightning Trainer: `trainer.validate` per subnet, on frozen data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from lightning_subnet._lightning import LightningModule, Trainer, check, default_trainer, quiet
from lightning_subnet.choices import digest
from lightning_subnet.codeprint import code_fingerprint
from lightning_subnet.costs.counts import BUILT_IN, traced_measures
from lightning_subnet.data import data_fingerprint, first_input, frozen_data, update
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import MeasurementError, SearchError
from lightning_subnet.evaluators import Evaluator, Measured
from lightning_subnet.measures import Measure
from lightning_subnet.randomness import random_state
from lightning_subnet.restore import module_state
from lightning_subnet.space import SearchSpace
from lightning_subnet.subnet import Subnet

# The same for every search, so that strategies and seeds are compared on the same data.
_SEED = 0


class TrainerEvaluator(Evaluator):
    """Validates subnets of a LightningModule; use it as a context.

    On entering, the data is set up once, under a seed; on leaving, the module, the datamodule, the
    trainer and all random states are as they were.

    Args:
        model: A LightningModule that is elastic or has exactly one elastic descendant.
        datamodule: Its data.
        dataloaders: Validation dataloaders, instead of a datamodule.
        trainer: The Trainer that validates; None makes one on one device.

    Raises:
        SearchError: The parts do not fit; nothing has been measured then.
    """

    built_in = BUILT_IN

    def __init__(
        self,
        model: LightningModule,
        datamodule: Any = None,
        *,
        dataloaders: Any = None,
        trainer: Trainer | None = None,
    ) -> None:
        trainer = default_trainer() if trainer is None else trainer
        check(model, datamodule, trainer)
        self._model = model
        self._datamodule = datamodule
        self._dataloaders = dataloaders
        self._trainer = trainer
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
        self._loaders: list[Any] = []
        self.conditions: dict[str, str] = {}
        self._digest = ""

    def __enter__(self) -> TrainerEvaluator:
        before = getattr(self._elastic, "active_subnet", None)
        with ExitStack() as stack:
            stack.enter_context(random_state(_SEED))
            stack.callback(self._elastic.activate, before or self.space.largest)
            self._buffers = stack.enter_context(module_state(self._model, self._datamodule))
            self._loaders = stack.enter_context(
                frozen_data(self._model, self._datamodule, self._dataloaders, self._trainer)
            )
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
        self._stack.close()

    def _conditions(self) -> dict[str, str]:
        """Return hashes of what a metric depends on besides the subnet."""
        weights = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(
            {**dict(self._model.named_buffers()), **self._model.state_dict()}.items()
        ):
            update(weights, [name, tensor])
        return {
            "weights": weights.hexdigest(),
            "data": data_fingerprint(self._loaders),
            "code": code_fingerprint(self._model),
            "hparams": repr(sorted(self._model.hparams.items())),
            "precision": str(self._trainer.precision),
            "limit_val_batches": str(self._trainer.limit_val_batches),
        }

    def fingerprint(self, name: str) -> str | None:
        """Return the fingerprint of a logged metric."""
        return f"{name}:{self._digest}"

    def bound_measures(self, measures: Sequence[Measure], wanted: Sequence[str]) -> list[Measure]:
        """Return the user's measures and those built-in ones that are wanted by name."""
        given = {measure.name for measure in measures}
        missing = [name for name in dict.fromkeys(wanted) if name not in given and name in BUILT_IN]
        if not missing:
            return list(measures)
        tables = getattr(self._elastic, "exact_measures", None)
        exact = {measure.name: measure for measure in tables()} if callable(tables) else {}
        if any(name not in exact for name in missing):
            example = self._model.example_input_array
            example = first_input(self._loaders) if example is None else example
            exact = traced_measures(self._model, self._elastic, example) | exact
        bound = [exact[name] for name in missing]
        for measure in bound:  # an input that does not fit shows before anything is measured
            measure.evaluate(self.space, self.space.indices([self.space.largest]))
        return [*measures, *bound]

    def evaluate(self, subnet: Subnet) -> Measured:
        """Activate the subnet, validate, and return every metric that was logged."""
        self._buffers.restore_values()  # a score depends on the subnet, not on those before it
        self._elastic.activate(subnet)
        target = (
            {"dataloaders": self._loaders}
            if self._datamodule is None
            else {"datamodule": self._datamodule}
        )
        try:
            with random_state(_SEED), quiet(self._trainer):
                logged = self._trainer.validate(self._model, verbose=False, **target)
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
