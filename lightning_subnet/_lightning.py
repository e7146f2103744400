# SPDX-License-Identifier: Apache-2.0
"""The only file that imports Lightning: its classes and the facts about them that we rely on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_subnet.errors import SearchError

__all__ = [
    "Callback",
    "CombinedLoader",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "is_overridden",
]


def default_trainer() -> Trainer:
    """Return a Trainer that validates on one device and leaves no traces."""
    return Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def check(model: Any, datamodule: Any, trainer: Any) -> None:
    """Raise `SearchError` where the parts are not what Lightning would take."""
    if isinstance(model, type):
        msg = f"fit() got the class {model.__name__}. Pass an object of it: {model.__name__}(...)."
        raise SearchError(msg)
    if not isinstance(model, LightningModule):
        foreign = type(model).__mro__[-2 if len(type(model).__mro__) > 1 else 0].__module__
        hint = (
            "It comes from `pytorch_lightning`: import it from `lightning` throughout."
            if any(cls.__module__.startswith("pytorch_lightning") for cls in type(model).__mro__)
            else "Wrap the network in a LightningModule whose validation_step logs the metrics."
        )
        msg = f"fit() got a {type(model).__name__} ({foreign}), which is no LightningModule. {hint}"
        raise SearchError(msg)
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        msg = (
            f"datamodule= is a {type(datamodule).__name__}, no LightningDataModule. "
            "Pass dataloaders by dataloaders=."
        )
        raise SearchError(msg)
    if not isinstance(trainer, Trainer):
        msg = f"trainer= is a {type(trainer).__name__}, no lightning.pytorch.Trainer."
        raise SearchError(msg)
    if not is_overridden("validation_step", model):
        msg = (
            f"{type(model).__name__} has no validation_step, so nothing can be validated. "
            "Add one that logs the metrics."
        )
        raise SearchError(msg)
    if any(is_lazy(p) for p in model.parameters()):
        msg = f"{type(model).__name__} has lazy layers without weights. Run one forward pass first."
        raise SearchError(msg)
    if trainer.limit_val_batches == 0:
        msg = "The trainer has limit_val_batches=0, so nothing would be validated. Raise it."
        raise SearchError(msg)
    if trainer.num_devices * trainer.num_nodes > 1:
        msg = (
            f"The trainer uses {trainer.num_devices * trainer.num_nodes} devices; "
            "a search validates on one so far. Pass trainer=Trainer(devices=1, ...)."
        )
        raise SearchError(msg)


@contextmanager
def quiet(trainer: Trainer) -> Iterator[None]:
    """Take the user's loggers and callbacks away from a Trainer while it validates subnets."""
    dynamic: Any = trainer  # a connector sets `callbacks`, which the class does not declare
    callbacks, loggers = dynamic.callbacks, dynamic.loggers
    # A validation_step may use self.logger: it gets one that takes everything and keeps nothing.
    dynamic.callbacks, dynamic.loggers = [], [DummyLogger() for _ in loggers]
    try:
        with warnings.catch_warnings():
            # Batches in memory need no workers, which Lightning cannot know.
            warnings.simplefilter("ignore", PossibleUserWarning)
            # Lightning 2.6.6 calls what torch 2.13 deprecates, once a validation.
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
            yield
    finally:
        dynamic.callbacks, dynamic.loggers = callbacks, loggers


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the Trainer of a module, or None; `module.trainer` raises where there is none."""
    trainer: Trainer | None = module._trainer
    return trainer


# Training with several subnets per step


def check_training(module: LightningModule, trainer: Trainer) -> None:
    """Raise `SearchError` where several backward passes cannot share an optimizer step."""
    name = type(module).__name__
    if not module.automatic_optimization:
        msg = (
            f"{name} optimises manually, so a callback cannot add subnets to its steps. "
            "Activate subnets inside its training_step, or use automatic optimisation."
        )
        raise SearchError(msg)
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        msg = (
            f"SubnetSampling does not know {type(trainer.strategy).__name__}. "
            "It works on a single device and under DDP."
        )
        raise SearchError(msg)


def distributed_model(trainer: Trainer) -> DistributedDataParallel | None:
    """Return the DDP wrapper, or None in one process."""
    model = trainer.strategy.model
    return model if isinstance(model, DistributedDataParallel) else None


def run_training_step(
    trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
) -> torch.Tensor | None:
    """Call `training_step` as the Trainer would, past the DDP wrapper; return the loss."""
    arguments = [batch]
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    with trainer.precision_plugin.train_step_context():
        output = module.training_step(*arguments)
    loss: torch.Tensor | None = output["loss"] if isinstance(output, Mapping) else output
    return loss


def backward(trainer: Trainer, module: LightningModule, loss: torch.Tensor) -> None:
    """Add the gradients of a loss, divided and scaled as those of Lightning's own pass."""
    loss = loss / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    module.backward(loss if scaler is None else scaler.scale(loss))


def mean_gradients(trainer: Trainer, module: LightningModule) -> None:
    """Average the gradients over ranks, unless more batches are to be accumulated."""
    if distributed_model(trainer) is None or trainer.fit_loop._should_accumulate():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        group = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in group])
        torch.distributed.all_reduce(flat)
        flat /= trainer.world_size
        means = torch.split(flat, [g.numel() for g in group])
        for gradient, mean in zip(group, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
