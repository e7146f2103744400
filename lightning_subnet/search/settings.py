# SPDX-License-Identifier: Apache-2.0
"""The settings of a search, checked before anything is opened."""

from __future__ import annotations

import numbers
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lightning_subnet._messages import warn
from lightning_subnet.errors import BudgetWarning, SearchError
from lightning_subnet.search.budget import Budget
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.strategies import resolve
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.study import measures as measures_module
from lightning_subnet.study.measures import Measure, NetworkMeasure
from lightning_subnet.study.objectives import (
    Constraint,
    Objective,
    parse_constraints,
    parse_objectives,
)

_OPENING = ("population", "samples", "first")  # settings that say how many subnets come first


def checked_whole(name: str, value: Any) -> int:
    """Return a whole number from 0 (a NumPy integer is welcome), or raise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        msg = f"{name}={value!r} must be a whole number from 0."
        raise SearchError(msg)
    return int(value)


@dataclass(frozen=True)
class Parsed:
    """What the settings of a `SubnetSearch` mean."""

    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    measures: list[Any]
    strategy: Strategy
    budget: Budget
    seed: int
    calibration_images: int
    name: str


def parse(settings: Mapping[str, Any]) -> Parsed:
    """Return what the arguments of `SubnetSearch` mean; each mistake says what was expected."""
    measures, resume, space = settings["measures"], settings["resume"], settings["space"]
    lone = isinstance(measures, (Measure, NetworkMeasure))
    parsed = Parsed(
        objectives=parse_objectives(settings["objectives"]),
        constraints=parse_constraints(settings["constraints"]),
        measures=[measures] if lone else list(measures),
        strategy=resolve(settings["strategy"]),
        budget=Budget.of(settings["budget"]),
        seed=checked_whole("seed", settings["seed"]),
        calibration_images=checked_whole("calibration_images", settings["calibration_images"]),
        name=settings["name"] or f"search-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
    )
    measures_module.by_name(parsed.measures)
    if resume not in ("auto", "must", "never"):
        msg = f"resume= must be 'auto', 'must' or 'never', not {resume!r}."
        raise SearchError(msg)
    if space is not None and not isinstance(space, SearchSpace):
        msg = f"space={space!r:.60} is no SearchSpace. Write space=SearchSpace({{...}})."
        raise SearchError(msg)
    if settings["name"] is None and resume == "must":
        msg = "resume='must' needs the name= of the study to go on with."
        raise SearchError(msg)
    _warn_of_small_budget(settings["strategy"], parsed)
    return parsed


def _warn_of_small_budget(given: Any, parsed: Parsed) -> None:
    limit, strategy = parsed.budget.evaluations, parsed.strategy
    setting = next((name for name in _OPENING if hasattr(strategy, name)), "")
    first = getattr(strategy, setting, 0)
    if limit is not None and limit <= first and isinstance(given, str):
        warn(
            f"strategy={given!r} begins with {first} subnets that follow no measurement, and the "
            f"budget is {limit}. Give fewer: strategy={type(strategy).__name__}"
            f"({setting}={max(limit // 4, 2)}), from lightning_subnet.strategies.",
            BudgetWarning,
        )
