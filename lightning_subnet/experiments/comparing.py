# SPDX-License-Identifier: Apache-2.0
"""compare: the same search with several strategies and seeds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_subnet.errors import SearchError, SubnetError
from lightning_subnet.experiments.comparison import Comparison
from lightning_subnet.results.result import SearchResult
from lightning_subnet.search.budget import Budget
from lightning_subnet.search.search import SubnetSearch
from lightning_subnet.strategies import resolve
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.study.evaluators import Evaluator
from lightning_subnet.study.storage import Storage

_log = logging.getLogger(__name__)


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
        evaluator: What measures; or a model with its datamodule.
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
    shown = progress and sys.stdout.isatty()
    for seed in seeds:
        for label, strategy in resolved.items():
            run = search.replace(
                strategy=strategy,
                seed=seed,
                budget=budget,
                storage=shared,
                name=f"{base}/{label}/{seed}",
            )
            try:
                if model is not None:
                    results[label, seed] = run.fit(model, datamodule, progress=shown)
                else:
                    results[label, seed] = run.run(evaluator, progress=shown)
            except Exception as error:
                _explain(error, label, seed, len(results), kept=storage is not None)
                raise
            _log.info("%s is done, run %d.", run.name, len(results))
    return Comparison(results, budget=limit, bounds=bounds)


def _explain(error: Exception, label: str, seed: int, done: int, *, kept: bool) -> None:
    """Say in which run it happened; an error that is not the package's own becomes one."""
    where = f"The run of {label!r} with seed {seed} failed"
    rest = (
        f"{done} runs before it are in the storage: mend the cause and compare again."
        if kept
        else f"{done} runs before it are lost: give storage= to keep them."
    )
    if isinstance(error, SubnetError):
        error.add_note(f"{where}. {rest}")
    else:
        msg = f"{where}: {type(error).__name__}: {error!s:.200}\n{rest}"
        raise SearchError(msg) from error


def _label(strategy: str | Strategy) -> str:
    return (
        strategy
        if isinstance(strategy, str)
        else getattr(strategy, "name", type(strategy).__name__)
    )
