# SPDX-License-Identifier: Apache-2.0
"""Checks of what users pass, each with one wording."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from lightning_subnet.errors import SubnetError


def checked_int(
    value: Any, name: str, *, error: type[SubnetError], least: int = 1, hint: str = ""
) -> int:
    """Return a whole number as an int; NumPy's integers are welcome, booleans are not.

    Args:
        value: What was passed.
        name: The argument, for the message.
        error: The class that is raised.
        least: The smallest number that is allowed.
        hint: What to write instead: a sentence.

    Raises:
        SubnetError: Of the class `error`: the value is not a whole number, or is too small.

    Example:
        >>> from lightning_subnet.errors import SearchError
        >>> checked_int(0, "n", error=SearchError, hint="16 is usual.")
        Traceback (most recent call last):
        lightning_subnet.errors.SearchError: n=0 must be a whole number from 1. 16 is usual.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        msg = f"{name}={value!r:.60} must be a whole number from {least}. {hint}".rstrip()
        raise error(msg)
    return int(value)


def is_share(value: Any) -> bool:
    """Return whether a value is a number above 0 and at most 1, NumPy's welcome, booleans not.

    Example:
        >>> is_share(0.5), is_share(0), is_share(True), is_share("0.5")
        (True, False, False, False)
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and bool(0 < value <= 1)
