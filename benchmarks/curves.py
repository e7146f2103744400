# SPDX-License-Identifier: Apache-2.0
"""Hypervolume curves as text."""

from __future__ import annotations

import numpy as np


def to_text(curve: np.ndarray) -> str:
    """Return a curve as `validations:hypervolume` where it rises, to five decimals."""
    rounded = np.round(curve, 5)
    rises = np.flatnonzero(np.diff(rounded, prepend=0.0) > 0)
    return " ".join(f"{i + 1}:{rounded[i]:.5f}" for i in rises)


def from_text(text: str, n: int) -> np.ndarray:
    """Return the curve (n,) that `to_text` described."""
    curve = np.zeros(n)
    for part in text.split():
        number, value = part.split(":")
        curve[int(number) - 1 :] = float(value)
    return curve
