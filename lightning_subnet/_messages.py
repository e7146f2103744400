# SPDX-License-Identifier: Apache-2.0
"""Messages: the pieces that errors are worded with, and the one way to warn."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from types import FrameType


def did_you_mean(name: object, options: Iterable[object]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest option, capitals aside, or an empty string.

    Example:
        >>> did_you_mean("dept", ["width", "depth"])
        " Did you mean 'depth'?"
    """
    spelled = {str(option).lower(): str(option) for option in options}
    near = difflib.get_close_matches(str(name).lower(), spelled, n=1)
    return f" Did you mean {spelled[near[0]]!r}?" if near else ""


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Return the items as a short comma-separated list.

    Example:
        >>> listed(range(20), limit=3)
        '0, 1, 2, ... (20 in all)'
    """
    items = list(items)
    shown = ", ".join(repr(item) for item in items[:limit])
    return f"{shown}, ... ({len(items)} in all)" if len(items) > limit else shown or "nothing"


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called this package, and say how to silence it.

    Args:
        message: What happened and what to do, in sentences.
        category: One of the warnings of `errors`.
    """
    silence = f'warnings.simplefilter("ignore", lightning_subnet.errors.{category.__name__})'
    warnings.warn(f"{message} Silence it: {silence}.", category, stacklevel=_callers_line())


def _callers_line() -> int:
    """Return the `stacklevel` for the function above that points out of this package.

    What runs this package's code for the user, as a Trainer or a context manager, is passed over
    where the user's line is behind it.
    """
    package = __name__.partition(".")[0]
    frame: FrameType | None = sys._getframe(1)
    level, first = 1, 0
    while frame is not None:
        name = str(frame.f_globals.get("__name__")).partition(".")[0]
        if name != package:
            first = first or level
            if name not in _RUNNERS:
                return level
        frame, level = frame.f_back, level + 1
    return first or level - 1


_RUNNERS = (
    *("contextlib", "functools"),
    *("lightning", "lightning_fabric", "pytorch_lightning", "torch"),
)
