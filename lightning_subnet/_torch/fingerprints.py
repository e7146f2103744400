# SPDX-License-Identifier: Apache-2.0
"""Batches of any form: their tensors, copies and hashes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

_PLAIN = (str, bytes, int, float, complex, type(None), np.generic)


def leaves(batch: Any) -> Iterator[Any]:
    """Yield what a batch is made of: tensors, arrays and plain values, also those in objects.

    Example:
        >>> sorted(leaves({"x": 1, "y": [2, 3]}))
        [1, 2, 3]
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, (torch.Tensor, np.ndarray, *_PLAIN)):
            yield leaf
        elif (parts := _parts(leaf)) is not None:
            yield type(leaf).__qualname__
            for name, part in sorted(parts.items()):
                yield name
                yield from leaves(part)
        else:
            yield leaf


def _parts(item: Any) -> dict[str, Any] | None:
    """Return what an object holds, or None if that cannot be seen."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    return vars(item) if hasattr(item, "__dict__") and not isinstance(item, type) else None


def cloned(batch: Any, device: Any = None) -> Any:
    """Return a copy of a batch, as a step may work on it in place."""

    def clone(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to(device, copy=True)
        return x if isinstance(x, _PLAIN) else copy.deepcopy(x)

    return tree_map(clone, batch)


def data_fingerprint(loaders: list[Any]) -> str:
    """Return a hash of the batches in memory (of the first and the length, if not in memory)."""
    contents = []
    for loader in loaders:
        batches = getattr(loader, "batches", None)
        if batches is None:
            length = [len(loader)] if hasattr(loader, "__len__") else []
            batches = [*length, next(iter(loader))]
        contents.append(batches)
    return hashed(contents)


def hashed(tree: Any, *, size: int = 16) -> str:
    """Return a hash, of so many bytes, of tensors, arrays and plain values in any structure."""
    digest = hashlib.blake2b(digest_size=size)
    for leaf in leaves(tree):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(
                leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                if leaf.ndim
                else repr(leaf.item()).encode()
            )
        elif isinstance(leaf, np.ndarray):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        elif isinstance(leaf, _PLAIN):
            digest.update(repr(leaf).encode())
        else:  # its repr may hold an address
            digest.update(type(leaf).__qualname__.encode())
    return digest.hexdigest()
