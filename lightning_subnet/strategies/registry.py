# SPDX-License-Identifier: Apache-2.0
"""Strategies by name; a new one is a file beside this one and a line in the table."""

from __future__ import annotations

from typing import Any

from lightning_subnet._messages import did_you_mean
from lightning_subnet._registry import Registry
from lightning_subnet.errors import StrategyError
from lightning_subnet.strategies.base import Strategy

STRATEGIES = Registry(
    "strategy",
    "lightning_subnet.strategies",
    {
        "random": "lightning_subnet.strategies.random:RandomSearch",
        "nsga2": "lightning_subnet.strategies.evolution:NSGA2",
        "u-nsga3": "lightning_subnet.strategies.evolution:UNSGA3",
        "sms-emoa": "lightning_subnet.strategies.evolution:SMSEMOA",
        "linas": "lightning_subnet.strategies.linas:LINAS",
        "weaknas": "lightning_subnet.strategies.weaknas:WeakNAS",
        "nsganetv2": "lightning_subnet.strategies.nsganetv2:NSGANetV2",
        "local-search": "lightning_subnet.strategies.local_search:LocalSearch",
        "full": "lightning_subnet.strategies.full:FullSearch",
        "hybrid": "lightning_subnet.strategies.hybrid:Hybrid",
        "bayesian": "lightning_subnet.strategies.bayesian:Bayesian",
    },
)


def names() -> list[str]:
    """Return the names that `strategy=` takes; those of other packages come last.

    Example:
        >>> names()
        ['random', 'nsga2', 'u-nsga3', 'sms-emoa', 'linas', ...]
    """
    return STRATEGIES.names()


def resolve(strategy: str | Strategy) -> Strategy:
    """Return the strategy of a name with its default settings, or the strategy itself.

    Args:
        strategy: One of `names()`, or a `Strategy`.

    Raises:
        StrategyError: The name is unknown, or the object is not a strategy, or not a whole one.
        PluginError: The name is of another package, and cannot be used.

    Example:
        >>> resolve("nsga2").batch_size
        50
    """
    instance: Any = strategy
    if isinstance(strategy, str) and strategy in STRATEGIES:
        factory = STRATEGIES[strategy]
        instance = factory() if callable(factory) else factory
        if not isinstance(instance, Strategy):
            raise STRATEGIES.unusable(strategy, f"is {instance!r:.80}, which is not a Strategy")
    if not isinstance(instance, Strategy):
        raise StrategyError(_refusal(instance))
    for attribute in ("name", "batch_size"):
        if not hasattr(instance, attribute):
            msg = (
                f"{type(instance).__name__} has no {attribute}. A strategy has a class attribute "
                "name = '...', and sets self.batch_size, its proposals per generation."
            )
            raise StrategyError(msg)
    return instance


def _refusal(strategy: Any) -> str:
    """Return the message for an argument that is neither a name nor a strategy."""
    reason = "is not a Strategy."
    if isinstance(strategy, type):
        reason = "is a class, not an object: add ()."
    elif isinstance(strategy, str):
        by_class = {target.partition(":")[2]: name for name, target in STRATEGIES.table.items()}
        reason = f"is unknown.{did_you_mean(by_class.get(strategy, strategy), names())}"
    return (
        f"strategy={strategy!r:.80} {reason} Give one of {', '.join(map(repr, names()))}, "
        "or an object of a subclass of lightning_subnet.strategies.Strategy."
    )
