# SPDX-License-Identifier: Apache-2.0
"""Space reduction: a smaller space from where the good subnets of an earlier search lie (PopDB)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._messages import warn
from lightning_subnet._types import Floats, Indices
from lightning_subnet.errors import ReductionWarning, SearchError
from lightning_subnet.predictors._sklearn import dense_clusters, one_thread
from lightning_subnet.results.record import SearchRecord
from lightning_subnet.space.choices import Value
from lightning_subnet.space.members import distinct_rows
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.strategies._toolkit.breeding import evolve
from lightning_subnet.strategies._toolkit.surrogates import Surrogates
from lightning_subnet.strategies.base import check_positive, check_probability
from lightning_subnet.study.history import History
from lightning_subnet.study.problem import Problem

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)
_CLUSTER, _CORE = 50, 10  # least rows of a cluster, and neighbours that make a core, as published
_PART = 20  # a cluster has at least this part of a small archive
_LEAST = 10  # rows: fewer say nothing of where good subnets lie
_MOST = 10_000  # rows that are clustered: time grows with the square
_POPULATION = 200


@dataclass(frozen=True)
class Reduction:
    """The outcome of a reduction: the space that is left, and why values were dropped or kept.

    Args:
        whole: The space before.
        space: The space after.
        archive: The number of subnets that were clustered.
        clusters: The number of clusters that they form.
        noise: The share of them that is in no cluster.
        shares: By choice, the share of each value among those in clusters where the choice exists;
            0 for all values of a choice that exists in none, which keeps them.
        dropped: By choice, the values that were dropped.
        rescued: By choice, the values that only the front kept.
    """

    whole: SearchSpace
    space: SearchSpace
    archive: int
    clusters: int
    noise: float
    shares: dict[str, dict[Value, float]]
    dropped: dict[str, tuple[Value, ...]]
    rescued: dict[str, tuple[Value, ...]]

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per value: `choice`, `value`, `share`, and whether it was `kept`."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"choice": name, "value": value, "share": share}
                | {"kept": value not in self.dropped.get(name, ())}
                for name, shares in self.shares.items()
                for value, share in shares.items()
            ],
            columns=["choice", "value", "share", "kept"],
        )

    def __str__(self) -> str:
        lines = [
            f"{self.whole.size:.3g} subnets reduced to {self.space.size:.3g}: {self.archive:,} "
            f"clustered, {self.clusters} clusters, {self.noise:.0%} noise"
        ]
        for name, values in self.dropped.items():
            lines.append(f"  {name}: dropped {', '.join(map(repr, values))}")
        for name, values in self.rescued.items():
            lines.append(f"  {name}: kept {', '.join(map(repr, values))} for the front alone")
        return "\n".join(lines)


def reduce_space(archive: SearchRecord | History | SearchSpace, **options: Any) -> SearchSpace:
    """Return the part of a space in which the good subnets of an earlier search lie.

    The subnets of the archive are clustered by density, those outside of clusters are left out, and
    a value of a choice that fewer than `min_share` of the others have is dropped. What is left is a
    narrowed space of the same choices (`SearchSpace.narrowed_to`), which any strategy searches, on
    other hardware say, and whose subnets can be activated on the model. The front of the archive
    lies in it, unless `keep_front=False`. The dropped values are logged, and `reduction` returns
    them.

    Args:
        archive: The result of a search: predictors fitted on its evaluations are searched by
            evolution, and the predicted subnets are clustered. Or a `History` or a pool
            (`space.restricted_to`), whose subnets are clustered as they are.
        **options: See `reduction`.

    Returns:
        The narrowed space; the space as it is, with a `ReductionWarning`, if nothing was dropped.

    Raises:
        SearchError: The archive cannot be clustered, or is too small.
        StrategyError: An option is out of range.

    Example:
        >>> from lightning_subnet import FunctionEvaluator, SubnetSearch
        >>> space = SearchSpace({f"x.{i}": range(6) for i in range(5)})
        >>> search = SubnetSearch(space=space, objectives={"f": "min", "g": "min"}, storage=None,
        ...                       strategy="nsga2", budget=150)
        >>> result = search.run(progress=False, evaluator=FunctionEvaluator(
        ...     lambda s: {"f": sum(s.values()), "g": sum((v - 2) ** 2 for v in s.values())}))
        >>> reduced = reduce_space(result, samples=2000)
        >>> reduced.size < space.size, all(e.subnet in reduced for e in result.front)
        (True, True)

    References:
        Cummings et al., A Hardware-Aware System for Accelerating Deep Neural Network Optimization,
        arXiv:2202.12954 (PopDB).
    """
    return reduction(archive, **options).space


def reduction(  # noqa: PLR0913 - the settings of a reduction, each optional
    archive: SearchRecord | History | SearchSpace,
    *,
    samples: int = 20_000,
    predictor: Any = "auto",
    min_share: float = 0.01,
    min_cluster_size: int | None = None,
    min_samples: int | None = None,
    keep_front: bool = True,
    seed: int = 0,
) -> Reduction:
    """Return the space of `reduce_space` with a report.

    Args:
        archive: As for `reduce_space`.
        samples: The number of predictions that the evolution makes of a result; 0 clusters the
            measured subnets alone. At most 10,000 subnets are clustered, drawn at random.
        predictor: A name or an estimator; see `predictors.make`.
        min_share: The share below which a value is dropped.
        min_cluster_size: Fewest subnets of a cluster; None is 50, fewer for an archive under 1,000.
        min_samples: Neighbours that make a core of a cluster; None is 10, or fewer if it is small.
        keep_front: Let values stay that a subnet of the measured front has, however rare. Without,
            as published, more values go, and the front need not lie in what is left.
        seed: The seed of the evolution.

    Returns:
        The reduction: `.space`, `.to_dataframe()`, and a text.
    """
    check_probability(min_share=min_share)
    counts = {"samples": samples or 1, "min_cluster_size": min_cluster_size}
    check_positive(
        **{k: v for k, v in (counts | {"min_samples": min_samples}).items() if v is not None}
    )
    rng = np.random.default_rng(seed)
    space, X, front = _archive(archive, samples, predictor, rng)
    if len(X) > _MOST:
        X = X[np.sort(rng.choice(len(X), _MOST, replace=False))]
    size = min_cluster_size or min(_CLUSTER, max(len(X) // _PART, 2))
    core = min_samples or min(_CORE, max(size // 5, 2))
    labels = dense_clusters(_places(space, X), min_cluster_size=max(size, 2), min_samples=core)
    clustered = X[labels >= 0]
    shares = _shares(space, clustered)
    keep: dict[str, list[Value]] = {}
    dropped: dict[str, tuple[Value, ...]] = {}
    rescued: dict[str, tuple[Value, ...]] = {}
    on, exists = space.from_indices(front), space.active(front)
    for j, (name, values) in enumerate(space.values.items()):
        rare = [v for v in values if shares[name].get(v, 1.0) < min_share] if len(clustered) else []
        needed = {s[name] for s, on_front in zip(on, exists[:, j], strict=True) if on_front}
        needed = needed if keep_front else set()
        if len(rare) == len([v for v in values if v in shares[name]]):
            rare = []  # the choice exists in no clustered subnet
        if on_front_alone := tuple(v for v in rare if v in needed):
            rescued[name] = on_front_alone
        if useless := tuple(v for v in rare if v not in needed):
            dropped[name] = useless
        same = {v for group in space.choices[name].same if group[0] in useless for v in group}
        keep[name] = [v for v in values if v not in useless and v not in same]
    outcome = Reduction(
        whole=space,
        space=space.narrowed_to(keep) if dropped else space,
        archive=len(X),
        clusters=int(labels.max(initial=-1)) + 1,
        noise=float((labels < 0).mean()),
        shares=shares,
        dropped=dropped,
        rescued=rescued,
    )
    _log.info("%s", outcome)
    if not dropped:
        why = (
            "every value is frequent in the clusters, or on the front"
            if len(clustered)
            else "all subnets of the archive are noise to the clustering"
        )
        warn(
            f"The space stays as it is ({space.size:.3g} subnets): {why}. Give a longer search as "
            "the archive, or more samples=.",
            ReductionWarning,
        )
    return outcome


def _archive(
    archive: SearchRecord | History | SearchSpace,
    samples: int,
    predictor: Any,
    rng: np.random.Generator,
) -> tuple[SearchSpace, Indices, Indices]:
    """Return the space, the rows to be clustered, and the rows of the front."""
    if isinstance(archive, SearchSpace):
        if not archive.is_pool:
            msg = (
                f"{archive!r} lists no subnets. Give the result of a search, or a pool of subnets: "
                "space.restricted_to(subnets)."
            )
            raise SearchError(msg)
        rows = _checked_size(np.concatenate(list(archive.index_blocks())))
        return SearchSpace(archive.choices), rows, rows[:0]
    if not isinstance(archive, (History, SearchRecord)):
        msg = (
            f"{archive!r:.60} cannot be reduced. Give the result of a search, a History or a pool."
        )
        raise SearchError(msg)
    history = archive if isinstance(archive, History) else archive.final
    space = history.space
    rows = history.indices[history.ok] if len(history) else history.indices
    rows = _checked_size(rows)
    if isinstance(archive, History):
        return space, rows, rows[:0]
    problem = archive.problem
    front = space.indices([e.subnet for e in problem.front(history)])
    if samples:
        rows = np.concatenate([rows, _predicted(problem, history, front, samples, predictor, rng)])
        rows = rows[distinct_rows(rows)]
    return space, rows, front


def _checked_size(rows: Indices) -> Indices:
    if len(rows) < _LEAST:
        msg = (
            f"The archive has {len(rows)} measured subnets; "
            f"at least {_LEAST} are needed to tell where the good ones lie."
        )
        raise SearchError(msg)
    return rows


def _predicted(
    problem: Problem,
    history: History,
    front: Indices,
    samples: int,
    predictor: Any,
    rng: np.random.Generator,
) -> Indices:
    """Return the distinct rows whose measures an evolution has predicted."""
    space = problem.space
    population = min(_POPULATION, samples)
    start = np.concatenate([front, space.sample_indices(min(population, space.size), rng)])
    with one_thread():
        _, rows = evolve(
            problem,
            Surrogates(problem, history, predictor),
            start[distinct_rows(start)],
            population=population,
            generations=max(samples // population - 1, 0),
            rng=rng,
        )
    return space.nearest(rows, set())


def _places(space: SearchSpace, X: Indices) -> Floats:
    """Return rows as places (n, d): ordered choices by position, categorical ones as indicators."""
    ordered = np.array([choice.ordered for choice in space.choices.values()])
    position = space.encode(X, kind="ordinal")[:, ordered]
    marks = [name.rpartition("=")[0] for name in space.feature_names()]
    categorical = {name for name, choice in space.choices.items() if not choice.ordered}
    at = np.array([mark in categorical for mark in marks], dtype=bool)
    # Two categories are as far apart as the two ends of an ordered choice.
    return np.column_stack([position, space.encode(X)[:, at] / np.sqrt(2)])


def _shares(space: SearchSpace, X: Indices) -> dict[str, dict[Value, float]]:
    """Return the share of each distinct value among the rows in which its choice exists."""
    exists = space.active(X)
    shares: dict[str, dict[Value, float]] = {}
    for j, (name, values) in enumerate(space.values.items()):
        choice = space.choices[name]
        at: npt.NDArray[np.int64] = X[exists[:, j], j]
        shares[name] = {
            value: float((at == i).mean()) if len(at) else 0.0
            for i, value in enumerate(choice.values)
            if value in values and choice.representative(i) == i
        }
    return shares
