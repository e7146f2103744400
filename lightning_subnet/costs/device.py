# SPDX-License-Identifier: Apache-2.0
"""The machine that costs are measured on: whether a device can be used, and what it is."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

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


def _model(device: torch.device) -> str:
    if device.type != "cpu":
        return str(getattr(getattr(torch, device.type), "get_device_name", str)(device))
    match = _CPUINFO.exists() and re.search(r"model name\s*: (.+)", _CPUINFO.read_text())
    return match[1] if match else platform.processor() or platform.machine()
