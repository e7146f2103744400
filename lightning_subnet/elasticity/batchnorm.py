# SPDX-License-Identifier: Apache-2.0
"""BatchNorm recalibration: the running statistics that a subnet would have if trained alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_subnet._checks import checked_int
from lightning_subnet._messages import warn
from lightning_subnet._torch.contexts import evaluating
from lightning_subnet._torch.fingerprints import leaves
from lightning_subnet.elasticity.renewal import Known, Renewal
from lightning_subnet.elasticity.statistics import (
    Snapshot,
    has_named_statistics,
    norms,
    others,
    tracks,
)
from lightning_subnet.errors import CalibrationWarning, MeasurementError


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that have running statistics."""
    return [layer for layer in norms(module) if isinstance(layer, _BatchNorm)]


def n_samples(batch: Any) -> int:
    """Return the length of a batch's first tensor or array; 1 if it has none.

    Example:
        >>> n_samples({"x": torch.zeros(5, 2), "y": torch.zeros(5)})
        5
    """
    length = _first_length(tree_leaves(batch))
    if length is None:  # it may be an object with tensors in its attributes
        with suppress(RecursionError):
            length = _first_length(leaves(batch))
    return 1 if length is None else length


def _first_length(parts: Iterable[Any]) -> int | None:
    arrays = (x for x in parts if isinstance(x, (torch.Tensor, np.ndarray)) and x.ndim)
    return next(map(len, arrays), None)


def recalibrate(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    max_images: int = 2000,
    forward: Callable[[Any], Any] | None = None,
) -> int:
    """Reset the running statistics and average them anew over fixed batches of the active subnet.

    Statistics of a super-network belong to whichever subnets ran last; without this a subnet is
    measured far below its worth. A mean is that of all samples. A variance is the average, weighted
    by samples, of the unbiased variances within each batch, as BatchNorm tracks them.

    All layers with running statistics are renewed: BatchNorm and InstanceNorm of torch and
    subclasses of them, whatever their momentum and whoever calls the function with their buffers,
    and layers of other classes whose buffers follow a running average in training mode. Only such
    layers are in training mode meanwhile (dropout stays off); statistics are written in place;
    flags come back, momenta are not touched. What a network draws all the same comes from a random
    state of the batch alone; the caller's is not touched.

    These keep their statistics: layers that do not run; those that the module's own `train()` keeps
    in eval mode; those with `track_running_stats=False`, as
    `BaseFinetuning.freeze(train_bn=False)` of Lightning leaves them; and those in eval mode in a
    module of which other such layers, or their holder, are in training mode. After a failure all
    keep theirs.

    Args:
        module: The network, with the subnet in force.
        batches: Inputs of training data, always the same: tensors (n, ...), or structures of them,
            each given to `forward`.
        max_images: Stop before a tensor that would make it more samples, so that none is cut to a
            small rest; only a first one that is larger is cut to fit. Structures stay whole: stop
            after so many samples. A batch of one sample after larger ones, as a loader may end
            with, is left out.
        forward: Called with each batch; by default the module itself.

    Returns:
        How many samples were used; 0 if the network has no running statistics to renew.

    Raises:
        MeasurementError: No batches, none of the layers ran, a batch has one value per channel,
            `max_images` is not a whole number from 1, `batches` is a single tensor, or the module
            does not take a batch that is a structure, as (inputs, targets), and there is no
            `forward`.

    Warns:
        CalibrationWarning: A layer has statistics that cannot be renewed, or it is not clear
            whether it is frozen.

    References:
        Yu and Huang, Universally Slimmable Networks, ICCV 2019, section 3.3 (post-statistics of
        BN).

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> recalibrate(net, [torch.full((4, 2), 3.0)])
        4
        >>> net.running_mean
        tensor([3., 3.])
    """
    if isinstance(batches, torch.Tensor):
        msg = (
            f"batches= is one tensor {tuple(batches.shape)}, of which each row would be a batch. "
            "Write recalibrate(module, [tensor])."
        )
        raise MeasurementError(msg)
    structure: Any = None

    def noted(batch: Any) -> Any:
        nonlocal structure
        structure = None if isinstance(batch, torch.Tensor) else batch
        return module(batch)

    try:
        return Recalibrator(module)(batches, max_images=max_images, forward=forward or noted)
    except (MeasurementError, CalibrationWarning):
        raise
    except Exception as error:
        if structure is None:
            raise
        msg = (
            f"{type(module).__name__} failed on a batch that is a {type(structure).__name__}: "
            f"{type(error).__name__}: {error!s:.100}. Give batches of inputs alone, or say what "
            "runs on one: forward=lambda batch: module(batch[0])."
        )
        raise MeasurementError(msg) from error


class Recalibrator:
    """`recalibrate` for many subnets: what it learns of the layers, and warns of, it does once.

    Args:
        module: The network, with its layers in the modes in which it would be trained.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
        >>> renew = Recalibrator(net)
        >>> renew([torch.zeros(4, 2)]), renew([torch.zeros(8, 2)])
        (4, 8)
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known = Known()
        self._causes: set[str] = set()  # that were warned of
        moving = {x for x in norms(module) if tracks(x)}
        layers = {name: x for name, x in module.named_modules() if x in moving}
        mixed = module.training and any(x.training for x in moving)
        # Lightning trains each layer in the mode in which the user left it.
        self._paused = {
            name
            for name, x in layers.items()
            if not x.training and (mixed or (module.training and _is_apart(module, name)))
        }

    def __call__(
        self,
        batches: Iterable[Any],
        *,
        max_images: int = 2000,
        forward: Callable[[Any], Any] | None = None,
        module: nn.Module | None = None,
    ) -> int:
        """Renew the statistics; see `recalibrate`.

        Args:
            batches: Inputs of training data.
            max_images: The most samples.
            forward: Called with each batch; by default the module itself.
            module: Another module in its stead, such as a subnet that was extracted from it. A
                layer of it is frozen where that of the same name is.
        """
        max_images = checked_int(
            max_images, "max_images", error=MeasurementError, hint="256 to 2000 are usual."
        )
        module = self._module if module is None else module
        paused = {x for name, x in module.named_modules() if name in self._paused}
        with evaluating(module), torch.no_grad(), _uncompiled():
            renewal = Renewal(module, forward or module, self._known, paused)
            n_used = renewal.over(_parts(batches, max_images))
        for cause, message in renewal.messages():
            if cause not in self._causes:
                self._causes.add(cause)
                warn(message, CalibrationWarning)
        return n_used


def _is_apart(module: nn.Module, name: str) -> bool:
    """Return whether a module that holds a layer is in training mode.

    The root of several levels does not count: it may be a LightningModule around a network that
    comes in eval mode as a whole, as those of model hubs do.
    """
    parents = name.split(".")[:-1]
    holders = [".".join(parents[: i + 1]) for i in range(len(parents))] or [""]
    return any(module.get_submodule(holder).training for holder in holders)


def _parts(batches: Iterable[Any], max_images: int) -> Iterator[tuple[Any, int]]:
    """Yield the batches that are used, each with the number of its samples."""
    n_used = largest = 0
    for batch in batches:
        n, cuts = n_samples(batch), isinstance(batch, torch.Tensor)
        if cuts and n_used and n_used + n > max_images:
            return
        largest = max(largest, n)
        if n == 1 < largest:
            continue
        # Structures stay whole: their parts may not be samples (a graph, a list).
        part = batch[:max_images] if cuts else batch
        n = n_samples(part)
        yield part, n
        n_used += n
        if n_used >= max_images:
            return


def _uncompiled() -> AbstractContextManager[Any]:
    """Let compiled parts run as they are written, so that `Watch` sees what they do."""
    stance: Any = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    return nullcontext() if stance is None else stance("force_eager")


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as they were: inside, layers normalise by their batch as they do.

    Do not leave it between a forward and its backward pass: statistics are written on leaving.
    """
    layers: set[nn.Module] = {*norms(module), *filter(has_named_statistics, others(module))}
    state = Snapshot(layers)
    try:
        yield
    finally:
        with torch.no_grad():
            state.restore()
