# SPDX-License-Identifier: Apache-2.0
"""Errors of the package: what is wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any


class SubnetError(Exception):
    """Base of every error that this package raises on purpose."""


class SpaceError(SubnetError, ValueError):
    """A search space cannot be built from what was given."""


class InvalidSubnetError(SubnetError, ValueError):
    """An assignment is not a subnet of the space."""


class ObjectiveError(SubnetError, ValueError):
    """An objective, a constraint or a measure is not usable as given."""


class TellError(SubnetError, ValueError):
    """A told evaluation does not fit the search."""


class MeasurementError(SubnetError, RuntimeError):
    """A measure or an evaluator cannot work at all, for any subnet."""


class ElasticityError(SubnetError, ValueError):
    """A super-network does not do what its space says."""


class ExportError(SubnetError, RuntimeError):
    """A network cannot be converted, or the file does not give its outputs."""


class SearchError(SubnetError, RuntimeError):
    """A search cannot start or go on."""


class StrategyError(SubnetError, ValueError):
    """A strategy is unknown or set up wrongly."""


class SpaceExhausted(SubnetError, RuntimeError):
    """Every subnet of the space is measured or pending: the search ends normally."""


class StorageError(SubnetError, RuntimeError):
    """The storage cannot be read or written."""


class StudyMismatchError(StorageError, ValueError):
    """A stored study of this name was made with other settings."""


class PluginError(SubnetError, ImportError):
    """What another package offers by an entry point cannot be used."""


class PluginWarning(UserWarning):
    """Another package offers something under a name that is taken."""


class NoFeasibleSubnet(SubnetError, LookupError):
    """No evaluated subnet satisfies the bounds; `nearest` violates them least.

    Args:
        message: What was asked for and what came nearest.
        nearest: The evaluation with the least violation, or None if nothing was measured.
    """

    def __init__(self, message: str, nearest: Any = None) -> None:
        super().__init__(message)
        self.nearest = nearest


def did_you_mean(name: object, options: Iterable[object]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest option, capitals aside, or an empty string."""
    spelled = {str(option).lower(): str(option) for option in options}
    near = difflib.get_close_matches(str(name).lower(), spelled, n=1)
    return f" Did you mean {spelled[near[0]]!r}?" if near else ""


def users_line() -> int:
    """Return the `stacklevel` of a warning that points at the line which called this package."""
    own = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == own:
        frame, level = frame.f_back, level + 1
    return level


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Return the items as a short comma-separated list, for a message."""
    items = list(items)
    shown = ", ".join(repr(item) for item in items[:limit])
    return f"{shown}, ... ({len(items)} in all)" if len(items) > limit else shown or "nothing"


class ExportWarning(UserWarning):
    """Something could not be exported as asked, and the rest was.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.ExportWarning)`.
    """


class VersionWarning(UserWarning):
    """A study is resumed with other versions than it was made with.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.VersionWarning)`.
    """


class BudgetWarning(UserWarning):
    """The budget ends before the strategy has begun to learn.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.BudgetWarning)`.
    """


class ReductionWarning(UserWarning):
    """A reduction left the space as it was.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.ReductionWarning)`.
    """


class PredictorError(SubnetError, ValueError):
    """A predictor is unknown, or the data is nothing that it can learn from."""


class PredictorWarning(UserWarning):
    """A predictor was replaced by a simpler one; told once per cause."""


class FixedBatchError(ExportError):
    """A network takes batches of one size only."""
