# SPDX-License-Identifier: Apache-2.0
"""Strategies: what proposes the next subnets from a history; a name, or one of these objects."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_subnet._messages import did_you_mean
from lightning_subnet.errors import StrategyError
from lightning_subnet.strategies.base import Strategy

_CLASSES = {
    "RandomSearch": "random",
    "NSGA2": "evolution",
    "UNSGA3": "evolution",
    "SMSEMOA": "evolution",
    "LINAS": "linas",
    "WeakNAS": "weaknas",
    "NSGANetV2": "nsganetv2",
    "LocalSearch": "local_search",
    "FullSearch": "full",
    "Hybrid": "hybrid",
    "Bayesian": "bayesian",
}
_NAMES = {
    "random": "RandomSearch",
    "nsga2": "NSGA2",
    "u-nsga3": "UNSGA3",
    "sms-emoa": "SMSEMOA",
    "linas": "LINAS",
    "weaknas": "WeakNAS",
    "nsganetv2": "NSGANetV2",
    "local-search": "LocalSearch",
    "full": "FullSearch",
    "hybrid": "Hybrid",
    "bayesian": "Bayesian",
}

__all__ = [
    "LINAS",
    "NSGA2",
    "SMSEMOA",
    "UNSGA3",
    "Bayesian",
    "FullSearch",
    "Hybrid",
    "LocalSearch",
    "NSGANetV2",
    "RandomSearch",
    "Strategy",
    "WeakNAS",
    "names",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name]}"), name)


def names() -> list[str]:
    """Return the names that `strategy=` takes.

    Example:
        >>> names()
        ['random', 'nsga2', 'u-nsga3', 'sms-emoa', 'linas', 'weaknas', 'nsganetv2',
         'local-search', 'full', 'hybrid', 'bayesian']
    """
    return list(_NAMES)


def resolve(strategy: str | Strategy) -> Strategy:
    """Return the strategy of that name with its default settings, or the given object itself.

    Args:
        strategy: One of `names()`, or a `Strategy`.

    Raises:
        StrategyError: An unknown name, or no strategy at all.

    Example:
        >>> resolve("nsga2").batch_size
        50
    """
    if isinstance(strategy, Strategy):
        for name in ("name", "batch_size"):
            if not hasattr(strategy, name):
                msg = (
                    f"{type(strategy).__name__} has no {name}. A strategy has a class attribute "
                    "name = '...', and sets self.batch_size, its proposals per generation."
                )
                raise StrategyError(msg)
        return strategy
    if isinstance(strategy, str) and strategy in _NAMES:
        made: Strategy = __getattr__(_NAMES[strategy])()
        return made
    given = "the class, not an object: add ()" if isinstance(strategy, type) else f"{strategy!r}"
    by_class = {cls: name for name, cls in _NAMES.items()}
    meant = by_class.get(strategy, strategy) if isinstance(strategy, str) else ""
    hint = did_you_mean(meant, _NAMES)
    msg = (
        f"strategy= is {given}.{hint} "
        f"Give one of {', '.join(map(repr, _NAMES))}, or an object with propose()."
    )
    raise StrategyError(msg)
