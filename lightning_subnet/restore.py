# SPDX-License-Identifier: Apache-2.0
"""Leaving no trace: what a search changes comes back.

That is module flags, buffers, device, trainers and the SIGINT handler.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_subnet._lightning import LightningModule, attached_trainer


@contextmanager
def module_state(module: LightningModule, datamodule: Any = None) -> Iterator[None]:
    """Restore what validating may change in a module, its datamodule and the process."""
    training = {child: child.training for child in module.modules()}
    wants_grad = {name: p.requires_grad for name, p in module.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    devices = {p.device for p in module.parameters()}
    trainer = attached_trainer(module)
    dm_trainer = getattr(datamodule, "trainer", None)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    finally:
        if len(devices) == 1:
            module.to(devices.pop())
        for child, flag in training.items():
            child.training = flag
        for name, p in module.named_parameters():
            p.requires_grad_(wants_grad[name])
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
        module._trainer = trainer
        if datamodule is not None:
            datamodule.trainer = dm_trainer
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)
