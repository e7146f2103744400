# SPDX-License-Identifier: Apache-2.0
"""Ways to score a subnet, and the checks of a score: settings, which load no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from lightning_subnet._checks import is_share
from lightning_subnet._messages import did_you_mean
from lightning_subnet.errors import ExportError, SearchError

Score = Literal["network", "extracted", "onnxruntime", "openvino"]

FORMATS: Mapping[str, str] = MappingProxyType({"onnxruntime": "onnx", "openvino": "openvino"})
"""The formats of the files that runtimes run, by name of the runtime."""


def checked_score(score: Any) -> Score:
    """Return a way to score, of which the libraries are there.

    Raises:
        SearchError: It is unknown, or a library is not installed.

    Example:
        >>> checked_score("extract")
        Traceback (most recent call last):
        lightning_subnet.errors.SearchError: score='extract' is unknown. Did you mean 'extracted'? \
Write 'network', 'extracted', 'onnxruntime' or 'openvino'.
    """
    names = get_args(Score)
    if score not in names:
        of_format = next((name for name, form in FORMATS.items() if form == score), score)
        msg = f"score={score!r:.60} is unknown.{did_you_mean(of_format, names)} "
        raise SearchError(f"{msg}Write 'network', 'extracted', 'onnxruntime' or 'openvino'.")
    if score in FORMATS:
        from lightning_subnet.export.formats import registry

        try:
            registry.make(FORMATS[score]).check()
        except ExportError as error:
            raise SearchError(f"score={score!r}: {error}") from error
    return score  # type: ignore[no-any-return] # one of the names


@dataclass(frozen=True)
class Checks:
    """Checks that a search makes of its own numbers; `SubnetSearch(checks=True)` makes all.

    Args:
        parity: Before any budget is spent, the smallest, the largest and a random subnet are run
            in the super-network, extracted and, where a runtime is measured, converted; `extract`,
            `to_module` and `export` compare too. All must give the same outputs.
        repeat: The first subnet is scored twice, with another one in between, outside the budget,
            and must give the same values.
        weights: After each validation, and during the first, the weights must be what they were. A
            copy of them in host memory puts them back.
        calibration: Before the budget is spent the largest subnet is scored with its own running
            statistics too; a warning says if renewing them makes it worse.
        order: The largest subnet must not cost less than the smallest.
        tolerance: Largest allowed difference of outputs, as a share of the largest output; None:
            what rounding explains, 1e-4 for weights of float32 and 8 steps of coarser types.

    Raises:
        SearchError: The tolerance is not a number above 0 and at most 1, or another argument is
            neither True nor False.

    Example:
        >>> Checks.of(False)
        Checks(parity=False, repeat=False, weights=False, calibration=False, order=False, \
tolerance=None)
        >>> Checks(tolerance=-1)
        Traceback (most recent call last):
        lightning_subnet.errors.SearchError: tolerance=-1 is not a share above 0 and at most 1. \
Write 1e-4, say; or leave it out: rounding is allowed for then.
    """

    parity: bool = True
    repeat: bool = True
    weights: bool = True
    calibration: bool = True
    order: bool = True
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name in ("parity", "repeat", "weights", "calibration", "order"):
            if not isinstance(value := getattr(self, name), bool):
                msg = f"{name}={value!r:.60} is not True or False. Write Checks({name}=False) "
                raise SearchError(f"{msg}to leave it out.")
        if self.tolerance is not None and not is_share(self.tolerance):
            msg = (
                f"tolerance={self.tolerance!r:.60} is not a share above 0 and at most 1. Write "
                "1e-4, say; or leave it out: rounding is allowed for then."
            )
            raise SearchError(msg)

    @classmethod
    def of(cls, checks: bool | Checks) -> Checks:
        """Return the checks that an argument means.

        Raises:
            SearchError: It is something else.
        """
        if isinstance(checks, cls):
            return checks
        if not isinstance(checks, bool):
            msg = (
                f"checks={checks!r:.60} is not True, False or Checks(...). Write "
                "checks=Checks(repeat=False), say, to leave one out."
            )
            raise SearchError(msg)
        return cls() if checks else cls(*[False] * 5)
