# SPDX-License-Identifier: Apache-2.0
"""Batches of any form: their tensors, copies and hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

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


_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "builtins", "abc")


def code_fingerprint(module: nn.Module) -> str:
    """Return a hash of the methods of a module and its children, libraries excepted.

    Comments and formatting do not count. Functions that methods call, but that stand outside of the
    classes, are not seen.

    Example:
        >>> class A(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> class B(nn.Module):
        ...     def forward(self, x):
        ...         return x + 1
        >>> code_fingerprint(A()) == code_fingerprint(A())
        True
        >>> code_fingerprint(A()) == code_fingerprint(B())
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    classes = {cls for child in module.modules() for cls in type(child).__mro__}
    own = [cls for cls in classes if cls.__module__.split(".")[0] not in _LIBRARIES]
    # Not by module: the same class may come from __main__ today and from a module tomorrow.
    for text in sorted(f"{cls.__qualname__}:{_class_digest(cls)}" for cls in own):
        digest.update(text.encode())
    return digest.hexdigest()


def _class_digest(cls: type) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, member in sorted(vars(cls).items()):
        for function in _functions(member):
            digest.update(name.encode())
            _update(digest, function.__code__)
    return digest.hexdigest()


def _functions(member: Any) -> Iterator[types.FunctionType]:
    """Yield the functions behind a method, a property or a decorated one."""
    candidates = [member, *(getattr(member, name, None) for name in ("__func__", "fget", "fset"))]
    while candidates:
        candidate = candidates.pop()
        if isinstance(candidate, types.FunctionType):
            yield candidate
            candidates.append(getattr(candidate, "__wrapped__", None))


def _update(digest: Any, code: types.CodeType) -> None:
    digest.update(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _update(digest, constant)
        elif isinstance(constant, frozenset):
            digest.update(repr(sorted(map(repr, constant))).encode())
        else:
            digest.update(repr(constant).encode())
