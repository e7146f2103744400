# SPDX-License-Identifier: Apache-2.0
"""BatchNorm recalibration: the running statistics that a subnet would have if trained alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_subnet._checks import checked_int
from lightning_subnet._torch.contexts import evaluating
from lightning_subnet.errors import MeasurementError


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the layers whose running statistics depend on the subnet."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]


def _trained(module: nn.Module) -> list[_BatchNorm]:
    """Return those that training would touch; the module's own `train()` may freeze others."""
    module.train()
    layers = [layer for layer in batch_norms(module) if layer.training]
    module.eval()
    return layers


def n_samples(batch: Any) -> int:
    """Return the length of a batch's first tensor; 1 if it has none.

    Example:
        >>> n_samples({"x": torch.zeros(5, 2), "y": torch.zeros(5)})
        5
    """
    lengths = (len(x) for x in tree_leaves(batch) if isinstance(x, torch.Tensor) and x.ndim)
    return next(lengths, 1)


def recalibrate(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    max_images: int = 2000,
    forward: Callable[[Any], Any] | None = None,
) -> int:
    """Reset the BatchNorm statistics and average them anew over fixed batches of the active subnet.

    Statistics of a super-network belong to whichever subnets ran last; without this a subnet is
    measured far below its worth. Only BatchNorm layers are in training mode meanwhile (dropout
    stays off); statistics are written in place; flags and momenta are restored. Layers that the
    module's own `train()` keeps in eval mode (frozen ones), and those that do not run, keep theirs.

    Args:
        module: The network, with the subnet in force.
        batches: Inputs of training data, always the same: tensors (n, ...), or structures of them,
            each given to `forward`.
        max_images: Stop after so many samples; the last batch is cut to fit if it is a tensor.
        forward: Called with each batch; by default the module itself.

    Returns:
        How many samples were used; 0 if the network has no BatchNorm.

    Raises:
        MeasurementError: No batches, or `max_images` is not a whole number from 1.

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
    max_images = checked_int(
        max_images, "max_images", error=MeasurementError, hint="256 to 2000 are usual."
    )
    run, n_used = forward or module, 0
    with evaluating(module), torch.no_grad():
        layers = _trained(module)
        if not layers:
            return 0
        momenta = [layer.momentum for layer in layers]
        before = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the plain average of all batches
                layer.train()
            for batch in batches:
                # Structures stay whole: their parts may not be samples (a graph, a list).
                part = batch[: max_images - n_used] if isinstance(batch, torch.Tensor) else batch
                run(part)
                n_used += n_samples(part)
                if n_used >= max_images:
                    break
        finally:
            for layer, momentum, values in zip(layers, momenta, before, strict=True):
                layer.momentum = momentum
                if layer.num_batches_tracked == 0:  # it did not run
                    for buffer, value in zip(layer.buffers(), values, strict=True):
                        buffer.copy_(value)
    if not n_used:
        msg = "There are no batches to recalibrate BatchNorm with. Give inputs of training data."
        raise MeasurementError(msg)
    return n_used


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by its batch without touching its running statistics."""
    layers: list[Any] = [*batch_norms(module)]  # those with statistics count their batches
    before = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, tracked) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(tracked)
