# SPDX-License-Identifier: Apache-2.0
"""Pictures of results and comparisons. The only file that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_subnet import pareto
from lightning_subnet.errors import ObjectiveError, SearchError, did_you_mean, listed
from lightning_subnet.objectives import Objective, minimised

if TYPE_CHECKING:
    from lightning_subnet.result import SearchResult

_SINGLE, _PAIR = 1, 2
_FRONT = "#c0392b"
_OTHER = "#8fa3b5"


def axes(ax: Any = None) -> tuple[Any, Any]:
    """Return `(fig, ax)`, new ones if none are given, without touching the global state of pyplot.

    Raises:
        SearchError: matplotlib is not installed.
    """
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "Plots need matplotlib: pip install 'lightning-subnet[plots]'."
        raise SearchError(msg) from error
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _label(name: str, objectives: tuple[Objective, ...]) -> str:
    direction = {o.name: o.direction for o in objectives}.get(name)
    return (
        name
        if direction is None
        else f"{name} ({'less' if direction == 'min' else 'more'} is better)"
    )


def draw_front(
    result: SearchResult, *, x: str | None = None, y: str | None = None, ax: Any = None
) -> tuple[Any, Any]:
    """Draw a result; see `SearchResult.plot`."""
    figure, ax = axes(ax)
    names = [objective.name for objective in result.objectives]
    x = x or (names[-1] if len(names) > _SINGLE else None)
    y = y or names[0]
    recorded = dict.fromkeys(key for e in result.history for key in e.values)
    for name in filter(None, (x, y)):
        if name not in recorded:
            msg = (
                f"{name!r} was not recorded.{did_you_mean(name, recorded)} "
                f"Recorded: {listed(recorded)}."
            )
            raise ObjectiveError(msg)
    from matplotlib.ticker import EngFormatter

    if x is None:
        return _draw_single(result, y, figure, ax)
    X, Y = result.final.column(x), result.final.column(y)
    front = result.front
    flat = {x, y} <= set(names)
    allowed = ~np.isnan(result.minimised()).any(axis=1)
    ax.scatter(
        X[allowed], Y[allowed], s=22, color=_OTHER, alpha=0.8, linewidths=0,
        label="measured subnets",
    )  # fmt: skip
    refused = ~allowed & result.history.ok
    if refused.any():
        ax.scatter(
            X[refused], Y[refused], s=22, facecolors="none", edgecolors=_OTHER,
            label="break a constraint",
        )  # fmt: skip
    fx, fy = front.column(x), front.column(y)
    if flat and len(names) > _PAIR and len(front):  # of many objectives, the front in these two
        ax.scatter(
            fx, fy, s=30, facecolors="white", edgecolors=_FRONT, zorder=2,
            label=f"front of all {len(names)} objectives ({len(front)} subnets)",
        )  # fmt: skip
        drawn = [o for o in result.objectives if o.name in (x, y)]
        pair = pareto.nondominated(minimised(drawn, {x: fx, y: fy}))
        fx, fy = fx[pair], fy[pair]
    order = np.argsort(fx, kind="stable")
    if len(front):
        ax.plot(
            fx[order],
            fy[order],
            drawstyle=_stairs(x, y, result) if flat else "default",
            linestyle="-" if flat else "none",
            marker="o",
            markersize=5.5,
            color=_FRONT,
            label=f"front{'' if len(names) <= _PAIR else ' of these two'} ({len(fx)} subnets)",
        )
    largest = result.final.get(result.history.space.largest)
    if largest is not None and largest.ok and x in largest.values and y in largest.values:
        ax.scatter(
            largest.values[x], largest.values[y], marker="s", s=70, facecolors="none",
            edgecolors="black", label="largest subnet", zorder=3,
        )  # fmt: skip
    if len(front) > _PAIR and len(names) == _PAIR and flat:  # between two points there is none
        knee = result.knee
        ax.annotate(
            "knee",
            (knee.values[x], knee.values[y]),
            textcoords="offset points",
            xytext=(16, -22),
            arrowprops={"arrowstyle": "->", "color": "black"},
        )
    for axis, values in ((ax.xaxis, X), (ax.yaxis, Y)):
        if np.nanmax(np.abs(values), initial=0.0) >= 1e4:  # noqa: PLR2004 - 600k, not 6.0 with 1e5 aside
            axis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel(_label(x, result.objectives))
    ax.set_ylabel(_label(y, result.objectives))
    ax.set_title(
        f"{int(result.history.ok.sum())} of {_count(result.history.space.size)} subnets measured"
    )
    ax.grid(alpha=0.25)
    ax.legend(loc="best")
    return figure, ax


def _stairs(x: str, y: str, result: SearchResult) -> str:
    """Between two points of the front the dominated corner is the worse of both."""
    directions = {o.name: o.direction for o in result.objectives}
    return "steps-post" if directions[x] == "min" else "steps-pre"


def _count(n: int) -> str:
    return f"{n:,}" if n < 10**9 else f"{n:.1e}"


def _draw_single(result: SearchResult, y: str, figure: Any, ax: Any) -> tuple[Any, Any]:
    values = result.minimised()[:, 0]
    sign = 1.0 if result.objectives[0].direction == "min" else -1.0
    best = sign * np.fmin.accumulate(values)
    numbers = np.arange(1, len(values) + 1)
    ax.scatter(
        numbers, result.history.column(y), s=22, color=_OTHER, linewidths=0, label="evaluations"
    )
    ax.step(numbers, best, where="post", color=_FRONT, label="best so far")
    ax.set_xlabel("evaluations")
    ax.set_ylabel(_label(y, result.objectives))
    ax.grid(alpha=0.25)
    ax.legend(loc="best")
    return figure, ax


def draw_curves(
    curves: Mapping[str, npt.NDArray[np.float64]], *, ylabel: str, title: str, ax: Any = None
) -> tuple[Any, Any]:
    """Draw one line with a band per strategy: median and interquartile range over seeds.

    Args:
        curves: Values by strategy, (seeds, evaluations).
        ylabel: What the values are.
        title: Above the picture.
        ax: Matplotlib axes to draw on.
    """
    figure, ax = axes(ax)
    for strategy, values in curves.items():
        numbers = np.arange(1, values.shape[1] + 1)
        low, median, high = np.nanquantile(values, [0.25, 0.5, 0.75], axis=0)
        (line,) = ax.plot(numbers, median, label=strategy)
        ax.fill_between(numbers, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set_xlabel("evaluations")
    ax.set_ylabel(ylabel)
    ax.set_title(title)
    ax.grid(alpha=0.25)
    ax.legend(loc="lower right")
    return figure, ax
