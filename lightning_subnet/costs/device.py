# SPDX-License-Identifier: Apache-2.0
"""The machine that costs are measured on: whether a device can be used, and what it is."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.contexts import default_type, default_types
from lightning_subnet.errors import ObjectiveError

_CPUINFO = Path("/proc/cpuinfo")


def usable_device(name: str) -> torch.device:
    """Return a device of this machine on which networks can run.

    Args:
        name: `"cpu"`, `"cuda"`, `"cuda:1"`, ...

    Raises:
        ObjectiveError: There is no such device here, or it computes nothing (`"meta"`).

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.zeros(1, device=name).device
        _ = getattr(torch, device.type).synchronize  # "meta" has none
    except Exception as error:  # of another class for each kind of device
        msg = f"device={name!r} cannot be used here: {error!s:.100}. Write device='cpu'."
        raise ObjectiveError(msg) from error
    return device


def describe_device(name: str) -> str:
    """Return the model of a device, its kind and the version of torch, for a fingerprint.

    The text is the same in every process of this machine, and for equal devices of it.

    Args:
        name: `"cpu"`, `"cuda"`, `"cuda:1"`, ...

    Raises:
        ObjectiveError: There is no such device here.

    Example:
        >>> describe_device("cpu")
        '... (cpu), torch ...'
    """
    device = usable_device(name)
    return f"{_model(device)} ({device.type}), torch {torch.__version__}"


def as_it_runs(
    net: nn.Module, run: Callable[[], Any], *, trial: Callable[[], Any] | None = None
) -> Callable[[], Any]:
    """Return a forward pass under the default type that it needs; as it is, where that does.

    A Trainer with `precision="bf16-true"` makes all tensors of no stated type in that of the
    weights, and a network may only run so.

    Args:
        net: The network, whose weights say which types are tried.
        run: Its forward pass.
        trial: What is tried in place of it. A pass that fails in each type is left to the caller.

    Example:
        >>> net = nn.Linear(2, 2).bfloat16()
        >>> as_it_runs(net, lambda: net(torch.ones(1, 2)))().dtype
        torch.bfloat16
    """
    usual, *others = default_types(net)
    for dtype in (usual, *others) if others else ():
        try:
            with torch.inference_mode(), default_type(dtype):
                (trial or run)()
        except Exception:  # of which the caller tells
            continue
        return run if dtype is usual else _in_type(dtype, run)
    return run


def _in_type(dtype: torch.dtype, run: Callable[[], Any]) -> Callable[[], Any]:
    def typed() -> Any:
        with default_type(dtype):
            return run()

    return typed


def _model(device: torch.device) -> str:
    if device.type != "cpu":
        return str(getattr(getattr(torch, device.type), "get_device_name", str)(device))
    match = _CPUINFO.exists() and re.search(r"model name\s*: (.+)", _CPUINFO.read_text())
    return match[1] if match else platform.processor() or platform.machine()
