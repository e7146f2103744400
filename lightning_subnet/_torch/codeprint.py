# SPDX-License-Identifier: Apache-2.0
"""A hash of the code that a module runs, so that values of an older version are not reused."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

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
