# SPDX-License-Identifier: Apache-2.0
"""Statistics over seeds: evaluations to a target, bootstrap intervals, paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._messages import did_you_mean
from lightning_subnet.errors import SearchError

Array = npt.NDArray[np.float64]
_RESAMPLES = 5_000
_EQUAL = 1e-12  # the same points in another order differ by rounding


def checked_confidence(confidence: float) -> float:
    """Return the confidence, or raise `SearchError` if it is not between 0 and 1."""
    if not 0 < confidence < 1:
        msg = f"confidence={confidence!r} must lie between 0 and 1, such as 0.95."
        raise SearchError(msg)
    return confidence


def evaluations_to(curves: Array, target: float) -> Array:
    """Return the number of evaluations after which each run has reached a target.

    Args:
        curves: Values that never fall, (seeds, evaluations); without NaN.
        target: The value to reach.

    Returns:
        Numbers of evaluations from 1, (seeds,); infinite for a run that never has it.

    Example:
        >>> evaluations_to(np.array([[0.1, 0.5, 0.7], [0.1, 0.2, 0.3]]), 0.5).tolist()
        [2.0, inf]
    """
    is_reached = curves >= target - _EQUAL
    return np.where(is_reached.any(axis=1), is_reached.argmax(axis=1) + 1.0, np.inf)


def median_interval(
    values: npt.ArrayLike, /, *, confidence: float = 0.95, lower: bool = False
) -> Array:
    """Return the median over seeds with its bootstrap interval (percentile method).

    Args:
        values: (seeds,) or (seeds, n), each column by itself. They may be infinite.
        confidence: The confidence of the interval, such as 0.95.
        lower: Of an even number take the lower of the middle two, not their mean: the value that
            half of the seeds do not exceed.

    Returns:
        Lower end, median and upper end, (3,) or (3, n). The resamples are always the same.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Example:
        >>> median_interval([30, 40, 50, 60, np.inf], confidence=0.9).tolist()
        [30.0, 50.0, inf]
    """
    ordered = np.sort(np.asarray(values, dtype=float), axis=0)
    n = len(ordered)
    rows = np.sort(np.random.default_rng(0).integers(n, size=(_RESAMPLES, n)), axis=1)
    one, other = (n - 1) // 2, (n - 1) // 2 if lower else n // 2
    # The median of a resample is made of the middle ranks that were drawn.
    medians = np.sort((ordered[rows[:, one]] + ordered[rows[:, other]]) / 2, axis=0)
    tail = (1 - checked_confidence(confidence)) / 2 * (_RESAMPLES - 1)
    middle = (ordered[one] + ordered[other]) / 2
    ends = [medians[int(tail)], middle, medians[int(np.ceil(_RESAMPLES - 1 - tail))]]
    interval: Array = np.stack(ends)
    return interval


def signed_rank(differences: npt.ArrayLike, /) -> float:
    """Return the two-sided p value of Wilcoxon's signed-rank test on paired differences.

    Differences of zero say nothing and are left out; if none is left, p is 1. It is exact for up to
    13 pairs, and for up to 50 where no two differences are equal.

    Args:
        differences: (seeds,).

    References:
        Wilcoxon, Individual comparisons by ranking methods, Biometrics Bulletin 1(6), 1945.

    Example:
        >>> signed_rank([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        0.03125
    """
    from scipy.stats import wilcoxon

    rounded = np.round(np.asarray(differences, dtype=float), 12)  # as equal as `_EQUAL` says
    unequal = rounded[rounded != 0]
    return float(wilcoxon(unequal).pvalue) if len(unequal) else 1.0


def holm(p: npt.ArrayLike, /) -> Array:
    """Return p values corrected for the number of tests, by Holm's step-down method.

    Args:
        p: (n,).

    References:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
        Statistics 6(2), 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return corrected.clip(max=1.0)


def target_of(curves: Mapping[str, Array], target: float | str) -> float:
    """Return a target as a number: itself, or the median that `"label@k"` stands for.

    Args:
        curves: By strategy, (seeds, evaluations).
        target: A positive number, or `"nsga2@250"`: the median of that strategy after so many.

    Raises:
        SearchError: It is neither of these, the strategy is unknown, or the number is beyond the
            budget.
    """
    first, last = next((label, curve.shape[1]) for label, curve in curves.items())
    if isinstance(target, str):
        label, at, count = target.rpartition("@")
        if at and label not in curves:
            msg = f"target={target!r}: there is no {label!r}.{did_you_mean(label, curves)}"
            raise SearchError(msg)
        if not at or not count.isdecimal() or not 1 <= int(count) <= last:
            msg = (
                f"target={target!r} is not of the form 'strategy@evaluations' with evaluations in "
                f"1..{last}, such as '{first}@{last}'."
            )
            raise SearchError(msg)
        return float(np.nanmedian(curves[label][:, int(count) - 1]))
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < np.inf:
        msg = (
            f"target={target!r} must be a positive hypervolume, "
            f"or the median of a strategy, such as '{first}@{last}'."
        )
        raise SearchError(msg)
    return float(target)


def against(
    baseline: str, curves: Mapping[str, Array], at: Sequence[int], *, confidence: float
) -> list[dict[str, Any]]:
    """Return paired differences of each strategy to a baseline, one row per (strategy, count).

    Args:
        baseline: The strategy that is subtracted.
        curves: By strategy, (seeds, evaluations); rows of one seed belong together.
        at: After which evaluations.
        confidence: The confidence of the interval of the median difference.

    Raises:
        SearchError: A strategy and the baseline have no seed in common.
    """
    others = [label for label in curves if label != baseline]
    rows: list[dict[str, Any]] = []
    for k in at:
        block: list[dict[str, Any]] = []
        for label in others:
            d = curves[label][:, k - 1] - curves[baseline][:, k - 1]
            d = np.where(np.abs(d) <= _EQUAL, 0.0, d)[~np.isnan(d)]
            if not len(d):
                msg = f"{label!r} and {baseline!r} have no seed in common, so there are no pairs."
                raise SearchError(msg)
            low, median, high = map(float, median_interval(d, confidence=confidence))
            block.append(
                {"strategy": label, "at": k, "median": median, "low": low, "high": high}
                | {"mean": float(d.mean()), "better": int((d > 0).sum())}
                | {"worse": int((d < 0).sum()), "p": signed_rank(d)}
            )
        for row, p in zip(block, holm([row["p"] for row in block]), strict=True):
            row["p_holm"] = float(p)
        rows += block
    return sorted(rows, key=lambda row: (others.index(row["strategy"]), row["at"]))
