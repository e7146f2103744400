# SPDX-License-Identifier: Apache-2.0
"""Restoring what a search changes: module flags, buffers, device, trainers, the SIGINT handler."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torchmetrics import Metric

from lightning_subnet.training._lightning import LightningModule, attached_trainer
from lightning_subnet.training.validation.gathered import GatheredState


@contextmanager
def module_state(module: LightningModule, datamodule: Any = None) -> Iterator[BufferState]:
    """Restore what validating may change in a module, its datamodule and the process.

    Every part is restored whatever happens to the others.

    Yields:
        The state of the buffers, which can be restored in between.
    """
    buffers = BufferState(module)
    inner = [child for child in module.modules() if isinstance(child, LightningModule)]
    trainers = [(child, attached_trainer(child)) for child in inner]
    dm_trainer = getattr(datamodule, "trainer", None)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    with ExitStack() as stack:
        if handler is not None:
            stack.callback(signal.signal, signal.SIGINT, handler)
        if datamodule is not None:
            stack.callback(setattr, datamodule, "trainer", dm_trainer)
        for owner, trainer in trainers:
            stack.callback(setattr, owner, "_trainer", trainer)
        stack.callback(buffers.restore)
        for child in module.modules():
            stack.callback(setattr, child, "training", child.training)
            # Modules of Lightning and metrics note their device and their type.
            notes = {k: v for k, v in vars(child).items() if k in ("_device", "_dtype")}
            stack.callback(vars(child).update, notes)
        for p in module.parameters():
            if p.grad is not None:  # half of an accumulation
                stack.callback(_restore_gradient, p, p.grad, p.grad.data)
            stack.callback(_restore_parameter, p, p.data, p.device, p.requires_grad)
        yield buffers


def _restore_parameter(
    parameter: torch.nn.Parameter, data: torch.Tensor, device: torch.device, requires_grad: bool
) -> None:
    """Give a parameter its own data back where it was moved or converted to another type."""
    if parameter.data_ptr() != data.data_ptr() or parameter.dtype != data.dtype:
        parameter.data = data.to(device)
    parameter.requires_grad_(requires_grad)


def _restore_gradient(
    parameter: torch.nn.Parameter, gradient: torch.Tensor, data: torch.Tensor
) -> None:
    """Give a parameter the gradients back that it has gathered so far."""
    if gradient.data_ptr() != data.data_ptr() or gradient.dtype != data.dtype:
        gradient.data = data
    parameter.grad = gradient


class BufferState:
    """The buffers of a module, as objects and as values."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._buffers = [
            (owner, name, buffer, None if buffer is None else buffer.detach().clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
        ]

    def restore(self) -> None:
        """Put every buffer back, with its value, even where it was rebound or resized."""
        with torch.no_grad():
            for owner, name, buffer, value in self._buffers:
                owner._buffers[name] = buffer
                if buffer is None or value is None:  # a lazy one
                    continue
                if buffer.shape != value.shape:
                    buffer.resize_(value.shape)
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    def restore_values(self) -> None:
        """Give the present buffers their first values, where they still have that form."""
        with torch.no_grad():
            for owner, name, _, value in self._buffers:
                now = owner._buffers.get(name)
                if value is None:
                    owner._buffers[name] = None
                elif now is None or now.shape != value.shape or now.is_inference():
                    owner._buffers[name] = value.clone().to(
                        value.device if now is None else now.device
                    )
                elif not torch.equal(now, value.to(now)):
                    now.copy_(value)


@contextmanager
def untouched(module: LightningModule) -> Iterator[None]:
    """Empty the metrics of a module, and restore on leaving what a validation gathers in it.

    Restored are the states of the metrics and the attributes of the LightningModule itself; lists,
    dicts and sets get their items back in place.
    """
    gathered = GatheredState(module)
    states = [
        (
            metric,
            {
                # A reset gives it other tensors, but empties the lists that it has.
                name: copy.copy(value) if isinstance(value, list) else value
                for name, value in vars(metric).items()
                if name in metric._defaults or name in _COUNTED
            },
        )
        for metric in module.modules()
        if isinstance(metric, Metric)
    ]
    try:
        for metric, _ in states:
            metric.reset()
        yield
    finally:
        gathered.restore()
        for metric, state in states:
            vars(metric).update(state)


_COUNTED = ("_update_count", "_computed", "_forward_cache")  # of a torchmetrics Metric
