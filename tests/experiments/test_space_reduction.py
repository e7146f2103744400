# SPDX-License-Identifier: Apache-2.0
"""Space reduction: what is dropped, what must stay, and searches in what is left."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lightning_subnet import FunctionEvaluator, SearchResult, SearchSpace, SubnetSearch
from lightning_subnet.errors import ReductionWarning, SearchError, StrategyError, SubnetError
from lightning_subnet.experiments.space_reduction import reduce_space, reduction
from lightning_subnet.study.additive import Term, additive_measure
from tests.problems import assert_clear, conditional, grid, history_of, numpy_state, problem_of
from tests.spaces import ofa_mobilenet_v3

SPACE = ofa_mobilenet_v3()
RNG = np.random.default_rng(0)
GOOD = RNG.integers(0, 3, size=45)  # the values that pay off, one of each choice


def measured(subnet: Any) -> dict[str, float]:
    """Accuracy grows with values near the good ones; cost with all values."""
    row = subnet.indices
    active = SPACE.active(row[None])[0]
    return {
        "error": float((np.abs(row - GOOD) * active).sum()),
        "size": float((row * active).sum() + active.sum()),
    }


@pytest.fixture(scope="module")
def result() -> SearchResult:
    search = SubnetSearch(
        space=SPACE,
        objectives={"error": "min", "size": "min"},
        strategy="nsga2",
        budget=300,
        storage=None,
    )
    return search.run(FunctionEvaluator(measured), progress=False)


@pytest.fixture(scope="module")
def reduced(result: SearchResult) -> Any:
    return reduction(result, samples=6000)


def test_rare_values_go_and_the_front_stays(result: SearchResult, reduced: Any) -> None:
    assert reduced.dropped
    assert reduced.space.size < SPACE.size / 10
    assert all(e.subnet in reduced.space for e in result.front)
    for name, values in reduced.dropped.items():
        assert all(reduced.shares[name][v] < 0.01 for v in values)
        assert set(reduced.space.values[name]) == set(SPACE.values[name]) - set(values)
    frame = reduced.to_dataframe()
    assert len(frame) == 135
    assert (~frame.kept).sum() == sum(map(len, reduced.dropped.values()))
    # What is kept and rare is there for the front, which the report says.
    totals = frame.groupby("choice").share.sum()
    absent = totals.index[totals == 0]  # those that exist in no clustered subnet keep their values
    assert {name.split(".")[0] for name in absent} <= {"ks", "e"}
    np.testing.assert_allclose(totals[totals > 0], 1.0)
    rare = frame[(frame.share < 0.01) & frame.kept & ~frame.choice.isin(absent)]
    assert all(row.value in reduced.rescued[row.choice] for row in rare.itertuples())
    name = next(iter(reduced.dropped))
    assert f"{name}: dropped" in str(reduced)
    assert f"{reduced.clusters} clusters" in str(reduced)


def test_without_the_front_the_rule_is_the_published_one(result: SearchResult) -> None:
    kept, published = (reduction(result, samples=0, keep_front=flag) for flag in (True, False))
    rare = {
        (name, value)
        for name, shares in published.shares.items()
        for value, share in shares.items()
        if share < 0.01 and sum(shares.values()) > 0
    }
    assert {(n, v) for n, values in published.dropped.items() for v in values} == rare
    assert published.rescued == {}
    assert {(n, v) for part in (kept.dropped, kept.rescued) for n, vs in part.items() for v in vs} \
        == rare  # fmt: skip


def test_it_depends_on_its_arguments_alone(result: SearchResult, reduced: Any) -> None:
    state = numpy_state()
    assert reduction(result, samples=6000).space == reduced.space
    assert numpy_state() == state


def test_a_search_in_the_reduced_space_is_stored_and_resumed(reduced: Any, tmp_path: Any) -> None:
    assert reduced.dropped

    def search(space: SearchSpace, budget: int) -> SubnetSearch:
        term = Term(("ks.0",), np.array([1.0, 2.0, 3.0]))
        return SubnetSearch(
            space=space,
            objectives={"error": "min", "kernel": "min"},
            measures=[additive_measure("kernel", SPACE, [term])],
            strategy="nsga2",
            budget=budget,
            storage=f"sqlite:///{tmp_path}/s.db",
            name="reduced",
        )

    evaluator = FunctionEvaluator(lambda s: {"error": measured(s)["error"]})
    search(reduced.space, 60).run(evaluator, progress=False)
    again = search(SearchSpace.from_json(reduced.space.to_json()), 80)
    result = again.run(evaluator, progress=False)
    assert len(result.history) == 80
    assert all(e.subnet in reduced.space for e in result.history)
    # A measure of indices is asked in the indices that it was made for.
    assert all(e.values["kernel"] == (e.subnet["ks.0"] - 1) / 2 for e in result.history)
    with pytest.raises(SubnetError, match="values"):
        search(SPACE.narrowed_to({"d.0": [2, 3]}), 80)


def test_histories_and_pools_are_clustered_as_they_are(result: SearchResult) -> None:
    by_history = reduction(result.final)
    assert by_history.archive == 300
    pool = SPACE.restricted_to(result.final.indices)
    by_pool = reduction(pool)
    assert by_pool.whole == SPACE
    assert by_pool.dropped == by_history.dropped
    alone = reduction(result, samples=0)
    assert alone.shares == by_history.shares
    assert all(e.subnet in alone.space for e in result.front)


def test_conditions_survive(result: SearchResult) -> None:
    space = conditional()
    # Two dense groups, neither of them with depth 4 or ks.0 = 3.
    rows = [[0, 1, j, 0, 0] for j in range(3)] + [[1, 2, i, j, 0] for i in range(3) for j in (0, 1)]
    history = history_of(problem_of(space), space.from_indices(np.array(rows)))
    with pytest.raises(SearchError, match="at least 10"):
        reduce_space(history)
    rows += [[1, 2, 0, 2, 0], [1, 2, 1, 2, 0]]
    history = history_of(problem_of(space), space.from_indices(np.array(rows)))
    part = reduce_space(history, min_cluster_size=3, min_samples=2)
    assert part.values["depth"] == (2, 3)
    assert part.values["ks.0"] == (5, 7)
    assert all(s.active.keys() <= {"depth", "ks.0", "ks.1", "ks.2"} for s in part)
    assert all(s in space for s in part)


def test_nothing_dropped_says_so() -> None:
    space = grid(3, 3)
    history = history_of(problem_of(space), space)
    for call in (reduce_space, lambda archive: reduction(archive).space):
        with pytest.warns(ReductionWarning, match="stays as it is") as caught:
            assert call(history) is space
        assert caught[0].filename == __file__
    lattice = grid(40, 4)
    noise = history_of(problem_of(lattice), lattice.sample(60, rng=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReductionWarning)
        with pytest.raises(ReductionWarning):
            reduce_space(noise, min_cluster_size=59)


BAD: list[tuple[Callable[[], Any], type[SubnetError], str]] = [
    (lambda: reduce_space(grid()), SearchError, "restricted_to"),
    (lambda: reduce_space([1, 2]), SearchError, "[1, 2]"),  # type: ignore[arg-type] # the point
    (lambda: reduce_space(history_of(problem_of(grid()), [])), SearchError, "0 measured"),
    (lambda: reduce_space(grid(), min_share=2.0), StrategyError, "min_share=2.0"),
    (lambda: reduce_space(grid(), samples=-1), StrategyError, "samples"),
    (lambda: reduce_space(grid(), min_samples=0), StrategyError, "min_samples=0"),
]


@pytest.mark.parametrize(("call", "error", "part"), BAD)
def test_bad_archives_and_options(
    call: Callable[[], Any], error: type[SubnetError], part: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert_clear(caught.value, part)


def test_a_pool_of_three_says_nothing_of_where_good_subnets_lie() -> None:
    space = SearchSpace({f"x.{i}": range(4) for i in range(6)})
    with pytest.raises(SearchError, match="has 3 measured subnets"):
        reduce_space(space.restricted_to(space.sample(3, rng=0)))
