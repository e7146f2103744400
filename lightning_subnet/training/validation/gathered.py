# SPDX-License-Identifier: Apache-2.0
"""State that a validation gathers in a module, which is to be the same before each subnet."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torchmetrics import Metric

from lightning_subnet._torch.fingerprints import hashed, stable_text
from lightning_subnet.training._lightning import LightningModule

_INTERNAL = {
    *vars(LightningModule()),
    *vars(torch.nn.Module()),
    *("_hparams", "_hparams_initial", "_hparams_name"),  # which Lightning makes when they are read
}
_MOST_ELEMENTS = 1_000_000  # a larger tensor is data
_DEEPEST, _MOST_ITEMS = 4, 1000  # where metrics are looked for; a longer list is data
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, list, dict, set, deque)


class GatheredState:
    """The state that a validation gathers in a module: in its attributes and in its metrics.

    Lists, dicts, sets and deques get their items back in place, nested ones too, and so do objects
    of plain attributes, such as meters of an average; other attributes get their value back, and
    those that are new go. What torch and Lightning keep in a module is not touched, nor are
    parameters, buffers and what `skip` holds.

    Args:
        module: A LightningModule.
        skip: A part whose attributes stay as they are, as they say which subnet is in force.
    """

    def __init__(self, module: LightningModule, skip: Any = None) -> None:
        self._module = module
        inside = set(skip.modules()) if skip is not None and skip is not module else set()
        owners = [m for m in module.modules() if m not in inside and not isinstance(m, Metric)]
        self._attributes = [
            (owner, {name: (v, _copied(v)) for name, v in _own(owner).items()}) for owner in owners
        ]
        own, seen = [v for owner in owners for v in _own(owner).values()], set[int]()
        self._hidden = [inner for value in own for inner in _modules_in(value, seen)]

    def changed(self) -> list[str]:
        """Return the names of the attributes that are not as they were."""
        names = {module: name for name, module in self._module.named_modules()}
        changes = []
        for owner, before in self._attributes:
            prefix = f"{names[owner]}." if names.get(owner) else ""
            now = _own(owner)
            changes += [
                f"{prefix}{name}"
                for name in dict.fromkeys([*before, *now])
                if name not in before or name not in now or not _same(now[name], *before[name])
            ]
        return changes

    def restore(self) -> None:
        """Empty the metrics, and give the attributes their first values."""
        for owner, before in self._attributes:
            for name in _own(owner).keys() - before.keys():
                delattr(owner, name)
            for name, (value, copy_of) in before.items():
                vars(owner)[name] = _refilled(value, copy_of)
        for metric in self._metrics():
            metric.reset()

    def _metrics(self) -> Iterator[Metric]:
        """Yield the metrics of the module, also those that torch does not know to be in it."""
        for module in (self._module, *self._hidden):
            yield from (child for child in module.modules() if isinstance(child, Metric))


def attributes_digest(module: torch.nn.Module) -> str:
    """Return a hash of what a module and its children do by besides weights and code.

    These are their modes and plain attributes: numbers, texts, flags, containers of them, functions
    by name, small tensors, and objects of such attributes; those of the authors' classes too.
    Buffers and parameters are left out.

    Args:
        module: A network or a LightningModule.

    Example:
        >>> net = torch.nn.BatchNorm1d(2)
        >>> before = attributes_digest(net)
        >>> net.eps = 0.5
        >>> attributes_digest(net) == before
        False
    """
    parts = []
    for name, child in module.named_modules():
        if isinstance(child, Metric):
            continue
        classes = [cls for cls in type(child).__mro__ if not _is_of_library(cls)]
        shared = {k: v for cls in classes[::-1] for k, v in vars(cls).items() if k[:2] != "__"}
        plain = {k: v for k, v in shared.items() if isinstance(v, (*_PLAIN, tuple))}
        parts.append((name, child.training, sorted(_texts({**plain, **_own(child)}).items())))
    return hashed([str(parts)])


def _is_of_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _LIBRARIES


_LIBRARIES = ("builtins", "lightning", "pytorch_lightning", "torch", "torchmetrics")


def _texts(attributes: dict[str, Any]) -> dict[str, str]:
    """Return attributes as texts that are equal where they are; large data by its type."""
    texts = {}
    for name, value in attributes.items():
        text = type(value).__qualname__
        if isinstance(value, torch.Tensor):
            with suppress(Exception):  # one without data, for example
                text = hashed(value) if value.numel() <= _MOST_ELEMENTS else text
        elif _is_meter(value):
            text += str(_texts(vars(value)))
        elif not (isinstance(value, _SIZED) and len(value) > _MOST_ITEMS):
            with suppress(RecursionError):  # a list that holds itself
                text = stable_text([*value] if isinstance(value, deque) else value)
        texts[name] = text
    return texts


_SIZED = (str, bytes, list, tuple, dict, set, deque)


def _modules_in(value: Any, seen: set[int], depth: int = _DEEPEST) -> Iterator[torch.nn.Module]:
    """Yield the modules in containers and in attributes of objects, to so many levels."""
    if isinstance(value, torch.nn.Module):
        yield value
        return
    if depth < 0 or id(value) in seen or isinstance(value, (torch.Tensor, type, ModuleType)):
        return
    seen.add(id(value))
    items: Any = getattr(value, "__dict__", {}).values()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, (list, tuple, set, deque)):
        items = value if len(value) <= _MOST_ITEMS else ()
    for item in items:
        yield from _modules_in(item, seen, depth - 1)


@dataclass(frozen=True)
class _Fields:
    """The attributes of an object that has no others than plain ones."""

    values: dict[str, Any]


def _own(owner: torch.nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are its author's."""
    return {name: value for name, value in vars(owner).items() if name not in _INTERNAL}


def _copied(value: Any) -> Any:
    """Return a copy of what a step may change in place; anything else as it is."""
    if isinstance(value, torch.Tensor):
        small = value.numel() <= _MOST_ELEMENTS and value.is_leaf and not value._is_view()
        return value.detach().clone() if small else value
    if isinstance(value, dict):
        return _container(value, lambda copy_of: copy_of.update(_items(value)))
    if isinstance(value, (list, deque)):
        return _container(value, lambda copy_of: copy_of.extend(map(_item, value)))
    if isinstance(value, set):
        return set(value)
    if _is_meter(value):
        return _Fields({name: _copied(item) for name, item in vars(value).items()})
    return value


def _item(value: Any) -> Any:
    """Return a copy of an item, tensors excepted, of which there may be very many."""
    return value if isinstance(value, torch.Tensor) else _copied(value)


def _items(value: dict[Any, Any]) -> dict[Any, Any]:
    return {key: _item(item) for key, item in value.items()}


def _container(value: Any, fill: Callable[[Any], None]) -> Any:
    copy_of = copy.copy(value)
    copy_of.clear()
    fill(copy_of)
    return copy_of


def _is_meter(value: Any) -> bool:
    """Return whether an object holds plain attributes alone, as one that averages does."""
    if isinstance(value, (type, ModuleType, torch.nn.Module)) or callable(value):
        return False
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    return bool(attributes) and all(isinstance(item, _PLAIN) for item in attributes.values())


def _refilled(value: Any, copy_of: Any) -> Any:
    """Return an attribute with its first content."""
    if copy_of is value or _same(value, value, copy_of):
        return value
    if isinstance(copy_of, _Fields):
        attributes = vars(value)
        for name in attributes.keys() - copy_of.values.keys():
            del attributes[name]
        attributes.update({name: _copied(item) for name, item in copy_of.values.items()})
        return value
    if isinstance(value, torch.Tensor):
        return copy_of.clone().requires_grad_(value.requires_grad)
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(_copied(copy_of))
    return value


def _same(now: Any, value: Any, copy_of: Any) -> bool:
    """Return whether an attribute is what it was.

    Args:
        now: Its value now.
        value: Its value when it was copied.
        copy_of: The copy.
    """
    if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor):
        return now is copy_of or (
            now.shape == copy_of.shape and now.dtype == copy_of.dtype and torch.equal(now, copy_of)
        )
    if isinstance(copy_of, _Fields):
        return now is value and _equal(vars(now), copy_of.values)
    if isinstance(value, (dict, list, deque, set)):
        return now is value and _equal(now, copy_of)
    return now is value or (isinstance(value, _PLAIN) and _equal(now, value))


def _equal(one: Any, other: Any) -> bool:
    """Return whether two items are the same, or containers of the same."""
    if one is other:
        return True
    if isinstance(other, _Fields):
        return _equal(getattr(one, "__dict__", None), other.values)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, deque)) and isinstance(other, (list, deque)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(other, _PLAIN) and type(one) is type(other) and bool(one == other)
