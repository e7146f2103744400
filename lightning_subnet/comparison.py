# SPDX-License-Identifier: Apache-2.0
"""compare: the same search with several strategies and seeds, in one table and one picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_subnet import pareto
from lightning_subnet.budget import Budget
from lightning_subnet.errors import SearchError
from lightning_subnet.evaluators import Evaluator
from lightning_subnet.objectives import minimised
from lightning_subnet.result import SearchResult
from lightning_subnet.search import SubnetSearch
from lightning_subnet.storage import Storage
from lightning_subnet.strategies import resolve
from lightning_subnet.strategies.base import Strategy

if TYPE_CHECKING:
    import pandas as pd


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
) -> Comparison:
    """Run a search with several strategies and seeds.

    The runs are studies named `<search>/<strategy>/<seed>`. Values of equal fingerprint (those of a
    model are, and those of a measure or evaluator with one) are measured once, and count in each
    run. With a storage, a comparison that was interrupted goes on.

    Args:
        strategies: Names or objects; as a mapping with the labels they shall have.
        search: The search whose strategy and seed are varied.
        evaluator: What measures; or a model with its datamodule.
        model: A LightningModule, as for `SubnetSearch.fit`.
        datamodule: Its data.
        budget: Evaluations per run.
        seeds: The seeds.
        storage: A database URL; None keeps everything in memory.
        bounds: By objective (best, worst), the unit square of the hypervolume; by default the range
            of everything that was measured.

    Raises:
        SearchError: No strategies or seeds, or neither evaluator nor model.

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
    if isinstance(strategies, str) or not isinstance(seeds, Iterable):
        msg = (
            f"compare({strategies!r:.40}, seeds={seeds!r:.40}): give lists of strategies and "
            "seeds, such as ['random', 'nsga2'] and range(10)."
        )
        raise SearchError(msg)
    labelled = (
        dict(strategies) if isinstance(strategies, Mapping) else {_label(s): s for s in strategies}
    )
    if (limit := Budget.of(budget).evaluations) is None:
        msg = f"compare() needs a budget of evaluations, not {budget!r}."
        raise SearchError(msg)
    seeds = list(seeds)
    if not labelled or not seeds or len(labelled) < len(strategies):
        msg = (
            f"compare() got {len(strategies)} strategies under {len(labelled)} labels and "
            f"{len(seeds)} seeds. Give at least one of each; "
            "two settings of one strategy as {'label': strategy, ...}."
        )
        raise SearchError(msg)
    both = evaluator is not None and model is not None
    if both or (evaluator is None and model is None and not search.measures):
        msg = "compare() needs what to measure with: either evaluator=, or model= and datamodule=."
        raise SearchError(msg)
    resolved = {label: resolve(strategy) for label, strategy in labelled.items()}
    base = search.name if search._settings["name"] else "compare"
    results: dict[tuple[str, int], SearchResult] = {}
    shared = Storage(storage)  # also in memory, so that no subnet is measured twice
    for seed in seeds:
        for label, strategy in resolved.items():
            run = search.replace(
                strategy=strategy,
                seed=seed,
                budget=budget,
                storage=shared,
                name=f"{base}/{label}/{seed}",
            )
            if model is not None:
                results[label, seed] = run.fit(model, datamodule, progress=False)
            else:
                results[label, seed] = run.run(evaluator, progress=False)
    return Comparison(results, budget=limit, bounds=bounds)


def _label(strategy: str | Strategy) -> str:
    return (
        strategy
        if isinstance(strategy, str)
        else getattr(strategy, "name", type(strategy).__name__)
    )


class Comparison:
    """Results by strategy and seed.

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
        """The strategies, in the given order."""
        return list(dict.fromkeys(label for label, _ in self.results))

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the given order."""
        return list(dict.fromkeys(seed for _, seed in self.results))

    @cached_property
    def _unit(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The best and the worst value of each objective, to be minimised, (m,) each."""
        objectives = next(iter(self.results.values())).objectives
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
            front = np.zeros((0, F.shape[1]))
            value = 0.0
            for i, point in enumerate(F[: self.budget]):
                if np.isfinite(point).all():
                    front = np.vstack([front, point])
                    front = front[pareto.nondominated(front)]
                    value = pareto.hypervolume(front, np.ones(F.shape[1]))
                row[i] = value
            row[len(F) :] = value  # the space was exhausted
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

    def summary(self, at: Sequence[int] | None = None) -> pd.DataFrame:
        """Return `median (lower quartile-upper quartile)` of the hypervolume over seeds.

        One row is one strategy.

        Args:
            at: After which evaluations; by default a fifth, two fifths and all of the budget.
        """
        import pandas as pd

        if at is not None and any(not 1 <= k <= self.budget for k in at):
            msg = f"at={list(at)} must lie within the budget, 1..{self.budget}."
            raise SearchError(msg)
        at = at or sorted({max(self.budget // 5, 1), max(2 * self.budget // 5, 1), self.budget})
        table = {
            f"hv@{k}": {
                label: "{:.3f} ({:.3f}-{:.3f})".format(
                    *np.nanquantile(curve[:, k - 1], [0.5, 0.25, 0.75])
                )
                for label, curve in self.curves.items()
            }
            for k in at
            if k <= self.budget
        }
        return pd.DataFrame(table, index=self.labels)

    def plot_hypervolume(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw hypervolume over evaluations: median and interquartile range over seeds.

        Returns:
            `(fig, ax)`.
        """
        from lightning_subnet.plotting import draw_curves

        title = f"{len(self.seeds)} seeds, median and interquartile range"
        return draw_curves(self.curves, ylabel="hypervolume", title=title, ax=ax)
