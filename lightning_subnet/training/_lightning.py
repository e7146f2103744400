# SPDX-License-Identifier: Apache-2.0
"""The only file that imports Lightning: its classes, and the facts about them that we rely on."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    callbacks as pytorch_callbacks,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_unflatten

from lightning_subnet.errors import SearchError

__all__ = [
    "Callback",
    "CombinedLoader",
    "LightningDataModule",
    "LightningModule",
    "ModelCheckpoint",
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
    """Raise `SearchError` where Lightning could not validate with these parts again and again."""
    _check_module(model)
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        msg = (
            f"datamodule= is a {type(datamodule).__name__}, not a LightningDataModule. "
            "Pass dataloaders by dataloaders=."
        )
        raise SearchError(msg)
    if not isinstance(trainer, Trainer):
        msg = f"trainer= is a {type(trainer).__name__}, not a lightning.pytorch.Trainer."
        raise SearchError(msg)
    _check_validation(model)
    _check_trainer(trainer)


def _check_module(model: Any) -> None:
    """Refuse a class, a compiled module, and what is not a LightningModule."""
    if isinstance(model, type):
        msg = f"fit() got the class {model.__name__}. Pass an object of it: {model.__name__}(...)."
        raise SearchError(msg)
    modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    for name, child in modules:
        if isinstance(child, OptimizedModule) or child._compiled_call_impl is not None:
            msg = (
                f"{(name or type(model).__name__)!r} is compiled, and would be compiled anew for "
                "every subnet. Search the module before torch.compile(), and compile the subnet "
                "that you extract."
            )
            raise SearchError(msg)
    if not isinstance(model, LightningModule):
        classes = type(model).__mro__
        origin = classes[-2 if len(classes) > 1 else 0].__module__
        hint = (
            "It comes from `pytorch_lightning`: import it from `lightning` throughout."
            if any(cls.__module__.startswith("pytorch_lightning") for cls in classes)
            else "Wrap the network in a LightningModule whose validation_step logs the metrics."
        )
        msg = (
            f"fit() got a {type(model).__name__} ({origin}), which is not a LightningModule. {hint}"
        )
        raise SearchError(msg)


def _check_validation(model: LightningModule) -> None:
    """Refuse a module that cannot be validated as it is."""
    if not is_overridden("validation_step", model):
        msg = (
            f"{type(model).__name__} has no validation_step, so nothing can be validated. "
            "Add one that logs the metrics."
        )
        raise SearchError(msg)
    if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        msg = f"{type(model).__name__} has lazy layers without weights. Run one forward pass first."
        raise SearchError(msg)


def _check_trainer(trainer: Trainer) -> None:
    """Refuse a Trainer that validates or logs nothing, or whose processes end with each call."""
    if trainer.limit_val_batches == 0:
        msg = "The trainer has limit_val_batches=0, so nothing would be validated. Raise it."
        raise SearchError(msg)
    if trainer.barebones:
        msg = (
            "The trainer has barebones=True, which turns off all logging, and objectives are "
            "logged. Pass Trainer() with other arguments."
        )
        raise SearchError(msg)
    launcher = trainer.strategy.launcher
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)) or not (
        launcher is None or isinstance(launcher, _SubprocessScriptLauncher)
    ):
        name = getattr(trainer.strategy, "_start_method", "") or type(trainer.strategy).__name__
        msg = (
            f"A search does not run with the strategy {name!r}: it validates hundreds of times, "
            "on one device or under 'ddp', whose processes stay alive (those of 'ddp_spawn' start "
            "anew at every call, 14 to 24 s each). Pass Trainer(strategy='ddp') or devices=1."
        )
        raise SearchError(msg)


def check_idle(trainer: Trainer) -> None:
    """Raise `SearchError` if a Trainer is at work: a validation of its own would end that."""
    if trainer.state.fn is not None and trainer.state.status == TrainerStatus.RUNNING:
        msg = (
            f"The trainer is at work ({trainer.state.fn.value}), and would be stopped by a "
            "validation of its own. Pass another Trainer to the search, or none; to search at the "
            "end of training add SubnetSearchCallback(search) to its callbacks."
        )
        raise SearchError(msg)


@contextmanager
def quiet(trainer: Trainer, callbacks: list[Callback]) -> Iterator[None]:
    """Let a Trainer validate subnets with these callbacks, without the user's and their loggers."""
    dynamic: Any = trainer  # a connector sets `callbacks`, which the class does not declare
    connector = dynamic._accelerator_connector
    before = dynamic.callbacks, dynamic.loggers, connector.use_distributed_sampler
    # A validation_step may use self.logger: it gets one that takes everything and keeps nothing.
    dynamic.callbacks, dynamic.loggers = callbacks, [DummyLogger() for _ in before[1] or [None]]
    connector.use_distributed_sampler = False  # it would repeat samples to make shares equal
    try:
        with warnings.catch_warnings():
            # Batches in memory need no workers, which Lightning cannot know.
            warnings.simplefilter("ignore", PossibleUserWarning)
            # Lightning 2.6.6 calls what torch 2.13 deprecates, once a validation.
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
            yield
    finally:
        dynamic.callbacks, dynamic.loggers, connector.use_distributed_sampler = before


def loggers_among(trainer: Trainer) -> list[str]:
    """Return the classes of the user's callbacks that act in a validation, and so may log in it."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return [
        type(each).__name__
        for each in callbacks
        if type(each).__module__.partition(".")[0] not in ("lightning", "lightning_subnet")
        and any(
            getattr(type(each), name) is not getattr(Callback, name)
            for name in dir(Callback)
            if name.startswith("on_validation")
        )
    ]


class BeforeFirstBatch(Callback):
    """A callback that acts once in a validation: before the first batch, with the module in place.

    By then the module is on its device, and its own hooks have run.
    """

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Act before the first batch of the first dataloader."""
        if not (batch_idx or dataloader_idx):
            self.prepare(trainer, pl_module, batch)

    @abstractmethod
    def prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Act; the batch is the first one."""


def transfer(trainer: Trainer, model: LightningModule, batch: Any, device: Any = None) -> Any:
    """Return a batch as steps get it: in the right precision, through the hooks, on a device."""
    batch = model._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    return model._apply_batch_transfer_handler(batch, device=device)


def run_validation_step(module: LightningModule, batch: Any, *, several: bool) -> Any:
    """Call `validation_step` on a first batch, as the Trainer would.

    Args:
        module: The module.
        batch: The batch, in place.
        several: Whether there are several dataloaders, of which this is the first.
    """
    step = module.validation_step
    arguments: dict[str, Any] = {}
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments["batch_idx"] = 0
    if several and is_param_in_hook_signature(step, "dataloader_idx", min_args=3):
        arguments["dataloader_idx"] = 0
    return step(batch, *arguments.values())


def in_precision(trainer: Trainer) -> AbstractContextManager[Any]:
    """Return the context in which the Trainer runs validation steps."""
    return trainer.precision_plugin.val_step_context()


def attach(trainer: Trainer, model: LightningModule, datamodule: Any) -> None:
    """Let hooks find the Trainer and the datamodule, as `fit` and `validate` do."""
    trainer.strategy.connect(model)
    trainer._data_connector.attach_datamodule(model, datamodule)


def like_combined(combined: CombinedLoader, loaders: list[Any]) -> CombinedLoader:
    """Return a CombinedLoader of the same structure and mode over other loaders."""
    return CombinedLoader(tree_unflatten(loaders, combined._spec), combined._mode)


@contextmanager
def restore_metrics(trainer: Trainer) -> Iterator[None]:
    """Give a Trainer its metrics, state and datamodule back."""
    connector = trainer._logger_connector
    dynamic: Any = trainer  # a connector sets `datamodule`, which the class does not declare
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    metrics = [dict(getattr(connector, name)) for name in names]
    fields = ("status", "fn", "stage")
    state = [getattr(trainer.state, name) for name in fields]
    datamodule = getattr(dynamic, "datamodule", None)
    try:
        yield
    finally:
        for name, values in zip(names, metrics, strict=True):
            setattr(connector, name, values)
        for name, value in zip(fields, state, strict=True):
            setattr(trainer.state, name, value)
        dynamic.datamodule = datamodule


# Several processes


def launch(trainer: Trainer) -> None:
    """Start the other processes of a Trainer, if any, and connect them.

    Lightning does this in the first call of `fit` or `validate`; until then each process stands
    alone, and `broadcast` does nothing.
    """
    if trainer.num_devices * trainer.num_nodes > 1 and trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(trainer.strategy.setup_environment, trainer=trainer)


def prepares_data(part: Any, trainer: Trainer) -> bool:
    """Return whether this process is the one that runs `prepare_data` of a (data) module."""
    return trainer.local_rank == 0 and (part.prepare_data_per_node or trainer.node_rank == 0)


def gather(trainer: Trainer, item: Any) -> list[Any]:
    """Return the items of all processes, in the order of their ranks."""
    if trainer.world_size == 1:
        return [item]
    items = [None] * trainer.world_size
    torch.distributed.all_gather_object(items, item)
    return items


# A search at the end of training


def validates(trainer: Trainer) -> bool:
    """Return whether a `fit` that has begun has validation data."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.is_defined() and source.instance is not None and trainer.limit_val_batches != 0


def fit_loaders(trainer: Trainer) -> tuple[Any, Any]:
    """Return validation and training dataloaders as `fit` got them, without Lightning's samplers.

    They come from where `fit` has them (arguments, datamodule or module), which is set up already.
    """
    validation = trainer.fit_loop.epoch_loop.val_loop._data_source
    return validation.dataloader(), trainer.fit_loop._data_source.dataloader()


def data_source(trainer: Trainer) -> Any:
    """Return where a Trainer that has begun gets its batches from: those of training in `fit`."""
    loops: dict[Any, Any] = {
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    return loops.get(trainer.state.fn, trainer.fit_loop)._data_source


def configure_model(trainer: Trainer) -> None:
    """Let a module build what it builds in `configure_model`, which it does once.

    A Trainer calls it after `setup` of callbacks, and again whenever it is used.
    """
    call._call_configure_model(trainer)


def inner_trainer(outer: Trainer) -> Trainer:
    """Return a Trainer that validates as another one does, inside its `fit`."""
    distributed = isinstance(outer.strategy, DDPStrategy)
    device = outer.strategy.root_device
    devices: Any = outer.num_devices if device.type == "cpu" else outer.device_ids
    inner = Trainer(
        accelerator=device.type,
        devices=devices,
        num_nodes=outer.num_nodes,
        strategy="ddp" if distributed else "auto",
        precision=outer.precision,
        limit_val_batches=outer.limit_val_batches,
        fast_dev_run=getattr(outer, "fast_dev_run", False),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=outer.validate_loop.inference_mode,
        max_epochs=outer.max_epochs,
        max_steps=outer.max_steps,
    )
    # A step may ask for the epoch and the step: they are those of the training.
    inner.fit_loop.epoch_progress = outer.fit_loop.epoch_progress
    inner.fit_loop.epoch_loop.automatic_optimization = (
        outer.fit_loop.epoch_loop.automatic_optimization
    )
    inner.fit_loop.epoch_loop.manual_optimization = outer.fit_loop.epoch_loop.manual_optimization
    return inner


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the Trainer of a module, or None; `module.trainer` raises where there is none."""
    trainer: Trainer | None = module._trainer
    return trainer


# Subnets validated during training


def is_validation_of_fit(trainer: Trainer) -> bool:
    """Return whether the validation that is ending is one of `fit`, and not a sanity check."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


@contextmanager
def weights_of_validation(trainer: Trainer, model: LightningModule) -> Iterator[None]:
    """Give a module the weights that `fit` has just validated: the averages, where it averages.

    Lightning's WeightAveraging swaps them in for the validation and out before it has ended.
    """
    kind = getattr(pytorch_callbacks, "WeightAveraging", ())  # from Lightning 2.6 on
    dynamic: Any = trainer  # a connector sets `callbacks`, which the class does not declare
    averaging = [callback for callback in dynamic.callbacks if isinstance(callback, kind)]
    for callback in averaging:
        callback.on_validation_epoch_start(trainer, model)
    try:
        yield
    finally:
        for callback in reversed(averaging):
            callback.on_validation_epoch_end(trainer, model)


def log_with_validation(trainer: Trainer, row: Mapping[str, float]) -> None:
    """Log values as those of the validation that is ending, and let callbacks monitor them."""
    device = trainer.strategy.root_device
    metrics: dict[str, Any] = {k: torch.tensor(v, device=device) for k, v in row.items()}
    trainer.callback_metrics.update(metrics)
    trainer.logged_metrics.update(metrics)
    trainer._logger_connector.log_metrics(dict(metrics))


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


def mean_gradients(trainer: Trainer, module: LightningModule, *, uneven: bool = False) -> None:
    """Average the gradients over ranks, unless more batches are to be accumulated.

    Args:
        trainer: The Trainer.
        module: The module in training.
        uneven: Whether ranks may have gradients of different parameters; a missing one is zero.
    """
    if distributed_model(trainer) is None or trainer.fit_loop._should_accumulate():
        return
    if uneven:
        parameters = [p for p in module.parameters() if p.requires_grad]
        here = torch.tensor([p.grad is not None for p in parameters], device=module.device)
        n_ranks = here.int()
        torch.distributed.all_reduce(n_ranks)
        for p, n in zip(parameters, n_ranks.tolist(), strict=True):
            if n and p.grad is None:
                p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        group = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in group])
        torch.distributed.all_reduce(flat)
        flat /= trainer.world_size
        means = torch.split(flat, [g.numel() for g in group])
        for gradient, mean in zip(group, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
