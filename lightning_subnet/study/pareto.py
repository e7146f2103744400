# SPDX-License-Identifier: Apache-2.0
"""Fronts: non-dominated points, hypervolume, attainment, knee; a rule for NaN, ties, infinities.

Everywhere: a row with a NaN is not a measurement, so it is never on a front and dominates nothing.
Exact ties stay together on the front. An infinity is a number like any other in a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import moocore
import numpy as np
import numpy.typing as npt

from lightning_subnet.errors import ObjectiveError

Maximise = bool | Sequence[bool]
_ROUNDING = 1e-9


def _points(points: npt.ArrayLike, maximise: Maximise) -> npt.NDArray[np.float64]:
    """Return points as a matrix (n, m), or raise `ObjectiveError`."""
    try:
        array = np.asarray(points, dtype=float)
    except (TypeError, ValueError):
        msg = f"Points are numbers of shape (n, m), one column an objective, not {points!r:.60}."
        raise ObjectiveError(msg) from None
    if array.ndim != 2 or array.shape[1] == 0:  # noqa: PLR2004 - a matrix
        msg = f"Points have shape (n, m), one column an objective, not {array.shape}."
        raise ObjectiveError(msg)
    if np.shape(maximise) not in ((), (array.shape[1],)):
        msg = f"maximise={maximise!r} is one bool, or one for each of {array.shape[1]} objectives."
        raise ObjectiveError(msg)
    return array


def _places(array: npt.NDArray[np.float64], maximise: Maximise) -> npt.NDArray[np.float64]:
    """Return each column as places in its order, to be minimised.

    Dominance depends on nothing else. moocore (0.3.2) reads memory that is not its own on -inf,
    and takes `maximise=[False]` for True with one objective.
    """
    places = [np.unique(column, return_inverse=True)[1] for column in array.T]
    return np.stack(places, axis=1).astype(float) * np.where(maximise, -1.0, 1.0)


def nondominated(points: npt.ArrayLike, /, *, maximise: Maximise = False) -> npt.NDArray[np.bool_]:
    """Return a mask of the points that no other point dominates.

    Args:
        points: (n, m), one column an objective.
        maximise: Whether larger is better, for all columns or for each.

    Returns:
        A mask (n,). Rows with a NaN are False; all of several equal points are True.

    Example:
        >>> nan = float("nan")
        >>> nondominated([[nan, 2], [1, 2], [2, 1], [2, 1], [2, 2]]).tolist()
        [False, True, True, True, False]
    """
    array = _points(points, maximise)
    mask: npt.NDArray[np.bool_] = np.asarray(~np.isnan(array).any(axis=1))
    if mask.any():
        mask[mask] = moocore.is_nondominated(_places(array[mask], maximise), keep_weakly=True)
    return mask


def nondominated_ranks(
    points: npt.ArrayLike, /, *, maximise: Maximise = False
) -> npt.NDArray[np.int64]:
    """Return the number of the front that each point stands on, 0 for the best.

    Args:
        points: (n, m), one column an objective.
        maximise: Whether larger is better, for all columns or for each.

    Returns:
        Ranks (n,). Rows with a NaN rank behind all others, together.

    References:
        Deb et al., NSGA-II, IEEE TEC 6(2), 2002, section III-A.

    Example:
        >>> nondominated_ranks([[1, 1], [2, 2], [1, 3], [1, 1]]).tolist()
        [0, 1, 1, 0]
    """
    array = _points(points, maximise)
    ranks = np.zeros(len(array), dtype=np.int64)
    good = ~np.isnan(array).any(axis=1)
    if good.any():
        ranks[good] = moocore.pareto_rank(_places(array[good], maximise))
    ranks[~good] = ranks[good].max(initial=-1) + 1
    return ranks


def hypervolume(
    points: npt.ArrayLike, /, reference: npt.ArrayLike, *, maximise: Maximise = False
) -> float:
    """Return the volume that the points dominate, up to the reference point.

    Args:
        points: (n, m), one column an objective.
        reference: (m,), a point worse than all that should count.
        maximise: Whether larger is better, for all columns or for each.

    Returns:
        The volume. Points that do not strictly dominate the reference and rows with a NaN add
        nothing; a point that is infinitely good makes the volume infinite.

    Raises:
        ObjectiveError: A reference of another length or not finite.

    Example:
        >>> hypervolume([[1, 2], [2, 1]], reference=[3, 3])
        3.0
    """
    array = _points(points, maximise)
    try:
        ref = np.asarray(reference, dtype=float)
    except (TypeError, ValueError):
        ref = np.empty(0)
    if ref.shape != (array.shape[1],) or not np.isfinite(ref).all():
        msg = f"The reference point has {array.shape[1]} finite numbers, not {reference!r}."
        raise ObjectiveError(msg)
    sign = np.where(np.broadcast_to(maximise, ref.shape), -1.0, 1.0)
    array, ref = array * sign, ref * sign
    array = array[(array < ref).all(axis=1)]  # a NaN compares false
    if not len(array):
        return 0.0
    if np.isinf(array).any():
        return float("inf")
    return float(moocore.hypervolume(array, ref=ref))


def hypervolumes(
    points: npt.ArrayLike, /, reference: npt.ArrayLike, *, maximise: Maximise = False
) -> npt.NDArray[np.float64]:
    """Return the hypervolume of the first 1, 2, ..., n points: how it grows.

    Args:
        points: (n, m), one column an objective.
        reference: (m,), a point worse than all that should count.
        maximise: Whether larger is better, for all columns or for each.

    Returns:
        The volumes (n,), which never fall; see `hypervolume`.

    Raises:
        ObjectiveError: A reference of another length or not finite.

    Example:
        >>> hypervolumes([[1, 2], [4, 4], [2, 1]], reference=[3, 3]).tolist()
        [2.0, 2.0, 3.0]
    """
    array = _points(points, maximise)
    value = hypervolume(array[:0], reference, maximise=maximise)
    sign = np.where(np.broadcast_to(maximise, array.shape[1]), -1.0, 1.0)
    array, ref = array * sign, np.asarray(reference, dtype=float) * sign
    front, curve = array[:0], np.zeros(len(array))
    for i, point in enumerate(array):
        # A NaN compares false. What another point equals or dominates adds nothing.
        if (point < ref).all() and not (front <= point).all(axis=1).any():
            front = np.vstack([front[~(point <= front).all(axis=1)], point])
            value = hypervolume(front, ref)
        curve[i] = value
    return curve


def attainment(
    runs: Sequence[npt.ArrayLike], /, levels: Sequence[float], *, maximise: Maximise = False
) -> list[npt.NDArray[np.float64]]:
    """Return empirical attainment surfaces: the fronts that a share of the runs has attained.

    A run attains all that one of its points equals or dominates. The surface of level 0.5 bounds
    what at least half of the runs attain: it is the median front.

    Args:
        runs: The points of each run, (n, 2); a run may have none, and then attains nothing.
        levels: Shares of the runs, above 0 and at most 1.
        maximise: Whether larger is better, for both columns or for each.

    Returns:
        For each level the corners of its surface (k, 2), best first column first; (0, 2) where
        fewer runs have points. Rows with a NaN attain nothing.

    Raises:
        ObjectiveError: No runs, other than two objectives, or a level that is not such a share.

    References:
        Grunert da Fonseca, Fonseca and Hall, Inferential performance assessment of stochastic
        optimisers and the attainment function, EMO 2001; computed as in Fonseca et al., On the
        computation of the empirical attainment function, EMO 2011.

    Example:
        >>> runs = [[[1, 3], [3, 1]], [[2, 2]], [[1, 2]]]
        >>> [surface.tolist() for surface in attainment(runs, [1 / 3, 1])]
        [[[1.0, 2.0], [3.0, 1.0]], [[2.0, 3.0], [3.0, 2.0]]]
    """
    arrays = [_points(points, maximise) for points in runs]
    sizes = {array.shape[1] for array in arrays}
    if sizes != {2}:
        other = f"{max(sizes, key=lambda m: m != 2)}" if sizes else "no runs"  # noqa: PLR2004 - the other one
        msg = f"Attainment surfaces are of runs in two objectives, not of {other}."
        raise ObjectiveError(msg)
    if wrong := [level for level in levels if not 0 < level <= 1]:
        msg = f"levels= are shares of the runs, above 0 and at most 1, not {wrong[0]!r}."
        raise ObjectiveError(msg)
    arrays = [array[~np.isnan(array).any(axis=1)] for array in arrays]
    filled = [array for array in arrays if len(array)]
    surfaces = [np.zeros((0, 2)) for _ in levels]
    if not filled:
        return surfaces
    points = np.concatenate(filled)
    of_run = np.repeat(np.arange(len(filled)), [len(array) for array in filled])
    places = _places(points, maximise)  # a corner's coordinates are those of points
    values = [np.unique(column) for column in points.T]
    for i, level in enumerate(levels):
        needed = max(
            math.ceil(level * len(arrays) - _ROUNDING), 1
        )  # runs, those without points too
        if needed <= len(filled):
            corners = moocore.eaf(places, of_run, percentiles=[100 * needed / len(filled)])
            at = np.abs(corners[np.argsort(corners[:, 0]), :2]).astype(int)
            surfaces[i] = np.stack([v[rows] for v, rows in zip(values, at.T, strict=True)], axis=1)
    return surfaces


def knee(points: npt.ArrayLike, /, *, maximise: Maximise = False) -> int:
    """Return the row of the front from which on giving up one objective gains little of another.

    With the front scaled to the unit box this is the point farthest from the plane through its
    extremes, on the side of the ideal point.

    Args:
        points: (n, m), one column an objective.
        maximise: Whether larger is better, for all columns or for each.

    Returns:
        An index into `points`; the first of several equal ones.

    Raises:
        ObjectiveError: There is no finite non-dominated point.

    References:
        Das, On characterizing the "knee" of the Pareto curve, Structural Optimization 18, 1999.

    Example:
        >>> knee([[0, 10], [1, 2], [10, 0], [11, 11]])
        1
    """
    array = _points(points, maximise)
    rows = np.flatnonzero(nondominated(array, maximise=maximise) & np.isfinite(array).all(axis=1))
    if not len(rows):
        msg = "A knee needs at least one finite point, and there is none."
        raise ObjectiveError(msg)
    front = array[rows] * np.where(np.broadcast_to(maximise, array.shape[1]), -1.0, 1.0)
    span = np.ptp(front, axis=0)
    scaled = (front - front.min(axis=0)) / np.where(span > 0, span, 1.0)
    return int(rows[np.argmin(scaled.sum(axis=1))])
