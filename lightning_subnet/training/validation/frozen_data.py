# SPDX-License-Identifier: Apache-2.0
"""Data that is set up once and then stays the same for every subnet."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_subnet._messages import warn
from lightning_subnet._torch.contexts import shadowed
from lightning_subnet._torch.fingerprints import leaves
from lightning_subnet._torch.inputs import cloned
from lightning_subnet.elasticity.batchnorm import n_samples
from lightning_subnet.elasticity.statistics import is_renewable
from lightning_subnet.errors import CalibrationWarning, SearchError
from lightning_subnet.training._lightning import (
    CombinedLoader,
    LightningModule,
    Trainer,
    attach,
    is_overridden,
    like_combined,
    prepares_data,
)
from lightning_subnet.training.validation.batch_input import calibration_step, model_input

_RESIDENT_BYTES = 2**31
_log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 512
"""How many training samples recalibrate where the user does not say how many."""


@dataclass(frozen=True)
class Source:
    """The data of a search: a datamodule or dataloaders, and what is taken of them.

    Args:
        datamodule: A LightningDataModule; None takes the loaders below, or the module's own.
        dataloaders: Validation dataloaders, instead.
        train_dataloaders: Training data for BatchNorm recalibration, instead.
        split: `"val"`, or `"test"` for the test data of the datamodule.
        calibration_images: How many training samples recalibrate BatchNorm; 0 for none.
        ready: Whether the data is set up already, as inside the training that it belongs to.
    """

    datamodule: Any = None
    dataloaders: Any = None
    train_dataloaders: Any = None
    split: Literal["val", "test"] = "val"
    calibration_images: int = CALIBRATION_IMAGES
    ready: bool = False


@dataclass
class FrozenData:
    """Batches in memory.

    Args:
        loaders: Validation loaders.
        for_trainer: The same, in the structure in which the user passed them.
        calibration: Whole batches of training data.
        images: How many samples of them recalibrate BatchNorm.
    """

    loaders: list[Any] = field(default_factory=list)
    for_trainer: Any = None
    calibration: list[Any] = field(default_factory=list)
    images: int = 0

    @property
    def n_samples(self) -> int:
        """The number of validation samples in memory; 0 if they are not there."""
        residents = [loader for loader in self.loaders if isinstance(loader, Resident)]
        return sum(n_samples(batch) for loader in residents for batch in loader.batches)


class Resident:
    """Batches in memory, as a dataloader that needs no workers and no sampler."""

    def __init__(self, batches: list[Any], loader: Any = None) -> None:
        self.batches = batches
        self.dataset = getattr(loader, "dataset", None)
        self.batch_size = getattr(loader, "batch_size", None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return (cloned(batch) for batch in self.batches)


@contextmanager
def frozen_data(model: LightningModule, source: Source, trainer: Trainer) -> Iterator[FrozenData]:
    """Set the data up once and yield its batches, in memory where they fit.

    `trainer.validate(model, datamodule=dm)` would run `prepare_data`, `setup` and `val_dataloader`
    at every call, so that a `random_split` in `setup` gives every subnet other data. Here they run
    once, a datamodule's with the stage "fit", as before training, and a module's with "validate"
    (with "fit" where its own dataloaders are used); inside this context these hooks do nothing, and
    `teardown` runs on leaving.

    Raises:
        SearchError: There is no validation data, no training data where BatchNorm needs it, or
            data was passed twice.
    """
    datamodule = source.datamodule
    if datamodule is not None and source.dataloaders is not None and not source.ready:
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
        model.trainer = trainer
        attach(trainer, model, datamodule)
        if not source.ready:
            is_source = owner is model and source.dataloaders is None
            stages = {id(datamodule): "fit", id(model): "fit" if is_source else "validate"}
            _set_up(parts, stages, source, trainer)
            for part in parts:
                stack.callback(part.teardown, stages[id(part)])
        for part in parts:
            for name in ("prepare_data", "setup", "teardown"):
                stack.enter_context(shadowed(part, name, lambda *_args, **_kwargs: None))
        stack.enter_context(shadowed(model, "configure_callbacks", list))
        loaders = source.dataloaders
        loaders = loaders if loaders is not None else getattr(owner, hook)()
        data = _in_memory(loaders, owner, hook, trainer)
        data.images = source.calibration_images
        data.calibration = trainer.strategy.broadcast(calibration_batches(model, source, owner))
        if datamodule is not None:
            stack.enter_context(shadowed(datamodule, "val_dataloader", lambda: data.for_trainer))
        yield data


def _set_up(parts: list[Any], stages: Mapping[int, str], source: Source, trainer: Trainer) -> None:
    """Run `prepare_data` once per machine and `setup` once per process."""
    for part in parts:
        if prepares_data(part, trainer):
            part.prepare_data()
    trainer.strategy.barrier("lightning_subnet.prepare_data")
    for part in parts:
        weights: dict[str, Any] = {}
        if isinstance(part, torch.nn.Module) and is_overridden("setup", part):
            weights = {name: value.clone() for name, value in part.state_dict().items()}
        part.setup(stages[id(part)])
        if source.split == "test" and not isinstance(part, torch.nn.Module):
            part.setup("test")
        after = part.state_dict() if weights else {}
        for name, value in weights.items():  # a setup may initialise; the user's weights count
            if name in after and after[name].shape == value.shape:
                after[name].copy_(value)


def _in_memory(loaders: Any, owner: Any, hook: str, trainer: Trainer) -> FrozenData:
    """Return validation loaders in memory, in a list and in the structure that they came in."""
    if isinstance(loaders, CombinedLoader):
        residents = [_resident(loader, trainer) for loader in loaders.flattened]
        return FrozenData(residents, like_combined(loaders, residents))
    several = isinstance(loaders, (list, tuple, Mapping))
    items = [loaders]
    if several:
        items = list(loaders.values() if isinstance(loaders, Mapping) else loaders)
    if not items or any(loader is None for loader in items):
        msg = f"The validation data is empty: {type(owner).__name__}.{hook}() gave {loaders!r}."
        raise SearchError(msg)
    residents = [_resident(loader, trainer) for loader in items]
    if isinstance(loaders, Mapping):
        return FrozenData(residents, dict(zip(loaders, residents, strict=True)))
    return FrozenData(residents, residents if several else residents[0])


def _resident(loader: Any, trainer: Trainer) -> Any:
    """Return a loader over this process' batches in memory, or the loader itself if they are many.

    With several processes, process r of n takes the batches r, r + n, ...: every sample is seen
    once, while Lightning's sampler would repeat some to make all shares equal.
    """
    limit: Any = trainer.limit_val_batches  # a number of batches, or a share of them (1.0 is all)
    if trainer.world_size > 1:
        loader = _share(loader, trainer.global_rank, trainer.world_size)
    batches, size = [], 0
    with _seeded_generators(loader):
        for batch in itertools.islice(loader, limit if isinstance(limit, int) else None):
            size += sum(x.nbytes for x in leaves(batch) if isinstance(x, torch.Tensor))
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
    return Resident(batches, loader)


@contextmanager
def _seeded_generators(loader: Any) -> Iterator[None]:
    """Let a loader with a generator of its own draw the same at every search."""
    owners = (loader, getattr(loader, "sampler", None))
    items = [getattr(owner, "generator", None) for owner in owners]
    generators = [item for item in items if isinstance(item, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(0)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def with_own_workers(loaders: Any) -> Any:
    """Return loaders of the same data that leave the workers of these ones alone.

    A loader that keeps its workers has one iterator, which starts anew wherever it is iterated.
    """

    def copy_of(loader: Any) -> Any:
        if not getattr(loader, "persistent_workers", False):
            return loader
        loader = copy.copy(loader)
        loader._iterator = None
        return loader

    if isinstance(loaders, CombinedLoader):
        return like_combined(loaders, [copy_of(loader) for loader in loaders.flattened])
    return tree_map(copy_of, loaders)


class _Every:
    """Each n-th item of an iterable, from the r-th on."""

    def __init__(self, items: Any, rank: int, world: int) -> None:
        self.items, self.rank, self.world = items, rank, world

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.items), self.rank, None, self.world)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.items), self.world))


def _share(loader: Any, rank: int, world: int) -> Any:
    """Return a loader of each n-th batch; one with a distributed sampler stays as it is."""
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


def calibration_batches(model: LightningModule, source: Source, owner: Any) -> list[Any]:
    """Return fixed batches of training data, for `source.calibration_images` samples.

    Batches are as the loader gives them: one that would make it more samples is left out, unless it
    is the first, or is for a `calibration_step`, which may not take samples.

    Args:
        model: The LightningModule; without running statistics it needs none.
        source: Its data, and the number of samples.
        owner: The module or datamodule with `train_dataloader`, where the source has no loaders.

    Raises:
        SearchError: There is no training data, or its batches have a form that needs a
            `calibration_step`.

    Warns:
        CalibrationWarning: There are fewer than 64 samples, or far fewer than were asked for, or
            they come sorted by class.
    """
    n_images = source.calibration_images
    if not n_images or not is_renewable(model):
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
    if isinstance(loaders, (list, tuple, Mapping)):  # as Lightning would train on them
        loaders = CombinedLoader(loaders, "max_size_cycle")
    combined = isinstance(loaders, CombinedLoader)
    batches: list[Any] = []
    count, ended, step = 0, False, calibration_step(model)
    with _seeded_generators(loaders):
        for item in loaders:
            batch = item[0] if combined else item  # (batch, index, index of the loader)
            if step is None and batches and count + n_samples(batch) > n_images:
                break
            batches.append(batch)
            count += n_samples(batch)
            if count >= n_images:
                break
        else:
            ended = True
    if not batches:
        msg = "The training dataloader gave no batches, and BatchNorm needs some. Check setup()."
        raise SearchError(msg)
    if step is None:
        model_input(batches[0], model)
    if step is None or _is_of_samples(batches[0]):
        _tell_of_few(count, n_images, ended=ended)
    if not isinstance(getattr(loaders, "sampler", None), _SHUFFLING):
        _check_order([_labels(batch) for batch in batches], n_images)
    return batches


_ENOUGH = 0.9  # drop_last and the like may cost a batch
_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_LABELS = ("label", "labels", "target", "targets", "y")
_FEWEST = 32  # so many samples come in order by chance never


_LEAST = 64  # samples, of which statistics are told to be poor


def _is_of_samples(batch: Any) -> bool:
    """Return whether all tensors of a batch are as long, so that this is the number of samples."""
    tensors = [x for x in leaves(batch) if isinstance(x, torch.Tensor)]
    return len({len(x) if x.ndim else 0 for x in tensors}) == 1


def _tell_of_few(count: int, n_images: int, *, ended: bool) -> None:
    """Warn of so few samples that their noise decides, or of fewer than the user asked for.

    Args:
        count: How many there are in the batches; of a first one no more are taken than asked for.
        n_images: How many were asked for; the default asks for no certain number.
        ended: Whether there are no more.
    """
    used = min(count, n_images)
    if used < _LEAST:
        samples = f"{used} training sample{'s' if used > 1 else ''}"
        warn(
            f"The running statistics of each subnet are averaged over {samples} "
            f"(calibration_images={n_images}), which are too few to score it by. Give a training "
            f"dataloader with {_LEAST} samples at the least, and calibration_images="
            f"{CALIBRATION_IMAGES} to take up to so many.",
            CalibrationWarning,
        )
    elif ended and count < _ENOUGH * n_images:
        message = (
            f"The training dataloader has {count} samples, and calibration_images={n_images}: "
            f"running statistics of each subnet are averaged over {count}. Give more training "
            f"data, or set calibration_images={count}."
        )
        if n_images == CALIBRATION_IMAGES:
            _log.info("%s", message)
        else:
            warn(message, CalibrationWarning)


def _labels(batch: Any) -> torch.Tensor | None:
    """Return the class of each sample of a batch, if it is recognisable."""
    y: Any = None
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        y = batch[1]
    elif isinstance(batch, Mapping):
        y = next((batch[key] for key in _LABELS if key in batch), None)
    if not isinstance(y, torch.Tensor) or y.is_floating_point() or y.is_complex():
        return None
    return y.flatten() if y.ndim and y.numel() == n_samples(batch) else None


def _check_order(labels: list[torch.Tensor | None], n_images: int) -> None:
    """Warn where the samples come class by class, as from a folder."""
    known = [y for y in labels if y is not None]
    if len(known) < len(labels):
        return
    y = torch.cat(known)[:n_images].cpu().to(torch.int64)
    classes = sorted(set(y.tolist()))
    if len(y) < _FEWEST or len(classes) > len(y) // 4 or not bool((y.diff() >= 0).all()):
        return
    which = f"all of class {classes[0]}"
    if len(classes) > 1:
        which = f"sorted by class ({classes[0]} to {classes[-1]})"
    warn(
        f"The {len(y)} calibration images are {which}, so that running statistics are not those "
        "of the training data. Shuffle them: shuffle=True in the training dataloader.",
        CalibrationWarning,
    )
