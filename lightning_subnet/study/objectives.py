# SPDX-License-Identifier: Apache-2.0
"""Objectives and constraints; the one place where directions flip."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_subnet._messages import did_you_mean
from lightning_subnet.errors import ObjectiveError

Direction = Literal["min", "max"]
Columns = Mapping[str, npt.NDArray[np.float64]]
_BOUND = re.compile(r"\s*(<=|>=)\s*([^\s%]+)\s*(%?)\s*")


@dataclass(frozen=True, slots=True)
class Objective:
    """A measure with a direction: `Objective("val_acc", "max")`.

    Raises:
        ObjectiveError: A direction other than `"min"` and `"max"`.
    """

    name: str
    direction: Direction

    def __post_init__(self) -> None:
        if self.direction not in ("min", "max"):
            msg = (
                f"The direction of objective {self.name!r} is 'min' or 'max', "
                f"not {self.direction!r}.{did_you_mean(self.direction, ['min', 'max'])}"
            )
            raise ObjectiveError(msg)


@dataclass(frozen=True, slots=True)
class Constraint:
    """A measure with a bound: `Constraint.parse("latency_ms", "<= 12")`.

    Args:
        name: The measure.
        upper: Whether the bound is an upper one (`<=`).
        bound: The bound, in the measure's unit, or a fraction if relative.
        relative: The bound is relative to the largest subnet's value.
    """

    name: str
    upper: bool
    bound: float
    relative: bool = False

    @classmethod
    def parse(cls, name: str, text: str) -> Constraint:
        """Return the constraint that a text such as `"<= 3e8"` or `">= 99%"` describes.

        Args:
            name: The measure.
            text: `<=` or `>=` and a number; with `%` it is relative to the largest subnet's value.

        Raises:
            ObjectiveError: The text is not of that form.

        Example:
            >>> Constraint.parse("params", "<= 60%")
            Constraint(name='params', upper=True, bound=0.6, relative=True)
        """
        match = _BOUND.fullmatch(text) if isinstance(text, str) else None
        try:
            bound = float(match[2].replace("_", "")) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or not math.isfinite(bound):
            msg = (
                f"The constraint on {name!r} reads {text!r}. "
                "Write '<=' or '>=' and a number ('<= 3e8'), "
                "or a percentage of the largest subnet ('<= 60%')."
            )
            raise ObjectiveError(msg)
        relative = match[3] == "%"
        return cls(name, match[1] == "<=", bound / 100 if relative else bound, relative)

    def absolute(self, reference: float) -> Constraint:
        """Return the constraint with its bound in the measure's unit.

        Args:
            reference: The largest subnet's value.

        Raises:
            ObjectiveError: The constraint is relative and the reference is not a positive number.
        """
        if not self.relative:
            return self
        if not (math.isfinite(reference) and reference > 0):
            msg = (
                f"The constraint {self} is relative to the largest subnet, whose {self.name!r} is "
                f"{reference}. A relative bound needs a positive reference: give an absolute one."
            )
            raise ObjectiveError(msg)
        return replace(self, bound=self.bound * reference, relative=False)

    def violation(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return by how much values miss an absolute bound, relative to it; 0 where it holds.

        NaN misses by infinity.
        """
        over = np.asarray(values, dtype=float) - self.bound
        miss = np.maximum(over if self.upper else -over, 0.0) / (abs(self.bound) or 1.0)
        return np.where(np.isnan(miss), np.inf, miss)

    def to_json(self) -> dict[str, str | float | bool]:
        """Return the constraint as JSON-able data, in full precision."""
        return asdict(self)

    def __str__(self) -> str:
        bound = f"{self.bound * 100:g}%" if self.relative else f"{self.bound:g}"
        return f"{self.name} {'<=' if self.upper else '>='} {bound}"


def parse_objectives(objectives: Mapping[str, str]) -> tuple[Objective, ...]:
    """Return the objectives of `{"val_acc": "max", "macs": "min"}`, in that order.

    Raises:
        ObjectiveError: No objectives, not a mapping, or another direction.
    """
    if not isinstance(objectives, Mapping) or not objectives:
        msg = (
            f"objectives={objectives!r} names nothing to optimise. "
            'Write objectives={"val_acc": "max", "macs": "min"}.'
        )
        raise ObjectiveError(msg)
    return tuple(Objective(name, direction) for name, direction in objectives.items())  # type: ignore[arg-type] # checked there


def parse_constraints(
    constraints: Mapping[str, str | Sequence[str]] | None,
) -> tuple[Constraint, ...]:
    """Return the constraints of `{"macs": "<= 3e8", "val_acc": [">= 0.7", "<= 0.9"]}`.

    Raises:
        ObjectiveError: Not a mapping, a text that is not a bound, or contradictory bounds.
    """
    if not isinstance(constraints or {}, Mapping):
        msg = (
            f'constraints={constraints!r} is not a mapping. Write constraints={{"macs": "<= 3e8"}}.'
        )
        raise ObjectiveError(msg)
    parsed = tuple(
        Constraint.parse(name, text)
        for name, texts in (constraints or {}).items()
        for text in (
            [texts] if isinstance(texts, str) or not isinstance(texts, Sequence) else texts
        )
    )
    check_consistent(parsed)
    return parsed


def check_consistent(constraints: Sequence[Constraint]) -> None:
    """Raise `ObjectiveError` if no number can satisfy all bounds on one measure."""
    for low in (c for c in constraints if not c.upper):
        for high in (c for c in constraints if c.upper):
            same = low.name == high.name and low.relative == high.relative
            if same and low.bound > high.bound:
                msg = f"The constraints {low} and {high} contradict each other. Loosen one of them."
                raise ObjectiveError(msg)


def minimised(objectives: Sequence[Objective], columns: Columns) -> npt.NDArray[np.float64]:
    """Return the objectives as a matrix to be minimised, (n, m): maximised ones change sign.

    Args:
        objectives: The m objectives.
        columns: Values (n,) by name of measure.
    """
    return np.stack(
        [columns[o.name] if o.direction == "min" else -columns[o.name] for o in objectives], axis=1
    )


def violation(
    constraints: Sequence[Constraint], columns: Columns, n: int
) -> npt.NDArray[np.float64]:
    """Return the sum of relative violations of absolute constraints, (n,); 0 is feasible."""
    total = np.zeros(n)
    for constraint in constraints:
        total += constraint.violation(columns[constraint.name])
    return total
