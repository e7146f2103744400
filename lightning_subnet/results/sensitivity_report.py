# SPDX-License-Identifier: Apache-2.0
"""Elasticity reports: which dimensions of a super-network matter, as a table and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_subnet._checks import checked_int
from lightning_subnet.errors import SearchError
from lightning_subnet.predictors.registry import make
from lightning_subnet.results.record import SearchRecord, check_recorded
from lightning_subnet.results.sensitivity import (
    FEWEST,
    Analysis,
    Dimension,
    Sensitivity,
    dimensions,
)
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.history import History
from lightning_subnet.study.measures import Measure, NetworkMeasure, by_name
from lightning_subnet.study.problem import check_part

if TYPE_CHECKING:
    import pandas as pd

By = Literal["group", "choice"]
_SHARE_SHOWN = 0.001  # in the table; the data frame has all


@dataclass(frozen=True, eq=False)
class ElasticityReport:
    """Sensitivity of each measure to each choice of a space; `elasticity_report` makes one.

    Args:
        space: The space.
        parts: Its dimensions: every choice, then every group of several.
        measures: The sensitivities, one per measure.

    Example:
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> report = elasticity_report(ElasticMobileNetV3.tiny(), ["macs"])
        >>> frame = report.to_dataframe()
        >>> frame.loc[frame.share.idxmax(), ["dimension", "measure"]].tolist()
        ['e.*', 'macs']
    """

    space: SearchSpace
    parts: tuple[Dimension, ...]
    measures: tuple[Sensitivity, ...]

    def _shown(self, by: By) -> list[int]:
        """Return the positions of the dimensions by group or by choice, those that matter first."""
        if by not in ("group", "choice"):
            msg = f"by={by!r} must be 'group' or 'choice'."
            raise SearchError(msg)
        places = {part.at for part in dimensions(self.space, by=by)}
        at = [i for i, part in enumerate(self.parts) if part.at in places]
        mean = np.mean([measure.share for measure in self.measures], axis=0)
        return sorted(at, key=lambda i: -mean[i])

    def to_dataframe(self, by: By = "group") -> pd.DataFrame:
        """Return one row per dimension and measure.

        Args:
            by: `"group"` puts numbered choices together (`ks.*`); `"choice"` has each by itself.

        Returns:
            `dimension`; `choices`, how many it has; `measure`; `unit`; `change`, that of the
            measure where the dimension is turned down from the largest subnet, in its unit, with
            its standard error `change_error` and in % as `change_percent`; `share` of the variance,
            in 0..1, with its standard error `share_error`.
        """
        import pandas as pd

        rows = [
            {
                "dimension": self.parts[i].name,
                "choices": len(self.parts[i].at),
                "measure": s.measure,
                "unit": s.unit,
                "change": s.change[i],
                "change_error": s.change_error[i],
                "change_percent": 100 * s.change[i] / s.largest if s.largest else np.nan,
                "share": s.share[i],
                "share_error": s.share_error[i],
            }
            for i in self._shown(by)
            for s in self.measures
        ]
        return pd.DataFrame(rows)

    def table(self, by: By = "group", *, width: int = 100) -> str:
        """Return the report as text: shares with their standard errors, and changes.

        Args:
            by: As in `to_dataframe`.
            width: Characters of a line.
        """
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.space.size:,} subnets", title_justify="left")
        table.add_column("dimension")
        for s in self.measures:
            table.add_column(f"{s.measure}: share of variance", justify="right")
            table.add_column("turned down", justify="right")
        for i in self._shown(by):
            cells = [self.parts[i].name]
            for s in self.measures:
                cells += [_percent(s.share[i], s.share_error[i]), _change(s, i)]
            table.add_row(*cells)
        rest = ["together, and the rest"]
        for s in self.measures:
            rest += [_percent(s.rest, s.rest_error), f"from {s.largest:.4g} {s.unit}"]
        table.add_section()
        table.add_row(*rest)
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(table)
        for s in self.measures:
            console.print(f"{s.measure}: {s.basis}", highlight=False, soft_wrap=True)
        text: str = console.file.getvalue()  # type: ignore[attr-defined] # the StringIO above
        return "\n".join(line.rstrip() for line in text.splitlines())

    def __str__(self) -> str:
        return self.table()

    def plot(self, by: By = "group", ax: Any = None) -> tuple[Any, Any]:
        """Draw the share of each measure's variance by dimension, with its standard error.

        Args:
            by: As in `to_dataframe`.
            ax: Matplotlib axes to draw on.

        Returns:
            `(fig, ax)`.
        """
        from lightning_subnet.results.plots import draw_bars

        at = self._shown(by)
        bars = {s.measure: (100 * s.share[at], 100 * s.share_error[at]) for s in self.measures}
        return draw_bars(
            [self.parts[i].name for i in at],
            bars,
            xlabel="share of the variance over the space, in %, of each dimension by itself",
            title="Which dimensions matter",
            ax=ax,
        )


def _percent(share: float, error: float) -> str:
    return f"{100 * share:.1f}" + (f" ± {100 * error:.1f} %" if error >= _SHARE_SHOWN / 2 else " %")


def _change(sensitivity: Sensitivity, i: int) -> str:
    change, largest = sensitivity.change[i], sensitivity.largest
    if np.isnan(change):
        return "-"
    if not largest:
        return f"{change:+.3g} {sensitivity.unit}".rstrip()
    error = 100 * sensitivity.change_error[i] / abs(largest)
    shown = f" ± {error:.1f}" if error >= _SHARE_SHOWN / 2 * 100 else ""
    return f"{100 * change / largest:+.1f}{shown} %"


def elasticity_report(  # noqa: PLR0913 - a model, a result, and what each needs
    model: Any,
    measures: Sequence[str | Measure | NetworkMeasure] = ("macs", "params"),
    *,
    result: SearchRecord | History | None = None,
    metrics: Sequence[str] | None = None,
    example_input: Any = None,
    n_samples: int = 100,
    predictor: Any = "ridge",
    seed: int = 0,
) -> ElasticityReport:
    """Report which choices of a super-network matter, to its costs here and to its metric.

    Two figures per dimension and measure. *Turned down*: what the largest subnet gains or loses
    where this dimension alone goes to its least value. *Share*: the part of the variance of the
    measure over all subnets that the values of the choice explain by themselves (the first-order
    index of a functional analysis of variance; a choice counts where it exists, a group is the sum
    of its choices). The rest of 100 % is the effect of choices together, and noise.

    Exact measures of index rows are taken of all subnets of a space of up to 100,000, and of 20,000
    uniform ones of a larger one. Other measures, such as `Latency`, are taken of `n_samples`
    uniform subnets, and a predictor that is fitted on these stands for the others. So it does for
    the metrics of a `result`, whose evaluations may have been chosen in any way: the predictor
    weighs them anew. Its error on left-out evaluations counts into the rest, so a share that the
    evaluations do not support comes out low, not high. Standard errors are of leaving out a
    twentieth of the subnets at a time.

    Args:
        model: A super-network, a LightningModule with one, or a `SearchSpace`.
        measures: Names of measures (`"macs"`, `"params"`, `"size_mb"`, `"latency_ms"`), and
            measures such as `Latency(...)`.
        result: The result of a search, or its history; an evaluation of random search says most.
        metrics: Which of its measures; by default all that are not in `measures`.
        example_input: As the network takes it, where a measure of networks needs it; by default the
            module's `example_input_array`.
        n_samples: How many subnets measures that take their time are taken of, besides those that
            are turned down.
        predictor: As in `SubnetSearch`.
        seed: Of samples and folds.

    Returns:
        The report: `print` it, `to_dataframe()`, `plot()`.

    Raises:
        SearchError: Nothing to report on, a measure or metric that is unknown, a result of another
            space, or too few evaluations.
        ObjectiveError: Two measures of one name, or values that are not numbers.

    References:
        Hutter, Hoos and Leyton-Brown, An efficient approach for assessing hyperparameter
        importance, ICML 2014, section 3; Saltelli et al., Global Sensitivity Analysis, 2008,
        chapter 1 (one at a time, and shares of variance).

    Example:
        >>> from lightning_subnet import SearchSpace, measure
        >>> @measure("cost", unit="MAC", exact=True, takes="indices")
        ... def cost(X):
        ...     return 1.0 + 3.0 * X[:, 0] + 1.0 * X[:, 1]
        >>> report = elasticity_report(SearchSpace(depth=[1, 2], width=[8, 16]), [cost])
        >>> report.to_dataframe()[["dimension", "change", "share"]].values.tolist()
        [['depth', -3.0, 0.9], ['width', -1.0, 0.1]]
    """
    checked_int(n_samples, "n_samples", error=SearchError, least=FEWEST)
    make(predictor)  # an unknown one shows before anything is measured
    history = result if isinstance(result, History) or result is None else result.final
    space, bound = _space_and_measures(model, list(measures), example_input)
    units = {} if isinstance(result, History) or result is None else result.measures
    names: list[str] = []
    if history is not None:
        check_part(history.space, space)
        recorded = dict.fromkeys(name for e in history if e.ok for name in e.values)
        costs = {measure.name for measure in bound}
        names = [n for n in recorded if n not in costs] if metrics is None else list(metrics)
        check_recorded(names, recorded, error=SearchError)
    if not bound and not names:
        msg = "There is nothing to report on. Give measures=['macs'], or result= of a search."
        raise SearchError(msg)
    groups = [part for part in dimensions(space, by="group") if len(part.at) > 1]
    analysis = Analysis(space, [*dimensions(space, by="choice"), *groups], seed)
    # The metrics first: too few evaluations show before a latency takes its time.
    of_metrics = [
        analysis.of_values(
            name,
            units.get(name, {}).get("unit", ""),
            space.indices(e.subnet for e in history if e.ok),
            history.column(name)[history.ok],
            predictor=predictor,
        )
        for name in names
        if history is not None
    ]
    of_costs = [
        analysis.of_exact(measure)
        if measure.exact and measure.vectorised
        else analysis.of_measured(measure, n_samples)
        for measure in bound
    ]
    return ElasticityReport(space, tuple(analysis.dimensions), (*of_costs, *of_metrics))


def _space_and_measures(
    model: Any, measures: list[Any], example_input: Any
) -> tuple[SearchSpace, list[Measure]]:
    """Return the space of a model and its measures, in order, those of networks bound to it."""
    if isinstance(model, SearchSpace) and all(isinstance(m, Measure) for m in measures):
        return model, list(by_name(measures).values())  # without torch
    from lightning_subnet.costs.resolve import resolve, with_sample

    space = _space_of(model)
    host, sample = with_sample(model, example_input)
    bound = resolve(
        host,
        measures,
        sample=lambda: sample,
        error=SearchError,
        hint="Give others as objects, such as Energy().",
    )
    return space, [bound[m if isinstance(m, str) else m.name] for m in measures]


def _space_of(model: Any) -> SearchSpace:
    from torch import nn

    from lightning_subnet.elasticity.protocol import elastic_part

    if isinstance(model, SearchSpace):
        return model
    if isinstance(model, nn.Module):
        return elastic_part(model).search_space()
    msg = (
        f"elasticity_report() got a {type(model).__name__}. "
        "Pass a super-network, a LightningModule with one, or a SearchSpace."
    )
    raise SearchError(msg)
