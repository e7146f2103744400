# SPDX-License-Identifier: Apache-2.0
"""Data that is set up once and then stays the same for every subnet."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, DistributedSampler

from lightning_subnet._lightning import (
    CombinedLoader,
    LightningModule,
    Trainer,
    is_overridden,
    prepares_data,
)
from lightning_subnet.elasticity.calibration import batch_norms, first_samples, n_samples
from lightning_subnet.errors import SearchError

_RESIDENT_BYTES = 2**31


@dataclass(frozen=True)
class Source:
    """Where the data of a search comes from.

    Args:
        datamodule: A LightningDataModule; None takes the loaders below, or the module's own.
        dataloaders: Validation dataloaders, instead.
        train_dataloaders: Training data for BatchNorm recalibration, instead.
        split: `"val"`, or `"test"` for the test data of the datamodule.
        calibration_images: How many training samples recalibrate BatchNorm; 0 for none.
        ready: The data was set up already (inside the training that it belongs to).
    """

    datamodule: Any = None
    dataloaders: Any = None
    train_dataloaders: Any = None
    split: Literal["val", "test"] = "val"
    calibration_images: int = 512
    ready: bool = False


@dataclass
class FrozenData:
    """Batches in memory: validation loaders, and inputs of training data for recalibration."""

    loaders: list[Any] = field(default_factory=list)
    calibration: list[Any] = field(default_factory=list)


class Resident:
    """Batches in memory, as a dataloader that needs no workers and no sampler."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return (cloned(batch) for batch in self.batches)


def cloned(batch: Any, device: Any = None) -> Any:
    """Return a copy of a batch, as a step may work on it in place."""

    def clone(x: Any) -> Any:
        return x.to(device, copy=True) if isinstance(x, torch.Tensor) else x

    return tree_map(clone, batch)


@contextmanager
def frozen_data(model: LightningModule, source: Source, trainer: Trainer) -> Iterator[FrozenData]:
    """Set the data up once and yield its batches, in memory where they fit.

    `trainer.validate(model, datamodule=dm)` would run `prepare_data`, `setup` and `val_dataloader`
    at every call, so that a `random_split` in `setup` gives every subnet other data. Here they run
    once, with the stage "fit", as they would before training; inside this context the hooks of the
    module and the datamodule do nothing, and `teardown` runs on leaving.

    Raises:
        SearchError: No validation data, no training data where BatchNorm needs it, or data given
            twice.
    """
    datamodule = source.datamodule
    if datamodule is not None and source.dataloaders is not None:
        msg = "fit() got both datamodule= and dataloaders=. Pass one of them."
        raise SearchError(msg)
    owner = datamodule if datamodule is not None else model
    hook = f"{source.split}_dataloader"
    if source.dataloaders is None and not is_overridden(hook, owner):
        msg = (
            f"{type(owner).__name__} has no {hook}. Pass a datamodule that has one, "
            "or dataloaders=."
        )
        raise SearchError(msg)
    parts = [part for part in (datamodule, model) if part is not None]
    with ExitStack() as stack:
        for part in parts:
            part.trainer = trainer
        if not source.ready:
            _set_up(parts, source, trainer)
            for part in parts:
                stack.callback(part.teardown, "fit")
        for part in parts:
            for name in ("prepare_data", "setup", "teardown"):
                stack.enter_context(_shadowed(part, name, lambda *_args, **_kwargs: None))
        loaders = source.dataloaders
        loaders = _flat(loaders if loaders is not None else getattr(owner, hook)(), owner, hook)
        data = FrozenData(
            loaders=[_resident(loader, trainer) for loader in loaders],
            calibration=trainer.strategy.broadcast(_calibration(model, source, owner)),
        )
        if datamodule is not None:
            stack.enter_context(_shadowed(datamodule, "val_dataloader", lambda: data.loaders))
        yield data


def _set_up(parts: list[Any], source: Source, trainer: Trainer) -> None:
    """Run `prepare_data` once per machine and `setup` once per process."""
    for part in parts:
        if prepares_data(part, trainer):
            part.prepare_data()
    trainer.strategy.barrier("lightning_subnet.prepare_data")
    for part in parts:
        part.setup("fit")
        if source.split == "test":
            part.setup("test")


@contextmanager
def _shadowed(owner: Any, name: str, shadow: Any) -> Iterator[None]:
    """Replace a method on an instance; what the instance had under that name comes back."""
    # LightningDataModule.from_datasets keeps its dataloaders as attributes of the instance.
    own = vars(owner).get(name)
    setattr(owner, name, shadow)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


def _flat(loaders: Any, owner: Any, hook: str) -> list[Any]:
    given = loaders
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    elif isinstance(loaders, CombinedLoader):
        loaders = list(loaders.flattened)
    elif not isinstance(loaders, (list, tuple)):
        loaders = [loaders]
    if not loaders or any(loader is None for loader in loaders):
        msg = f"The validation data is empty: {type(owner).__name__}.{hook}() gave {given!r}."
        raise SearchError(msg)
    return list(loaders)


def _resident(loader: Any, trainer: Trainer) -> Any:
    """Return a loader over this process' batches in memory, or the loader itself if too many.

    With several processes, process r of n takes the batches r, r + n, ...: every sample is seen
    once, while Lightning's sampler would repeat some to make all shares equal.
    """
    limit: Any = trainer.limit_val_batches  # a number of batches, or a share of them (1.0 is all)
    if trainer.world_size > 1:
        loader = _share(loader, trainer.global_rank, trainer.world_size)
    batches, size = [], 0
    for batch in itertools.islice(loader, limit if isinstance(limit, int) else None):
        size += sum(x.nbytes for x in tree_leaves(batch) if isinstance(x, torch.Tensor))
        if size > _RESIDENT_BYTES:
            return loader
        batches.append(batch)
    if not batches:
        msg = "A validation dataloader gave no batches. Check the split in setup('fit')."
        if trainer.world_size > 1:
            msg = (
                f"A validation dataloader has too few batches for {trainer.world_size} processes. "
                "Lower its batch_size, or search with fewer devices."
            )
        raise SearchError(msg)
    return Resident(batches)


class _Every:
    """Each n-th item of an iterable, from the r-th on."""

    def __init__(self, items: Any, rank: int, world: int) -> None:
        self.items, self.rank, self.world = items, rank, world

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.items), self.rank, None, self.world)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.items), self.world))


def _share(loader: Any, rank: int, world: int) -> Any:
    """Return a loader of each n-th batch; one that is shared out already stays as it is."""
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return loader
    if type(loader) is not DataLoader or loader.batch_sampler is None:
        return _Every(loader, rank, world)
    share: Any = _Every(loader.batch_sampler, rank, world)
    return DataLoader(
        loader.dataset,
        batch_sampler=share,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _calibration(model: LightningModule, source: Source, owner: Any) -> list[Any]:
    """Return fixed batches of training data."""
    wanted = source.calibration_images
    if not wanted or not batch_norms(model):
        return []
    loaders = source.train_dataloaders
    if loaders is None and is_overridden("train_dataloader", owner):
        loaders = owner.train_dataloader()
    if loaders is None:
        where = "train_dataloaders=" if source.datamodule is None else "a train_dataloader to it"
        msg = (
            f"{type(model).__name__} has BatchNorm, whose statistics each subnet needs anew, and "
            f"{type(owner).__name__} has no train_dataloader. Add {where}, or set "
            "calibration_images=0 where the statistics do not depend on the subnet."
        )
        raise SearchError(msg)
    batches, found = [], 0
    for batch in _flat(loaders, owner, "train_dataloader")[0]:
        part = first_samples(batch, wanted - found)
        batches.append(part)
        found += n_samples(part)
        if found >= wanted:
            break
    if not batches:
        msg = "The training dataloader gave no batches, and BatchNorm needs some. Check setup()."
        raise SearchError(msg)
    if not hasattr(model, "calibration_step"):
        batches = [_input(batch, model) for batch in batches]
    return batches


def _input(batch: Any, model: LightningModule) -> Any:
    if isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    if isinstance(batch, torch.Tensor):
        return batch
    msg = (
        f"The training batch is a {type(batch).__name__}, so the input of forward() cannot be told "
        f"from it. Give {type(model).__name__} a method calibration_step(batch) that runs the "
        "network on a batch; it recalibrates BatchNorm."
    )
    raise SearchError(msg)


def first_input(loaders: list[Any]) -> Any:
    """Return the first sample of the first batch, as `forward` would take it."""
    batch = next(iter(loaders[0]))
    if isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    if isinstance(batch, torch.Tensor) and batch.ndim:
        return batch[:1]
    msg = (
        f"The validation batch is a {type(batch).__name__}, so the input of forward() cannot be "
        "told from it. Set example_input_array on the module."
    )
    raise SearchError(msg)


def data_fingerprint(loaders: list[Any]) -> str:
    """Return a hash of the validation batches (of the first and the length, if not in memory)."""
    digest = hashlib.blake2b(digest_size=16)
    for loader in loaders:
        batches = loader.batches if isinstance(loader, Resident) else None
        if batches is None:
            batches = [next(iter(loader))]
            digest.update(str(len(loader) if hasattr(loader, "__len__") else "").encode())
        update(digest, batches)
    return digest.hexdigest()


def update(digest: Any, tree: Any) -> None:
    """Feed tensors and plain values of a nested structure into a hash."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(
                leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                if leaf.ndim
                else repr(leaf.item()).encode()
            )
        elif isinstance(leaf, np.ndarray):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        else:
            digest.update(repr(leaf).encode())
