# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: hashes of batches of any form, of data and of the code of networks."""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_PLAIN = (str, bytes, int, float, complex, type(None), np.generic)


def leaves(batch: Any) -> Iterator[Any]:
    """Yield the parts of a batch: tensors, arrays and plain values, also those in objects.

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
    """Return the attributes of an object by name, or None if they cannot be seen."""
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


def stable_text(value: Any) -> str:
    """Return a text that is the same in every process: no addresses, no order of sets.

    Example:
        >>> print(stable_text({"lr": 0.1, "size": {2, 1}, "net": object()}))
        {'lr': '0.1', 'size': "['1', '2']", 'net': 'object'}
    """
    if isinstance(value, (set, frozenset)):
        return str(sorted(map(stable_text, value)))
    if isinstance(value, (list, tuple)):
        return str([stable_text(item) for item in value])
    if isinstance(value, dict):
        return str({str(k): stable_text(v) for k, v in value.items()})
    if isinstance(value, (*_PLAIN, slice)):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


# Raise it by one when the numbers that a network of this package gives change, with the same
# weights, inputs and subnet, or when it becomes faster or slower: stored values, latencies too, are
# not reused then. A comment, a docstring or another name for a variable leave it as it is.
NETWORKS_VERSION = 1

_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = (
    *("torch", "lightning", "pytorch_lightning", "torchmetrics"),
    *("builtins", "abc", "typing", "functools", "contextlib"),
)


def code_fingerprint(module: nn.Module) -> str:
    """Return a hash of the methods of a module and its children, libraries excepted.

    Docstrings, comments, formatting and line numbers do not count. Classes of this package count by
    name and by `NETWORKS_VERSION`, so that tidying them leaves stored values valid. Functions that
    methods call, but that stand outside of the classes, are not seen, nor are class attributes.
    Forward hooks of others than these libraries count too.

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
    counted = [cls for cls in classes if _root(cls.__module__) not in _LIBRARIES]
    # Not by module: the same class may come from __main__ today and from a module tomorrow.
    for text in sorted(f"{cls.__qualname__}:{_class_digest(cls)}" for cls in counted):
        digest.update(text.encode())
    for name, child in module.named_modules():
        for hook in (*child._forward_pre_hooks.values(), *child._forward_hooks.values()):
            if (function := _own_function(hook)) is not None:
                digest.update(name.encode())
                _update(digest, function)
    return digest.hexdigest()


def _own_function(hook: Any) -> types.FunctionType | None:
    """Return the function behind a hook, or None if it is of a library or of this package."""
    candidates = (
        getattr(hook, "__func__", hook),
        inspect.getattr_static(type(hook), "__call__", None),
    )
    function = next((x for x in candidates if isinstance(x, types.FunctionType)), None)
    if function is None:
        return None
    root = _root(function.__globals__.get("__name__", ""))
    return None if root in (_PACKAGE, *_LIBRARIES) else function


def _root(module: str) -> str:
    return module.partition(".")[0]


def _class_digest(cls: type) -> str:
    if _root(cls.__module__) == _PACKAGE:
        return f"{_PACKAGE} {NETWORKS_VERSION}"
    digest = hashlib.blake2b(digest_size=16)
    for name, member in sorted(vars(cls).items()):
        for function in _functions(member):
            digest.update(name.encode())
            _update(digest, function)
    return digest.hexdigest()


def _functions(member: Any) -> Iterator[types.FunctionType]:
    """Yield the functions behind a method, a property or a decorated one."""
    candidates = [member, *(getattr(member, name, None) for name in ("__func__", "fget", "fset"))]
    while candidates:
        candidate = candidates.pop()
        if isinstance(candidate, types.FunctionType):
            yield candidate
            candidates.append(getattr(candidate, "__wrapped__", None))


def _update(digest: Any, function: types.FunctionType) -> None:
    code = function.__code__
    # What a decorator of a library or of this package made; the user's function is behind it.
    if _root(function.__globals__.get("__name__", "")) in (_PACKAGE, *_LIBRARIES):
        digest.update(code.co_qualname.encode())
        return
    _update_by_code(digest, code)
    named = sorted((function.__kwdefaults__ or {}).items())
    digest.update(stable_text((*(function.__defaults__ or ()), *named)).encode())


def _update_by_code(digest: Any, code: types.CodeType) -> None:
    """Hash what a function does: each instruction with the value that it works on.

    The raw bytes would not do: a docstring takes a number among the constants, so that the numbers
    of all others, which the bytes hold, depend on whether there is one.
    """
    variadic = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, variadic)
    n_parameters = code.co_argcount + code.co_kwonlyargcount + variadic.bit_count()
    digest.update(repr((counts, code.co_varnames[:n_parameters])).encode())
    steps: list[tuple[str, Any]] = []
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if instruction.opcode in dis.hasconst:  # Python 3.11 gives no argval to names of keywords
            value = code.co_consts[instruction.arg or 0]
        if name == "STORE_NAME" and value in _ABOUT_A_CLASS:  # of a class inside a function
            steps.pop()  # the value that it stores
        elif name != "EXTENDED_ARG":
            steps.append((name, value))
    for name, value in steps:
        digest.update(name.encode())
        if isinstance(value, types.CodeType):
            _update_by_code(digest, value)
        else:
            digest.update(stable_text(value).encode())


_ABOUT_A_CLASS = ("__doc__", "__firstlineno__", "__static_attributes__")
