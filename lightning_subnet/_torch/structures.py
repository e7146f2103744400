# SPDX-License-Identifier: Apache-2.0
"""Structures: nested arguments and outputs as leaves and back, dataclasses of any class too."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import TreeSpec, register_pytree_node, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class _Opened:
    """What an object of a class that pytree does not know holds.

    Args:
        cls: Its class.
        keys: Of its items, if it is a dict.
        names: Of its attributes.
        values: Of both, in this order.
    """

    cls: type
    keys: tuple[Any, ...]
    names: tuple[str, ...]
    values: tuple[Any, ...]


def _closed(values: Iterable[Any], context: Any) -> Any:
    """Return the object, made as a copy is: without a call of its class."""
    cls, keys, names = context
    rest = iter(values)
    item = cls.__new__(cls)
    base = OrderedDict if issubclass(cls, OrderedDict) else dict
    for key in keys:
        base.__setitem__(item, key, next(rest))
    for name in names:
        object.__setattr__(item, name, next(rest))  # of a frozen one too
    return item


register_pytree_node(
    _Opened, lambda x: (list(x.values), (x.cls, x.keys, x.names)), _closed
)  # fmt: skip


def flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of a structure, and its form.

    Tuples, lists and dicts are opened, what is registered with pytree, and also dataclasses and
    classes of dicts that are not: torch takes each of those for one leaf.

    Example:
        >>> @dataclass
        ... class Output:
        ...     logits: int
        ...     hidden: tuple[int, ...]
        >>> leaves, spec = flatten({"a": Output(1, (2, 3))})
        >>> leaves, unflatten([4, 5, 6], spec)
        ([1, 2, 3], {'a': Output(logits=4, hidden=(5, 6))})
    """
    leaves, spec = tree_flatten(value)
    if not any(map(_can_be_opened, leaves)):
        return leaves, spec
    return tree_flatten(_opened(value))


def unflatten(leaves: Iterable[Any], spec: TreeSpec) -> Any:
    """Return a structure of a form with these leaves."""
    return tree_unflatten(list(leaves), spec)


def kind(spec: TreeSpec) -> str:
    """Return the name of the class of a structure.

    Example:
        >>> kind(flatten((1, 2))[1])
        'tuple'
    """
    cls: Any = spec.context[0] if spec.type is _Opened else spec.type
    named = isinstance(spec.context, type) and issubclass(spec.context, tuple)
    return str((spec.context if named else cls).__name__)


def _can_be_opened(leaf: Any) -> bool:
    if isinstance(leaf, type):
        return False
    return dataclasses.is_dataclass(leaf) or isinstance(leaf, dict)


def _opened(value: Any) -> Any:
    """Return a structure in which leaves that can be are opened."""
    leaves, spec = tree_flatten(value)
    return tree_unflatten([_open(x) if _can_be_opened(x) else x for x in leaves], spec)


def _open(item: Any) -> _Opened:
    keys = tuple(item) if isinstance(item, dict) else ()
    fields = [f.name for f in dataclasses.fields(item)] if dataclasses.is_dataclass(item) else []
    names = tuple(
        n for n in dict.fromkeys([*fields, *getattr(item, "__dict__", ())]) if hasattr(item, n)
    )
    values = [*(dict.__getitem__(item, key) for key in keys), *(getattr(item, n) for n in names)]
    return _Opened(type(item), keys, names, tuple(map(_opened, values)))
