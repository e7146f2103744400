# SPDX-License-Identifier: Apache-2.0
"""Validation data that is set up once and then stays the same for every subnet."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from lightning_subnet._lightning import (
    CombinedLoader,
    LightningModule,
    Trainer,
    is_overridden,
)
from lightning_subnet.errors import SearchError

_RESIDENT_BYTES = 2**31


class _Batches(Dataset[Any]):
    """Batches in memory."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, at: int) -> Any:
        # A copy, as a validation_step may work on its batch in place.
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, self.batches[at])


@contextmanager
def frozen_data(
    model: LightningModule, datamodule: Any, dataloaders: Any, trainer: Trainer
) -> Iterator[list[Any]]:
    """Set the data up once and yield the validation dataloaders, in memory where they fit.

    `trainer.validate(model, datamodule=dm)` would run `prepare_data`, `setup` and `val_dataloader`
    at every call, so that a `random_split` in `setup` gives every subnet other data. Inside this
    context the datamodule answers with the same batches and sets nothing up again.

    Raises:
        SearchError: No validation data, or data given twice.
    """
    if datamodule is not None and dataloaders is not None:
        msg = "fit() got both datamodule= and dataloaders=. Pass one of them."
        raise SearchError(msg)
    owner = datamodule if datamodule is not None else model
    if dataloaders is None:
        if not is_overridden("val_dataloader", owner):
            msg = (
                f"{type(owner).__name__} has no val_dataloader. Pass a datamodule that has one, "
                "or dataloaders=."
            )
            raise SearchError(msg)
        owner.trainer = trainer
        owner.prepare_data()
        owner.setup("fit")
        dataloaders = owner.val_dataloader()
    if isinstance(dataloaders, Mapping):
        loaders = list(dataloaders.values())
    elif isinstance(dataloaders, CombinedLoader):
        loaders = list(dataloaders.flattened)
    else:
        loaders = list(dataloaders) if isinstance(dataloaders, (list, tuple)) else [dataloaders]
    if not loaders or any(loader is None for loader in loaders):
        msg = (
            f"The validation data is empty: {type(owner).__name__}.val_dataloader() gave "
            f"{dataloaders!r}."
        )
        raise SearchError(msg)
    loaders = [_resident(loader, trainer.limit_val_batches) for loader in loaders]
    shadows: dict[str, Callable[..., Any]] = {}
    before: dict[str, Any] = {}
    if datamodule is not None:
        shadows = {
            "prepare_data": lambda: None,
            "setup": lambda stage=None: None,
            "teardown": lambda stage=None: None,
            "val_dataloader": lambda: loaders,
        }
        # LightningDataModule.from_datasets keeps its dataloaders as attributes of the instance
        before = {name: vars(datamodule)[name] for name in shadows if name in vars(datamodule)}
        for name, shadow in shadows.items():
            setattr(datamodule, name, shadow)
    try:
        yield loaders
    finally:
        for name in shadows:
            delattr(datamodule, name)
        for name, own in before.items():
            setattr(datamodule, name, own)


def _resident(loader: Any, limit: float) -> Any:
    """Return a loader over the same batches in memory, or the loader itself if too many.

    Args:
        loader: A dataloader.
        limit: How many batches a Trainer will take: a number, or a share of them (1.0 is all).
    """
    batches, size = [], 0
    for batch in itertools.islice(loader, limit if isinstance(limit, int) else None):
        size += sum(x.nbytes for x in tree_leaves(batch) if isinstance(x, torch.Tensor))
        if size > _RESIDENT_BYTES:
            return loader
        batches.append(batch)
    if not batches:
        msg = "A validation dataloader gave no batches. Check the split in setup('fit')."
        raise SearchError(msg)
    return DataLoader(_Batches(batches), batch_size=None)


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
        batches = (
            getattr(loader.dataset, "batches", None) if isinstance(loader, DataLoader) else None
        )
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
