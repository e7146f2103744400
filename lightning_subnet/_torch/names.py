# SPDX-License-Identifier: Apache-2.0
"""Names: what a module is called in messages and files."""

from __future__ import annotations

import torch
from torch import nn


def class_name(module: object) -> str:
    """Return the name of the class that a user wrote of a module, for messages and metadata.

    That of a module of TorchScript, of a compiled one, and of a subnet that was sliced is the name
    of what they were made of, which their classes have as `original_name`.

    Args:
        module: A module, or anything that was passed in its place.

    Example:
        >>> class_name(nn.Linear(2, 2)), class_name(3)
        ('Linear', 'int')
    """
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", type(module).__name__))
    if isinstance(module, nn.Module) and "_orig_mod" in module._modules:  # of torch.compile
        return class_name(module._modules["_orig_mod"])
    name = getattr(type(module), "original_name", None)
    return name if isinstance(name, str) else type(module).__name__
