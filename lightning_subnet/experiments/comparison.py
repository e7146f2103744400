# SPDX-License-Identifier: Apache-2.0
"""Comparisons: one search with several strategies and seeds, in tables and pictures."""

from __future__ import annotations

import logging
import numbers
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.errors import SearchError, SubnetError
from lightning_subnet.experiments import statistics
from lightning_subnet.results.result import SearchResult
from lightning_subnet.search.budget import Budget
from lightning_subnet.search.search import SubnetSearch
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.strategies.registry import resolve
from lightning_subnet.study import pareto
from lightning_subnet.study.evaluators import Evaluator
from lightning_subnet.study.objectives import Objective, minimised
from lightning_subnet.study.storage import Storage

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)
_CHECKPOINTS = (50, 100, 250)  # evaluations after which strategies are paired
_LEVELS = (0.25, 0.5, 0.75)


class Comparison:
    """Results by strategy and seed, as `compare` returns them.

    Args:
        results: By (label, seed).
        budget: Evaluations per run.
        bounds: By objective (best, worst); None takes the range of everything that was measured.
    """

    def __init__(
        self,
        results: Mapping[tuple[str, int], SearchResult],
        *,
        budget: int,
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.results = dict(results)
        self.budget = budget
        self._bounds = bounds

    @property
    def labels(self) -> list[str]:
        """The strategies, in the order of the results."""
        return list(dict.fromkeys(label for label, _ in self.results))

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of the results."""
        return list(dict.fromkeys(seed for _, seed in self.results))

    @property
    def _objectives(self) -> tuple[Objective, ...]:
        return next(iter(self.results.values())).objectives

    @cached_property
    def _unit(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The best and the worst value of each objective, to be minimised, (m,) each."""
        objectives = self._objectives
        if self._bounds is not None:
            if missing := [o.name for o in objectives if o.name not in self._bounds]:
                msg = f"bounds= has no {missing[0]!r}. Give (best, worst) for every objective."
                raise SearchError(msg)
            ends = {o.name: np.array(self._bounds[o.name], dtype=float) for o in objectives}
            best, worst = minimised(objectives, ends)
            if not (best < worst).all():
                msg = f"bounds={self._bounds} must be (best, worst) by objective, best first."
                raise SearchError(msg)
            return best, worst
        F = np.concatenate([result.minimised() for result in self.results.values()])
        F = F[np.isfinite(F).all(axis=1)]
        if not len(F):
            msg = "No run has a feasible evaluation, so there is nothing to compare."
            raise SearchError(msg)
        return F.min(axis=0), F.max(axis=0)

    @cached_property
    def curves(self) -> dict[str, npt.NDArray[np.float64]]:
        """Hypervolume after each evaluation, by strategy (seeds, budget), in the unit square."""
        best, worst = self._unit
        span = np.where(worst > best, worst - best, 1.0)
        # Where no bounds are stated, the worst measured values lie a little inside the square.
        span = span if self._bounds is not None else 1.1 * span
        curves = {label: np.full((len(self.seeds), self.budget), np.nan) for label in self.labels}
        for (label, seed), result in self.results.items():
            F = (result.minimised() - best) / span
            row = curves[label][self.seeds.index(seed)]
            values = pareto.hypervolumes(F[: self.budget], np.ones(F.shape[1]))
            row[: len(values)] = values
            row[len(values) :] = values[-1] if len(values) else 0.0  # the space was exhausted
        return curves

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per evaluation: strategy, seed, number, hypervolume, the objectives."""
        import pandas as pd

        frames = []
        for (label, seed), result in self.results.items():
            frame = result.history.to_dataframe().reset_index()
            curve = self.curves[label][self.seeds.index(seed)]
            frame.insert(0, "hypervolume", curve[np.minimum(frame["number"], self.budget - 1)])
            frame.insert(0, "seed", seed)
            frame.insert(0, "strategy", label)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def _counts(self, at: Sequence[int]) -> list[int]:
        """Return numbers of evaluations in order, or raise if one is not within the budget."""
        if any(not isinstance(k, numbers.Integral) or not 1 <= k <= self.budget for k in at):
            msg = f"at={list(at)} must lie within the budget, 1..{self.budget}."
            raise SearchError(msg)
        return sorted({int(k) for k in at})

    def summary(
        self, at: Sequence[int] | None = None, *, target: float | str | None = None
    ) -> pd.DataFrame:
        """Return `median (lower quartile-upper quartile)` of the hypervolume over seeds.

        One row is one strategy.

        Args:
            at: After which evaluations; by default a fifth, two fifths and all of the budget.
            target: As in `evaluations_to`; adds the median evaluations to reach it.
        """
        import pandas as pd

        default = [max(self.budget // 5, 1), max(2 * self.budget // 5, 1), self.budget]
        table = {
            f"hv@{k}": {
                label: "{:.3f} ({:.3f}-{:.3f})".format(
                    *np.nanquantile(curve[:, k - 1], [0.5, 0.25, 0.75])
                )
                for label, curve in self.curves.items()
            }
            for k in self._counts(default if at is None else at)
        }
        if target is not None:
            name = target if isinstance(target, str) else f"{target:g}"
            medians = self.evaluations_to(target)["median"]
            table[f"evaluations to {name}"] = {s: f"{medians[s]:g}" for s in self.labels}
        return pd.DataFrame(table, index=self.labels)

    def evaluations_to(self, target: float | str, *, confidence: float = 0.95) -> pd.DataFrame:
        """Return the number of evaluations that each strategy needs to reach a hypervolume.

        Args:
            target: A hypervolume in the unit square of `bounds`, or `"nsga2@250"`: the median over
                seeds that this strategy has after so many evaluations.
            confidence: Of the interval.

        Returns:
            One row per strategy: `median`, the number of evaluations after which half of the seeds
            have it, with its bootstrap interval `low` to `high`; and the number of `seeds` that
            `reached` it. A run that never did needs infinitely many, so where most did not the
            median is `inf`. `frame.attrs["target"]` is the target as a number.

        Raises:
            SearchError: The target is neither of these.

        References:
            Hansen et al., COCO: Performance assessment, arXiv:1605.03560, section 4 (runtimes to
            targets).
        """
        import pandas as pd

        goal = statistics.target_of(self.curves, target)
        rows = {}
        for label, curve in self.curves.items():
            counts = statistics.evaluations_to(curve[~np.isnan(curve).any(axis=1)], goal)
            low, median, high = statistics.median_interval(
                counts, confidence=confidence, lower=True
            )
            rows[label] = [median, low, high, int(np.isfinite(counts).sum()), len(counts)]
        columns = ["median", "low", "high", "reached", "seeds"]
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        frame.attrs["target"] = goal
        return frame

    def paired(
        self,
        baseline: str | None = None,
        at: Sequence[int] | None = None,
        *,
        confidence: float = 0.95,
    ) -> pd.DataFrame:
        """Return the lead of each strategy over a baseline, seed by seed.

        Runs of one seed draw alike (strategies that begin at random begin with the same subnets),
        so their differences vary less than they do. With fewer than six seeds that differ no
        result can have p under 0.05.

        Args:
            baseline: The strategy to compare with; by default the first.
            at: After which evaluations; by default 50, 100 and 250, as far as the budget goes, and
                the whole budget.
            confidence: Of the interval.

        Returns:
            One row per strategy and `at`: `median` of the differences of hypervolume with its
            bootstrap interval `low` to `high`, their `mean`, the numbers of seeds in which the
            strategy was `better` and `worse` (the others are equal), `p` of Wilcoxon's signed-rank
            test, and `p_holm`, corrected by Holm's method for the number of strategies.

        Raises:
            SearchError: There is no such baseline, or no other strategy.

        References:
            Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 7, 2006.
        """
        import pandas as pd

        baseline = self.labels[0] if baseline is None else baseline
        if baseline not in self.curves or len(self.curves) == 1:
            hint = did_you_mean(baseline, self.labels)
            msg = (
                f"baseline={baseline!r} has nothing to be compared with.{hint} "
                f"A comparison needs two strategies, and has {listed(self.labels)}."
            )
            raise SearchError(msg)
        default = [*(k for k in _CHECKPOINTS if k < self.budget), self.budget]
        counts = self._counts(default if at is None else at)
        return pd.DataFrame(
            statistics.against(baseline, self.curves, counts, confidence=confidence)
        )

    def _surfaces(
        self, levels: Sequence[float], at: int | None
    ) -> dict[str, dict[float, npt.NDArray[np.float64]]]:
        """Return corners (k, 2) of attainment surfaces by strategy and level, in users' units."""
        objectives = self._objectives
        if len(objectives) != 2:  # noqa: PLR2004 - a surface in the plane
            msg = (
                f"Attainment surfaces are drawn for two objectives, and this search has "
                f"{len(objectives)}. Compare hypervolumes: evaluations_to(), paired()."
            )
            raise SearchError(msg)
        last = self._counts([self.budget if at is None else at])[0]
        sign = np.array([1.0 if o.direction == "min" else -1.0 for o in objectives])
        surfaces = {}
        for label in self.labels:
            runs = [r.minimised()[:last] for (name, _), r in self.results.items() if name == label]
            corners = pareto.attainment(runs, levels)
            # + 0.0 makes the 0.0 of a maximised objective of its -0.0
            surfaces[label] = {k: c * sign + 0.0 for k, c in zip(levels, corners, strict=True)}
        return surfaces

    def attainment(
        self, levels: Sequence[float] = _LEVELS, *, at: int | None = None
    ) -> pd.DataFrame:
        """Return the values of two objectives that shares of the runs have attained.

        The surface of level 0.5 is the median front: half of the runs have something as good as, or
        better than, each of its points; level 0.25 is what only the best quarter has.

        Args:
            levels: Shares of the seeds.
            at: After how many evaluations; by default all.

        Returns:
            One row per corner of a surface: strategy, level and the two objectives.

        Raises:
            SearchError: The number of objectives is not two.

        References:
            López-Ibáñez, Paquete and Stützle, Exploratory analysis of stochastic local search
            algorithms in biobjective optimization, 2010; see `pareto.attainment`.
        """
        import pandas as pd

        names = [o.name for o in self._objectives]
        rows = [
            {"strategy": label, "level": level} | dict(zip(names, map(float, row), strict=True))
            for label, surfaces in self._surfaces(levels, at).items()
            for level, surface in surfaces.items()
            for row in surface
        ]
        return pd.DataFrame(rows, columns=["strategy", "level", *names])

    def plot_attainment(
        self, levels: Sequence[float] = _LEVELS, *, at: int | None = None, ax: Any = None
    ) -> tuple[Any, Any]:
        """Draw attainment surfaces: the middle level as stairs, between the outer ones shaded.

        Args:
            levels: Shares of the seeds.
            at: After how many evaluations; by default all.
            ax: Matplotlib axes to draw on.

        Returns:
            `(fig, ax)`.
        """
        from lightning_subnet.results.plots import draw_attainment

        _ = self._unit  # raises where no run has a feasible evaluation
        shares = ", ".join(f"{level:.0%}" for level in sorted(levels))
        title = (
            f"Attained by {shares} of {len(self.seeds)} seeds "
            f"after {self.budget if at is None else at} evaluations"
        )
        objectives = self._objectives
        return draw_attainment(self._surfaces(levels, at), objectives, title=title, ax=ax)

    def plot_hypervolume(
        self,
        ax: Any = None,
        *,
        band: Literal["quartiles", "bootstrap"] = "quartiles",
        true: float | None = None,
    ) -> tuple[Any, Any]:
        """Draw the median hypervolume over evaluations.

        Args:
            ax: Matplotlib axes to draw on.
            band: `"quartiles"` of the seeds, or the 95 % `"bootstrap"` interval of the median.
            true: The hypervolume of the true front in the unit square of `bounds`, where it is
                known. Then the share that is missing is drawn, on a logarithmic axis.

        Returns:
            `(fig, ax)`.
        """
        from lightning_subnet.results.plots import draw_curves

        titles = {"quartiles": "interquartile range", "bootstrap": "its 95 % bootstrap interval"}
        if band not in titles:
            msg = f"band={band!r} must be 'quartiles' or 'bootstrap'.{did_you_mean(band, titles)}"
            raise SearchError(msg)
        if true is not None and not 0 < true < np.inf:
            msg = f"true={true!r} must be the positive hypervolume of the true front."
            raise SearchError(msg)
        bands = {}
        for label, curve in self.curves.items():
            values = curve[~np.isnan(curve).any(axis=1)]
            values = values if true is None else 1 - values / true
            bands[label] = (
                np.quantile(values, [0.25, 0.5, 0.75], axis=0)
                if band == "quartiles"
                else statistics.median_interval(values)
            )
        return draw_curves(
            bands,
            ylabel="hypervolume"
            if true is None
            else "share of the true hypervolume that is missing",
            title=f"{len(self.seeds)} seeds, median and {titles[band]}",
            log=true is not None,
            ax=ax,
        )


def compare(  # noqa: PLR0913 - the parts of a comparison
    strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy],
    search: SubnetSearch,
    *,
    evaluator: Evaluator | None = None,
    model: Any = None,
    datamodule: Any = None,
    budget: int | Budget = 250,
    seeds: Iterable[int] = range(10),
    storage: str | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    progress: bool = True,
) -> Comparison:
    """Run a search with several strategies and seeds.

    The runs are studies named `<search>/<strategy>/<seed>`. Values of equal fingerprint (those of a
    model are, and those of a measure or evaluator with one) are measured once, and count in each
    run. With a storage, a comparison that was interrupted goes on, one with more strategies, seeds
    or budget measures only what is new, and a finished one is read back.

    Args:
        strategies: Names or objects; as a mapping with the labels they shall have.
        search: The search whose strategy and seed are varied.
        evaluator: Measures subnets; or pass a model with its datamodule.
        model: A LightningModule, as for `SubnetSearch.fit`.
        datamodule: Its data.
        budget: Evaluations per run.
        seeds: The seeds.
        storage: A database URL; None keeps everything in memory.
        bounds: By objective (best, worst), the unit square of the hypervolume; by default the range
            of everything that was measured.
        progress: Show a bar for each run, where the output is a terminal.

    Raises:
        SearchError: No strategies or seeds, neither evaluator nor model, or a run that failed: the
            error names strategy and seed. Runs that were finished are in the storage.

    Example:
        >>> from lightning_subnet import FunctionEvaluator, SearchSpace
        >>> search = SubnetSearch(space=SearchSpace(a=range(9), b=range(9)), storage=None,
        ...                       objectives={"f": "min", "g": "min"})
        >>> evaluator = FunctionEvaluator(
        ...     lambda s: {"f": s["a"] + s["b"], "g": (8 - s["a"]) ** 2 + s["b"]})
        >>> table = compare(["random", "nsga2"], search, evaluator=evaluator, budget=20,
        ...                 seeds=range(2))
        >>> table.summary().index.tolist()
        ['random', 'nsga2']
    """
    by_label, seeds = _checked(strategies, seeds)
    if (limit := Budget.of(budget).evaluations) is None:
        msg = f"compare() needs a budget of evaluations, not {budget!r}."
        raise SearchError(msg)
    nothing_measures = evaluator is None and model is None and not search.plan.measures
    if nothing_measures or (evaluator is not None and model is not None):
        msg = "compare() measures either by evaluator=, or by model= and datamodule=. Give one."
        raise SearchError(msg)
    base = search.plan.settings.name or "compare"
    shared = Storage(storage)  # also in memory, so that no subnet is measured twice
    bar = progress and sys.stdout.isatty()
    results: dict[tuple[str, int], SearchResult] = {}
    for seed in seeds:
        for label, strategy in by_label.items():
            run = search.replace(
                strategy=strategy,
                seed=seed,
                budget=budget,
                storage=shared,
                name=f"{base}/{label}/{seed}",
            )
            try:
                if model is not None:
                    results[label, seed] = run.fit(model, datamodule, progress=bar)
                else:
                    results[label, seed] = run.run(evaluator, progress=bar)
            except Exception as error:
                _explain(error, label, seed, len(results), in_memory=storage is None)
                raise
            _log.info("%s is done, run %d.", run.name, len(results))
    return Comparison(results, budget=limit, bounds=bounds)


def _checked(strategies: Any, seeds: Any) -> tuple[dict[str, Strategy], list[int]]:
    """Return strategies by label, and the seeds, or raise `SearchError` if they are not several."""
    if isinstance(strategies, str) or not isinstance(seeds, Iterable):
        msg = (
            f"compare({strategies!r:.40}, seeds={seeds!r:.40}): give lists of strategies and "
            "seeds, such as ['random', 'nsga2'] and range(10)."
        )
        raise SearchError(msg)
    mapping = isinstance(strategies, Mapping)
    by_label = dict(strategies) if mapping else {_label(s): s for s in strategies}
    seeds = list(seeds)
    if not by_label or not seeds or len(by_label) < len(strategies):
        msg = (
            f"compare() got {len(strategies)} strategies under {len(by_label)} labels and "
            f"{len(seeds)} seeds. Give at least one of each; "
            "two settings of one strategy as {'label': strategy, ...}."
        )
        raise SearchError(msg)
    return {label: resolve(strategy) for label, strategy in by_label.items()}, seeds


def _label(strategy: str | Strategy) -> str:
    if isinstance(strategy, str):
        return strategy
    return getattr(strategy, "name", type(strategy).__name__)


def _explain(error: Exception, label: str, seed: int, done: int, *, in_memory: bool) -> None:
    """Add to an error in which run it happened; one that is not the package's becomes one."""
    where = f"The run of {label!r} with seed {seed} failed"
    rest = (
        f"{done} runs before it are lost: give storage= to keep them."
        if in_memory
        else f"{done} runs before it are in the storage: remove the cause and compare again."
    )
    if isinstance(error, SubnetError):
        error.add_note(f"{where}. {rest}")
    else:
        msg = f"{where}: {type(error).__name__}: {error!s:.200}\n{rest}"
        raise SearchError(msg) from error
