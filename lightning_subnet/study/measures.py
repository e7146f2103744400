# SPDX-License-Identifier: Apache-2.0
"""Measures, which yield a number for a subnet, exact or expensive."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Indices
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

_log = logging.getLogger(__name__)
Takes = Literal["subnets", "indices"]


@dataclass(frozen=True, eq=False)
class Measure:
    """A named number of a subnet, computed by a function. `@measure` makes one.

    Args:
        name: Its name in objectives, constraints, histories and plots; units belong in it
            (`latency_ms`).
        fn: Called with a list of n subnets or, with `takes="indices"`, with value indices
            (n, n_choices) in the space's order; returns n numbers, or n pairs (value, standard
            error).
        unit: The unit, for axes and tables.
        exact: Free of noise and cheap: never predicted, never charged to the budget.
        takes: What `fn` is called with. Inner searches call measures of indices in bulk.
        fingerprint: Names what the value depends on besides the subnet (weights, data, device).
            Values of equal fingerprint are reused between studies of one storage; None: never.
        on_reference: Called with the largest subnet of the search and its recorded value, where
            that was measured earlier, for measures that are relative to one another.
        comparing: Subnets that are measured in one call are measured in turns, as times are, and
            so compare best with each other.
    """

    name: str
    fn: Callable[[Any], Any]
    unit: str = ""
    exact: bool = False
    takes: Takes = "subnets"
    fingerprint: str | None = None
    on_reference: Callable[[Subnet, float], None] | None = None
    comparing: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            msg = f'A measure needs a name, not {self.name!r}: @measure("latency_ms", unit="ms").'
            raise ObjectiveError(msg)
        if self.takes not in ("subnets", "indices"):
            msg = f"Measure {self.name!r}: takes= is 'subnets' or 'indices', not {self.takes!r}."
            raise ObjectiveError(msg)

    @property
    def vectorised(self) -> bool:
        """Whether thousands of subnets cost little more than one."""
        return self.takes == "indices"

    def __call__(self, subnets: Any) -> Any:
        """Call the function itself, unchecked."""
        return self.fn(subnets)

    def evaluate(
        self, space: SearchSpace, X: Indices
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return values (n,) and standard errors (n,; 0 where none was given) of index rows.

        Raises:
            ObjectiveError: The function returned something other than n numbers or pairs.
        """
        try:
            returned = self.fn(X if self.takes == "indices" else space.from_indices(X))
        except Exception as error:
            error.add_note(f"This happened in the measure {self.name!r}, which takes {self.takes}.")
            raise
        try:
            array = np.asarray(returned, dtype=float)
        except (TypeError, ValueError):
            array = np.zeros(())
        if array.shape == (len(X),):
            return array, np.zeros(len(X))
        if array.shape == (len(X), 2):
            return array[:, 0], array[:, 1]
        shown = f"shape {array.shape}" if array.ndim else f"{returned!r:.60}"
        msg = (
            f"Measure {self.name!r} was asked for {len(X)} subnets and returned {shown}. "
            "Return one number, or one pair (value, standard error), for each."
        )
        raise ObjectiveError(msg)

    def evaluate_each(
        self, space: SearchSpace, X: Indices
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], dict[int, Exception]]:
        """Return values and errors of index rows, NaN where a subnet fails, and exceptions by row.

        Subnets are measured one by one, unless the measure is `comparing` and none fails.

        Raises:
            ObjectiveError: As `evaluate` does.
            MeasurementError: No subnet can be measured.
        """
        if self.comparing and len(X) > 1:
            try:
                return *self.evaluate(space, X), {}
            except (ObjectiveError, MeasurementError):
                raise
            except Exception:
                _log.debug("%s: one of %d subnets fails", self.name, len(X), exc_info=True)
        values, errors = np.full(len(X), np.nan), np.zeros(len(X))
        failures: dict[int, Exception] = {}
        for i in range(len(X)):
            try:
                (values[i],), (errors[i],) = self.evaluate(space, X[i : i + 1])
            except (ObjectiveError, MeasurementError):
                raise
            except Exception as error:
                failures[i] = error
        return values, errors, failures


@runtime_checkable
class NetworkMeasure(Protocol):
    """A measure of networks, such as `Latency`: `fit` binds it to the model that it searches."""

    @property
    def name(self) -> str:
        """Its name in objectives, constraints, histories and plots."""

    def bind(self, elastic: Any, example_input: Any) -> Measure:
        """Return the measure of one super-network.

        Args:
            elastic: The module that activates subnets.
            example_input: One sample, as its forward pass takes it: a tensor or a tuple of them.
        """


def measure(
    name: str,
    *,
    unit: str = "",
    exact: bool = False,
    takes: Takes = "subnets",
    fingerprint: str | None = None,
) -> Callable[[Callable[[Any], Any]], Measure]:
    """Make a `Measure` of the decorated function.

    Args:
        name: Its name in objectives, constraints, histories and plots.
        unit: The unit, for axes and tables.
        exact: Free of noise and cheap: never predicted, never charged to the budget.
        takes: `"subnets"`: the function gets a list of subnets; `"indices"`: value indices
            (n, n_choices), which is much faster for thousands of them.
        fingerprint: Names what the value depends on besides the subnet; see `Measure`.

    Raises:
        ObjectiveError: No name, or another `takes`.

    Example:
        >>> from lightning_subnet import SearchSpace
        >>> @measure("weights", exact=True)
        ... def weights(subnets):
        ...     return [subnet["width"] ** 2 * subnet["depth"] for subnet in subnets]
        >>> space = SearchSpace(depth=[1, 2], width=[8, 16])
        >>> weights([space.largest])
        [512]
    """

    def decorate(fn: Callable[[Any], Any]) -> Measure:
        return Measure(name, fn, unit=unit, exact=exact, takes=takes, fingerprint=fingerprint)

    return decorate


def by_name(measures: Sequence[Measure | NetworkMeasure]) -> dict[str, Measure]:
    """Return the measures by name, without those that need a network first.

    Raises:
        ObjectiveError: Not a measure, or two of one name.
    """
    items: dict[str, Any] = {}
    for item in measures:
        if isinstance(item, type) or not isinstance(item, (Measure, NetworkMeasure)):
            msg = (
                f"measures= holds {item!r}, which is not a measure. "
                "Decorate a function with @measure(name)."
            )
            raise ObjectiveError(msg)
        if item.name in items:
            msg = (
                f"measures= holds two measures of the name {item.name!r}. Give each its own name: "
                f"name={item.name + '_2'!r}, say, and the objectives and constraints by it."
            )
            raise ObjectiveError(msg)
        items[item.name] = item
    return {name: item for name, item in items.items() if isinstance(item, Measure)}
