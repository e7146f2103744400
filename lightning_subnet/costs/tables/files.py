# SPDX-License-Identifier: Apache-2.0
"""Checks of costs that are stored in files: of their device, their space, and their agreement."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from lightning_subnet._json import differences
from lightning_subnet._types import Floats
from lightning_subnet.costs.device import describe_device
from lightning_subnet.errors import MeasurementError
from lightning_subnet.predictors.base import kendall_tau
from lightning_subnet.space.space import SearchSpace

ANY = "any"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of predicted costs with measured ones.

    Args:
        n: How many subnets were compared.
        tau: Kendall's rank correlation.
        mape: The mean absolute error in % of the measured value.
        worst: The largest, in %.
    """

    n: int
    tau: float
    mape: float
    worst: float

    @classmethod
    def of(cls, predicted: Floats, measured: Floats) -> Agreement:
        """Return the agreement of two columns (n,).

        Example:
            >>> print(Agreement.of(np.array([1.1, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])))
            tau 1.000, MAPE 3.3 %, at worst 10.0 % (3 subnets)
        """
        error = 100 * np.abs(predicted / measured - 1)
        tau = float(kendall_tau(predicted, measured)[0])
        return cls(len(measured), tau, float(error.mean()), float(error.max()))

    def __str__(self) -> str:
        return (
            f"tau {self.tau:.3f}, MAPE {self.mape:.1f} %, at worst {self.worst:.1f} % "
            f"({self.n} subnets)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able data; `Agreement(**data)` reads it back."""
        return asdict(self)


def settings_of(measure: Any) -> dict[str, Any]:
    """Return the plain settings of a measure by name, without its device, input and name."""
    if not is_dataclass(measure):
        return {}
    values = {f.name: getattr(measure, f.name) for f in fields(measure)}
    return {
        name: value
        for name, value in values.items()
        if name not in ("device", "input", "name") and isinstance(value, (int, float, str, bool))
    }


def device_of(measure: Any) -> str:
    """Return the description of the device that a measure is taken on, `"unknown"` if it has none.

    Raises:
        ObjectiveError: There is no such device here.
    """
    name = getattr(measure, "device", None)
    return describe_device(name) if isinstance(name, str) else "unknown"


def check_device(what: str, stored: str, allowed: str | None) -> None:
    """Raise a `MeasurementError` if costs are of another device than is allowed.

    Args:
        what: The costs, in words.
        stored: The device that they were measured on.
        allowed: `"any"`, a part of its description, or None: this machine.
    """
    if allowed == ANY or (allowed is not None and allowed in stored):
        return
    kind = "cuda" if "(cuda)" in stored else "cpu"
    try:
        here = describe_device(kind)
    except Exception:  # there is no such device
        here = f"a machine without {kind}"
    if allowed is None and here == stored:
        return
    expected = f"device={allowed!r} was asked" if allowed is not None else f"this is {here}"
    msg = (
        f"{what} was measured on {stored}; {expected}.\n"
        f"To search for that device, say so: load(path, device={ANY!r}), or a part of its name."
    )
    raise MeasurementError(msg)


def check_space(what: str, stored: SearchSpace, now: SearchSpace) -> None:
    """Raise a `MeasurementError` if costs are of another space than the network's."""
    if stored.choices == now.choices and stored.names == now.names:
        return
    before, after = (
        {"choices": space.to_json()["choices"], "order": list(space.names)}
        for space in (stored, now)
    )
    lines = list(differences(before, after))
    more = f" ... ({len(lines)} differences)" if len(lines) > _SHOWN else ""
    msg = (
        f"{what} is of another space: {'; '.join(lines[:_SHOWN]):.280}{more}.\n"
        "Measure this network: build() or fit() with it."
    )
    raise MeasurementError(msg)
