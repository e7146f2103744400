# SPDX-License-Identifier: Apache-2.0
"""Pictures of results and comparisons. The only file that imports matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_subnet._types import Floats
from lightning_subnet.errors import SearchError
from lightning_subnet.results.record import SearchRecord, check_recorded
from lightning_subnet.study import pareto
from lightning_subnet.study.history import History
from lightning_subnet.study.objectives import Objective, minimised

_SINGLE, _PAIR = 1, 2
_FRONT = "#c0392b"
_OTHER = "#8fa3b5"
# Okabe and Ito, Color Universal Design, 2008; the darker ones first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_START = 20  # a twentieth of a curve may leave the picture
_GAP = 0.055  # between names, as a share of the height


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


def _label(name: str, objectives: Sequence[Objective]) -> str:
    direction = {o.name: o.direction for o in objectives}.get(name)
    if direction is None:
        return name
    return f"{name} ({'less' if direction == 'min' else 'more'} is better)"


def draw_front(
    record: SearchRecord, *, x: str | None = None, y: str | None = None, ax: Any = None
) -> tuple[Any, Any]:
    """Draw a record; see `SearchResult.plot`."""
    figure, ax = axes(ax)
    names = [objective.name for objective in record.objectives]
    x = x or (names[-1] if len(names) > _SINGLE else None)
    y = y or names[0]
    recorded = dict.fromkeys(key for e in record.history for key in e.values)
    check_recorded(filter(None, (x, y)), recorded)
    if x is None:
        _draw_single(record, y, ax)
        return figure, ax
    X, Y = record.final.column(x), record.final.column(y)
    feasible = ~np.isnan(record.minimised()).any(axis=1)
    ax.scatter(
        X[feasible], Y[feasible], s=22, color=_OTHER, alpha=0.8, linewidths=0,
        label="measured subnets",
    )  # fmt: skip
    infeasible = ~feasible & record.history.ok
    if infeasible.any():
        ax.scatter(
            X[infeasible], Y[infeasible], s=22, facecolors="none", edgecolors=_OTHER,
            label="break a constraint",
        )  # fmt: skip
    front = record.front
    if len(front):
        _draw_line(record, front, x, y, ax)
    largest = record.final.get(record.history.space.largest)
    if largest is not None and largest.ok and x in largest.values and y in largest.values:
        ax.scatter(
            largest.values[x], largest.values[y], marker="s", s=70, facecolors="none",
            edgecolors="black", label="largest subnet", zorder=3,
        )  # fmt: skip
    if len(front) > _PAIR and len(names) == _PAIR and {x, y} <= set(names):
        knee = record.knee  # of more than two points; between two there is none
        ax.annotate(
            "knee",
            (knee.values[x], knee.values[y]),
            textcoords="offset points",
            xytext=(16, -22),
            arrowprops={"arrowstyle": "->", "color": "black"},
        )
    _engineering(ax.xaxis, X)
    _engineering(ax.yaxis, Y)
    ax.set_xlabel(_label(x, record.objectives))
    ax.set_ylabel(_label(y, record.objectives))
    ax.set_title(
        f"{int(record.history.ok.sum())} of {_count(record.history.space.size)} subnets measured"
    )
    ax.grid(alpha=0.25)
    ax.legend(loc="best")
    return figure, ax


def _draw_line(record: SearchRecord, front: History, x: str, y: str, ax: Any) -> None:
    """Draw the front: as stairs between two objectives, as points along other measures."""
    fx, fy = front.column(x), front.column(y)
    pair = [o for o in record.objectives if o.name in (x, y)]
    n, stairs = len(record.objectives), len(pair) == len({x, y})
    if stairs and n > _PAIR:  # of many objectives, the front in these two
        ax.scatter(
            fx, fy, s=30, facecolors="white", edgecolors=_FRONT, zorder=2,
            label=f"front of all {n} objectives ({len(front)} subnets)",
        )  # fmt: skip
        rows = pareto.nondominated(minimised(pair, {x: fx, y: fy}))
        fx, fy = fx[rows], fy[rows]
    order = np.argsort(fx, kind="stable")
    ax.plot(
        fx[order],
        fy[order],
        drawstyle=_stairs(x, record.objectives) if stairs else "default",
        linestyle="-" if stairs else "none",
        marker="o",
        markersize=5.5,
        color=_FRONT,
        label=f"front{'' if n <= _PAIR else ' of these two'} ({len(fx)} subnets)",
    )


def _engineering(axis: Any, values: Floats) -> None:
    from matplotlib.ticker import EngFormatter

    if np.nanmax(np.abs(values), initial=0.0) >= 1e4:  # noqa: PLR2004 - 600k, not 6.0 with 1e5 aside
        axis.set_major_formatter(EngFormatter(sep=""))


def _stairs(x: str, objectives: Sequence[Objective]) -> str:
    """Return the draw style whose corners, between two points of a front, are dominated."""
    directions = {o.name: o.direction for o in objectives}
    return "steps-post" if directions[x] == "min" else "steps-pre"


def _count(n: int) -> str:
    return f"{n:,}" if n < 10**9 else f"{n:.1e}"


def _draw_single(record: SearchRecord, y: str, ax: Any) -> None:
    """Draw one objective over the evaluations."""
    values = record.minimised()[:, 0]
    sign = 1.0 if record.objectives[0].direction == "min" else -1.0
    best = sign * np.fmin.accumulate(values)
    numbers = np.arange(1, len(values) + 1)
    ax.scatter(
        numbers, record.history.column(y), s=22, color=_OTHER, linewidths=0, label="evaluations"
    )
    ax.step(numbers, best, where="post", color=_FRONT, label="best so far")
    ax.set_xlabel("evaluations")
    ax.set_ylabel(_label(y, record.objectives))
    ax.grid(alpha=0.25)
    ax.legend(loc="best")


def draw_curves(
    bands: Mapping[str, Floats],
    *,
    ylabel: str,
    title: str,
    log: bool = False,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw one line with a band per strategy, its name at the end of the line.

    Args:
        bands: Lower end, middle and upper end by strategy, (3, evaluations).
        ylabel: The name of the values.
        title: Above the picture.
        log: Draw y on a logarithmic axis.
        ax: Matplotlib axes to draw on.
    """
    figure, ax = axes(ax)
    if log:
        ax.set_yscale("log")
    ends: dict[str, float] = {}
    for (label, (low, middle, high)), look in zip(bands.items(), _looks(), strict=False):
        numbers = np.arange(1, len(middle) + 1)
        ax.plot(numbers, middle, label=label, linewidth=2, **look)
        ax.fill_between(numbers, low, high, color=look["color"], alpha=0.15, linewidth=0)
        ends[label] = middle[-1]
    _decorate(ax, "evaluations", ylabel, title)
    ax.set_xlim(1, max(2, *(band.shape[1] for band in bands.values())))
    # The steep start says little, and would leave no room for the differences that follow.
    later = np.concatenate([band[:, band.shape[1] // _START :].ravel() for band in bands.values()])
    if not log and np.ptp(later) > 0:
        ax.set_ylim(later.min() - 0.05 * np.ptp(later), later.max() + 0.05 * np.ptp(later))
    _name_ends(ax, ends)
    return figure, ax


def draw_attainment(
    surfaces: Mapping[str, Mapping[float, Floats]],
    objectives: Sequence[Objective],
    *,
    title: str,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw attainment surfaces as stairs: the middle level as a line, the others around it shaded.

    Args:
        surfaces: By strategy and level the corners (k, 2), in the users' units.
        objectives: The two objectives; the first is drawn upwards, the second along x.
        title: Above the picture.
        ax: Matplotlib axes to draw on.
    """
    figure, ax = axes(ax)
    sign = np.array([1.0 if o.direction == "min" else -1.0 for o in objectives])
    every = np.concatenate([s for levels in surfaces.values() for s in levels.values()]) * sign
    grid = np.unique(every[:, 1])
    right = [*grid, grid[-1] + 0.03 * (float(np.ptp(grid)) or 1.0)]  # the last step shows, too
    worst = every[:, 0].max() + 0.03 * (float(np.ptp(every[:, 0])) or 1.0)

    def stairs(corners: Floats) -> Floats:
        ordered = (corners * sign)[np.argsort(corners[:, 1] * sign[1])]
        steps = np.searchsorted(ordered[:, 1], grid, side="right")
        return np.repeat(np.concatenate([[np.inf], ordered[:, 0]])[steps], 2)

    x = np.repeat(right, 2)[1:-1] * sign[1]
    for (label, levels), look in zip(surfaces.items(), _looks(), strict=False):
        y = {level: stairs(levels[level]) for level in sorted(levels)}
        middle = sorted(y)[(len(y) - 1) // 2]
        finite = np.isfinite(y[middle])
        ax.plot(x[finite], y[middle][finite] * sign[0], label=label, linewidth=2, **look)
        first, last = y[min(y)], y[max(y)]
        finite = np.isfinite(first)
        ax.fill_between(
            x[finite], first[finite] * sign[0], np.minimum(last, worst)[finite] * sign[0],
            color=look["color"], alpha=0.15, linewidth=0,
        )  # fmt: skip
    names = [_label(o.name, objectives) for o in objectives]
    _decorate(ax, names[1], names[0], title)
    _engineering(ax.xaxis, every[:, 1])
    _engineering(ax.yaxis, every[:, 0])
    ax.legend(loc="best", frameon=False)
    return figure, ax


def draw_bars(
    labels: Sequence[str],
    bars: Mapping[str, tuple[Floats, Floats]],
    *,
    xlabel: str,
    title: str,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw bars along x with their errors, the first label on top, one colour per series.

    Args:
        labels: The names of the bars.
        bars: By series, values and errors, each (len(labels),).
        xlabel: The name of the values.
        title: Above the picture.
        ax: Matplotlib axes to draw on.
    """
    is_new = ax is None
    figure, ax = axes(ax)
    if is_new:
        figure.set_figheight(max(3.0, 1.2 + 0.2 * len(labels) * (len(bars) + 0.5)))
    height = 0.8 / len(bars)
    places = np.arange(len(labels))
    for k, ((name, (values, errors)), look) in enumerate(zip(bars.items(), _looks(), strict=False)):
        at = places + (k - (len(bars) - 1) / 2) * height
        ax.barh(at, values, height, color=look["color"], label=name)
        noisy = errors > 0
        ax.errorbar(
            values[noisy], at[noisy], xerr=errors[noisy], fmt="none", ecolor="black", elinewidth=1,
            capsize=2,
        )  # fmt: skip
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    _decorate(ax, xlabel, "", title)
    ax.legend(loc="best", frameon=False)
    return figure, ax


def _looks() -> Iterator[dict[str, str]]:
    """Yield colours that people of any colour vision can tell apart, then the same with dashes."""
    for style in itertools.cycle(["-", "--", ":", "-."]):
        for colour in _COLOURS:
            yield {"color": colour, "linestyle": style}


def _decorate(ax: Any, x: str, y: str, title: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _name_ends(ax: Any, ends: Mapping[str, float]) -> None:
    """Write the name of each line at its end, moved apart where they would overlap."""
    from scipy.optimize import isotonic_regression

    colours = {line.get_label(): line.get_color() for line in ax.get_lines()}
    low, high = ax.get_ylim()
    value = np.clip(np.nan_to_num(list(ends.values()), nan=low), low, high)
    places = ax.transData.transform([(1, v) for v in value])[:, 1]
    bottom, top = ax.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    places = (places - bottom) / (top - bottom)
    order = np.argsort(places, kind="stable")
    gap = min(_GAP, 1 / len(order))
    steps = gap * np.arange(len(order))
    spread = isotonic_regression(places[order] - steps).x  # the nearest that are a gap apart
    spread = np.clip(spread, 0, 1 - steps[-1]) + steps
    for i, place in zip(order, spread, strict=True):
        label = list(ends)[i]
        ax.annotate(
            label, (1, place), xycoords="axes fraction", xytext=(6, 0), fontweight="bold",
            textcoords="offset points", va="center", color=colours[label],
        )  # fmt: skip
