# SPDX-License-Identifier: Apache-2.0
"""Contexts that change something for a while: random states, a method, eval mode, logging."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the states of `random`, NumPy and torch on leaving; seed on entering if asked."""
    python, numpy_ = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's code may use it
    cuda: Any = torch.cuda  # is_initialized() carries no annotation
    devices = range(torch.cuda.device_count()) if cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - the user's code may use it
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_)  # noqa: NPY002 - as above


@contextmanager
def shadowed(owner: Any, name: str, shadow: Any) -> Iterator[None]:
    """Replace a method on an instance; its own attribute of that name, if any, comes back.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 2)
        >>> with shadowed(net, "forward", lambda x: -x):
        ...     net(torch.ones(1)).item()
        -1.0
        >>> "forward" in vars(net)
        False
    """
    # LightningDataModule.from_datasets keeps its dataloaders as attributes of the instance.
    before = vars(owner).get(name)
    setattr(owner, name, shadow)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that autograd takes inside a `with` block, in a user's inference mode too.

    Example:
        >>> with torch.inference_mode(), ordinary_tensors():
        ...     torch.zeros(1).is_inference(), torch.is_grad_enabled()
        (False, False)
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # which the former alone would end
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode inside a `with` block, and every flag back afterwards."""
    # A frozen module of TorchScript has no such flag.
    training = {child: child.training for child in module.modules() if hasattr(child, "training")}
    try:
        module.eval()
        yield
    finally:
        for child, flag in training.items():
            child.training = flag


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of no stated type in one inside a `with` block.

    Example:
        >>> with default_type(torch.bfloat16):
        ...     torch.zeros(1).dtype
        torch.bfloat16
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def default_types(module: nn.Module) -> list[torch.dtype]:
    """Return the types that tensors of no stated type may have in a forward pass of a module.

    As torch has it; then that of the weights, as a Trainer of `precision="bf16-true"` sets it.

    Example:
        >>> default_types(nn.Linear(2, 2).bfloat16())
        [torch.float32, torch.bfloat16]
    """
    usual = torch.get_default_dtype()
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None or weight.dtype not in (torch.bfloat16, torch.float16, torch.float64):
        return [usual]
    return list(dict.fromkeys([usual, weight.dtype]))


@contextmanager
def same_buffers(module: nn.Module) -> Iterator[None]:
    """Give the buffers of a module their values back on leaving.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with same_buffers(norm):
        ...     _ = norm(torch.ones(3, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    values = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                if buffer.shape == value.shape and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """Drop what a LightningModule logs."""

    def drop(*_args: Any, **_kwargs: Any) -> None: ...

    with shadowed(module, "log", drop), shadowed(module, "log_dict", drop):
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep attention off its fast path: counters and exporters see nothing inside it.

    Example:
        >>> with plain_attention():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keep the garbage collector still inside a `with` block: when it runs is a matter of chance.

    Example:
        >>> with collection_paused():
        ...     gc.isenabled()
        False
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        (gc.enable if before else gc.disable)()
