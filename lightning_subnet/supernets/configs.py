# SPDX-License-Identifier: Apache-2.0
"""Configs of models of transformers that say the sizes of what was cut out, where they can."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from itertools import combinations, islice
from typing import Any

from torch import nn

from lightning_subnet.supernets._blocks.removal import made_of

_TRIES = 64  # configs of which a model is made

Change = tuple[tuple[str, ...], str, int]
"""A number of a config: where it lies, its name, and what it becomes."""


def put_config_in_step(model: Any) -> bool:
    """Let the config of a model say its sizes, if there is one that does.

    A model is made of each likely config, without values, and all its tensors must have the shapes,
    and its modules the numbers, that the model has.

    Args:
        model: A model of transformers; its `config` is replaced by another if one fits.

    Returns:
        Whether its config says its sizes now.
    """
    whole = made_of(model, model.config)
    if whole is None:
        return False
    if _same(whole, model):
        return True
    for changes in islice(_sets(_likely(whole, model)), _TRIES):
        config = copy.deepcopy(model.config)
        for path, name, value in changes:
            setattr(_at(config, path), name, value)
        made = made_of(model, config)
        if made is not None and _same(made, model):
            for part in model.modules():  # they share the config of the model
                if getattr(part, "config", None) is model.config and part is not model:
                    part.config = config
            model.config = config
            return True
    return False


def _sets(changes: list[Change]) -> Iterator[tuple[Change, ...]]:
    """Return sets of changes, small ones first, and those named like inner sizes before others."""
    inner = [change for change in changes if _INNER.search(change[1])]
    changes = [*inner, *(change for change in changes if change not in inner)]
    for n in range(1, len(changes) + 1):
        yield from combinations(changes, n)


_INNER = re.compile(r"head|inner|ffn|mlp|intermediate|hidden_dim")


def _likely(whole: nn.Module, model: Any) -> list[Change]:
    """Return the numbers of a config that may be sizes that differ."""
    pairs = {
        (old, new)
        for name, tensor in _tensors(whole).items()
        for old, new in zip(tensor, _tensors(model).get(name, ()), strict=False)
        if old != new
    }
    after = _numbers(model)
    pairs |= {
        (old, after[key]) for key, old in _numbers(whole).items() if after.get(key, old) != old
    }
    config, changes = model.config, []
    paths: list[tuple[str, ...]] = [()]
    for path in paths:  # which grows: configs lie in configs
        for key, value in vars(_at(config, path)).items():
            if hasattr(value, "to_dict"):
                paths.append((*path, key))
            elif type(value) is int and value > 1 and not key.startswith("_"):
                # Numbers of heads are parts of the sizes that they make.
                news = {value * new // old for old, new in pairs if _is_part(value, old, new)}
                changes += [(path, key, new) for new in sorted(news)]
    return changes


def _is_part(value: int, old: int, new: int) -> bool:
    return old % value == 0 and value * new % old == 0 and new > 0


def _same(one: nn.Module, other: nn.Module) -> bool:
    return _tensors(one) == _tensors(other) and _numbers(one) == _numbers(other)


def _tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    both = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in both}


def _numbers(model: nn.Module) -> dict[tuple[str, str], int]:
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is int and not key.startswith("_")
    }


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = getattr(config, key)
    return config
