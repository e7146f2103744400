# SPDX-License-Identifier: Apache-2.0
"""A method replaced on one instance for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shadowed(owner: Any, name: str, shadow: Any) -> Iterator[None]:
    """Replace a method on an instance; what the instance had under that name comes back.

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
    own = vars(owner).get(name)
    setattr(owner, name, shadow)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)
