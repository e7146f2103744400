# SPDX-License-Identifier: Apache-2.0
"""A search at the end of training, as a callback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._torch.fingerprints import hashed
from lightning_subnet.costs.resolve import measure_names
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import SearchError
from lightning_subnet.results.result import SearchResult
from lightning_subnet.search.fit import run_fit
from lightning_subnet.search.search import SubnetSearch, result_of
from lightning_subnet.training._lightning import (
    Callback,
    LightningModule,
    ModelCheckpoint,
    Trainer,
    check,
    fit_loaders,
    inner_trainer,
    validates,
)
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import Source

Weights = Literal["last", "best"]


class SubnetSearchCallback(Callback):
    """Search the subnets of the trained model when training ends.

    It runs in `on_fit_end`, when all callbacks have seen the end of training: weights that a
    callback averages or swaps in are those that are searched, and checkpoints are written before.
    It validates on the data that training has set up, and leaves weights, flags, loggers and random
    states as they were. Evaluations are logged through the Trainer's loggers under `search/`, with
    their number as step.

    The study is named `<search.name>-<hash of the weights>`: another training is another study, and
    a training that is resumed at its end goes on with the study of its weights.

    Args:
        search: The settings of the search. Its trainer validates; without one, a Trainer of the
            same devices, strategy and precision is made.
        weights: `"last"`: those at the end of training; `"best"`: those of the checkpoint that
            ModelCheckpoint holds for the best. Afterwards the module has the last ones again.
        progress: Show progress.

    Attributes:
        result: The result of the search; None until then, and if training was interrupted.

    Raises:
        SearchError: Before training: the model cannot be searched, there is no validation data, an
            objective is not logged by it, or `"best"` without a ModelCheckpoint that monitors.

    Example:
        >>> from lightning_subnet import SubnetSearch, SubnetSearchCallback
        >>> search = SubnetSearch(objectives={"val_acc": "max", "macs": "min"}, storage=None)
        >>> callback = SubnetSearchCallback(search)  # for Trainer(callbacks=[callback])
        >>> callback.result is None
        True
    """

    def __init__(
        self, search: SubnetSearch, *, weights: Weights = "last", progress: bool = True
    ) -> None:
        if not isinstance(search, SubnetSearch):
            msg = (
                f"search={search!r:.60} is not a SubnetSearch. Write SubnetSearch(objectives=...)."
            )
            raise SearchError(msg)
        if search.plan.settings.resume == "must":
            msg = (
                "resume='must' cannot hold here: the study is named by the weights that training "
                "ends with. Leave it out; a study of the same weights goes on by itself."
            )
            raise SearchError(msg)
        if weights not in ("last", "best"):
            msg = f"weights={weights!r} must be 'last' or 'best'."
            raise SearchError(msg)
        self.search = search
        self.weights = weights
        self.result: SearchResult | None = None
        self._progress = progress
        self._unchecked = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before training what would fail after it."""
        if stage != "fit":
            return
        self.result, self._unchecked = None, True
        validating = self.search.plan.settings.trainer
        check(pl_module, None, validating or trainer)
        if validating is trainer:
            msg = (
                "trainer= of the search is the Trainer that trains. Leave it out of SubnetSearch: "
                "the callback makes one of the same devices and precision."
            )
            raise SearchError(msg)
        if not validates(trainer):
            msg = (
                "SubnetSearchCallback validates subnets, and this training has no validation data. "
                "Pass val_dataloaders= or a datamodule with val_dataloader to fit()."
            )
            raise SearchError(msg)
        if self.weights == "best" and _monitoring(trainer) is None:
            msg = (
                "weights='best' needs a ModelCheckpoint that monitors a metric: "
                "Trainer(callbacks=[ModelCheckpoint(monitor='val_acc', mode='max'), ...])."
            )
            raise SearchError(msg)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to search, when `configure_model` has run."""
        elastic_part(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check in the first validation that it logs the objectives."""
        plan, logged = self.search.plan, trainer.callback_metrics
        if trainer.sanity_checking and not logged:
            return  # some modules leave the sanity check early
        if self._unchecked:
            self._unchecked = False
            computed = {*(measure.name for measure in plan.measures), *measure_names()}
            if missing := [n for n in plan.names if n not in computed and n not in logged]:
                msg = (
                    f"The search wants {missing[0]!r}, which {type(pl_module).__name__} does not "
                    f"log.{did_you_mean(missing[0], logged)} Logged: {listed(logged)}."
                )
                raise SearchError(msg)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        val, train = fit_loaders(trainer)
        settings = self.search.plan.settings
        source = Source(
            getattr(trainer, "datamodule", None),
            val,
            train,
            calibration_images=settings.calibration_images,
            ready=True,
        )
        with self._weights_to_search(trainer, pl_module):
            search = self.search.replace(name=f"{self.search.name}-{_weights_hash(pl_module)}")
            evaluator = TrainerEvaluator(
                pl_module,
                source,
                trainer=settings.trainer or inner_trainer(trainer),
                loggers=trainer.loggers,
                score=settings.score,
                checks=settings.checks,
            )
            session, extractor = run_fit(search.plan, evaluator, progress=self._progress)
            self.result = result_of(session, extractor)

    @contextmanager
    def _weights_to_search(self, trainer: Trainer, module: LightningModule) -> Iterator[None]:
        """Put the weights to be searched into the module for a while."""
        writer = _monitoring(trainer) if self.weights == "best" else None
        if writer is None or not writer.best_model_path:
            yield
            return
        path = trainer.strategy.broadcast(writer.best_model_path)
        last = {name: value.detach().clone() for name, value in module.state_dict().items()}
        trainer.strategy.barrier("lightning_subnet.best")
        try:
            # Written by this training; hyperparameters in it may be any objects.
            best = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
            module.load_state_dict(best, strict=module.strict_loading)
            yield
        finally:
            module.load_state_dict(last)


def _monitoring(trainer: Trainer) -> ModelCheckpoint | None:
    writers = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    return next((writer for writer in writers if writer.monitor), None)


def _weights_hash(module: LightningModule) -> str:
    return hashed([list(item) for item in sorted(module.state_dict().items())], size=4)
