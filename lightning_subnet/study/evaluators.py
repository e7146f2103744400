# SPDX-License-Identifier: Apache-2.0
"""Evaluators, which measure subnets: their base, a function, and a table of measured subnets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._messages import listed
from lightning_subnet._types import Indices
from lightning_subnet.errors import MeasurementError, TellError
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.history import Evaluation

Measured = Mapping[str, Any]


class Evaluator(ABC):
    """Measures one subnet at a time.

    An exception in `evaluate` is a failure of that subnet, except a `MeasurementError`, which says
    that no subnet can be measured and ends the search.

    Example:
        >>> from lightning_subnet import SearchSpace
        >>> class Area(Evaluator):
        ...     def evaluate(self, subnet):
        ...         return {"area": subnet["depth"] * subnet["width"]}
        >>> Area().evaluate(SearchSpace(depth=[1, 2], width=[3, 4]).largest)
        {'area': 8}
    """

    built_in: tuple[str, ...] = ()
    """Measures that the search can compute by name."""

    def fingerprint(self, name: str) -> str | None:
        """Return a name for all that a value depends on besides the subnet; None: not reusable."""
        return None

    @abstractmethod
    def evaluate(self, subnet: Subnet) -> Measured:
        """Return values by name of measure: numbers, or pairs (value, standard error)."""

    def on_evaluation(self, evaluation: Evaluation) -> None:  # noqa: B027 - a hook, optional
        """Take note of an evaluation that is in the history now; by default nothing is done."""


class FunctionEvaluator(Evaluator):
    """Measures by calling a function.

    Args:
        fn: Called with a subnet; returns a mapping of values by name of measure.
        fingerprint: Names what the values depend on besides the subnet. Studies in one storage
            share values of equal fingerprint; None: they never do.

    Example:
        >>> evaluator = FunctionEvaluator(lambda subnet: {"error": 1 / subnet["depth"]})
        >>> from lightning_subnet import SearchSpace
        >>> evaluator.evaluate(SearchSpace(depth=[1, 2]).largest)
        {'error': 0.5}
    """

    def __init__(self, fn: Callable[[Subnet], Measured], *, fingerprint: str | None = None) -> None:
        self._fn = fn
        self._fingerprint = fingerprint

    def fingerprint(self, name: str) -> str | None:
        """Return the fingerprint of a measure."""
        return None if self._fingerprint is None else f"{self._fingerprint}:{name}"

    def evaluate(self, subnet: Subnet) -> Measured:
        """Return the values that the function returns.

        Raises:
            MeasurementError: They are not a mapping.
        """
        values = self._fn(subnet)
        if not isinstance(values, Mapping):
            msg = (
                f"The function of FunctionEvaluator returned {values!r:.60}. "
                'It returns values by name of measure: {"error": 0.1}.'
            )
            raise MeasurementError(msg)
        return values


class TableEvaluator(Evaluator):
    """Looks values up in a table of measured subnets, to search on real data without a network.

    Args:
        space: The space of the subnets.
        subnets: The n measured subnets, or their value indices (n, n_choices).
        columns: Values (n,) by name of measure; NaN is a failure.

    Raises:
        MeasurementError: A column of another length, or one subnet listed with two values.

    Example:
        >>> from lightning_subnet import SearchSpace
        >>> space = SearchSpace(depth=[1, 2, 3])
        >>> table = TableEvaluator(space, space.sample(2, rng=0), {"error": [0.2, 0.1]})
        >>> table.space.size, sorted(table.evaluate(s)["error"] for s in table.space)
        (2, [0.1, 0.2])
    """

    def __init__(
        self,
        space: SearchSpace,
        subnets: Iterable[Subnet] | Indices,
        columns: Mapping[str, npt.ArrayLike],
    ) -> None:
        if not isinstance(subnets, np.ndarray):
            X = space.indices(subnets)
        else:
            X = space.indices(space.from_indices(subnets))
        self._columns = {name: np.asarray(column, dtype=float) for name, column in columns.items()}
        for name, column in self._columns.items():
            if column.shape != (len(X),):
                msg = (
                    f"Column {name!r} has shape {column.shape}; {len(X)} subnets need ({len(X)},)."
                )
                raise MeasurementError(msg)
        self._row: dict[bytes, int] = {}
        for i, code in enumerate(row_codes(X)):
            first = self._row.setdefault(code, i)
            for name, column in self._columns.items():
                if first != i and not np.array_equal(column[first], column[i], equal_nan=True):
                    msg = (
                        f"Rows {first} and {i} are the same subnet with different {name!r} "
                        f"({column[first]} and {column[i]}). Average them, or keep one."
                    )
                    raise MeasurementError(msg)
        self._whole = space
        covers = len(self._row) == space.size
        self.space = space if covers else space.restricted_to(X)

    def evaluate(self, subnet: Subnet) -> Measured:
        """Return the values of the subnet.

        Raises:
            KeyError: The subnet is not in the table (a failure of that subnet).
        """
        row = self._row.get(row_codes(self._whole.indices([subnet]))[0])
        if row is None:
            msg = f"{subnet} is not in the table of {listed(self._columns)}"
            raise KeyError(msg)
        return {name: float(column[row]) for name, column in self._columns.items()}


def as_numbers(values: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return (value, standard error) by name of measure.

    Args:
        values: Numbers, or pairs (value, standard error), by name of measure.

    Raises:
        TellError: A value is neither.
    """
    pairs = {}
    for name, value in values.items():
        pair = value if isinstance(value, tuple) and len(value) == 2 else (value, 0.0)  # noqa: PLR2004 - a pair
        try:
            if any(isinstance(item, (str, bytes, bool)) for item in pair):
                raise TypeError
            pairs[name] = (float(pair[0]), float(pair[1]))
            if pairs[name][1] < 0:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            msg = (
                f"The value of {name!r} is {value!r:.60}. Tell a number, or a pair "
                "(value, standard error); report a measurement that failed by "
                "fail(subnet, reason)."
            )
            raise TellError(msg) from None
    return pairs
