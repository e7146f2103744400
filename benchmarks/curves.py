# SPDX-License-Identifier: Apache-2.0
"""Hypervolume curves: made from evaluations in order, kept as text, and their statistics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lightning_subnet import pareto

_RESAMPLES = 5000


def hypervolumes(U: np.ndarray) -> np.ndarray:
    """Return the hypervolume of the first 1, 2, ..., n points (n, m) of the unit square, (n,)."""
    front, value, curve = np.zeros((0, U.shape[1])), 0.0, np.zeros(len(U))
    for i, point in enumerate(U):
        inside = np.isfinite(point).all() and (point < 1).all()
        if inside and not (front <= point).all(axis=1).any():
            front = np.vstack([front[~(point <= front).all(axis=1)], point])
            value = pareto.hypervolume(front, np.ones(U.shape[1]))
        curve[i] = value
    return curve


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


def first_at(curve: np.ndarray, level: float) -> float:
    """Return after how many validations a curve reaches a level; infinite if it does not."""
    at = np.flatnonzero(curve >= level)
    return float(at[0] + 1) if len(at) else np.inf


def bootstrap(
    values: np.ndarray, statistic: Callable[..., np.ndarray] = np.median
) -> tuple[float, float, float]:
    """Return a statistic of values (n,) over seeds, and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    draws = np.asarray(values)[rng.integers(0, len(values), (_RESAMPLES, len(values)))]
    low, high = np.quantile(statistic(draws, axis=1), [0.025, 0.975], method="nearest")
    return float(statistic(values)), float(low), float(high)
