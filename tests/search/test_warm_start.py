# SPDX-License-Identifier: Apache-2.0
"""Warm starts: from results and studies, from other spaces, and what a resume does with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_subnet import Choice, History, SearchSpace, SubnetSearch
from lightning_subnet.errors import SearchError, StudyMismatchError, SubnetError
from lightning_subnet.search.warm_start import projected, thinned_front, uncrowded
from lightning_subnet.strategies import LINAS, NSGA2, Hybrid
from lightning_subnet.strategies.base import fill, uniform_draws
from lightning_subnet.study.storage import Storage
from tests.problems import Counting, assert_clear, conditional, grid, history_of, record, search_of


def finished(storage: Any, *, name: str = "a", budget: int = 30, **settings: Any) -> Any:
    space = settings.pop("space", grid(4, 5))
    search = search_of(space=space, storage=storage, name=name, budget=budget, **settings)
    return search.run(Counting(), progress=False)


def subnets(result: Any) -> list[Any]:
    return [e.subnet for e in result.history]


@pytest.fixture
def storage() -> Storage:
    return Storage(None)


def test_the_front_of_a_result_and_of_its_study_are_measured_first(storage: Storage) -> None:
    first = finished(storage)
    front = [e.subnet for e in first.front]
    assert len(front) > 4
    wide = 5 * len(front)
    for start in (first, "a", ["a"], [first]):
        result = finished(Storage(None) if start is first else storage, name=f"b{id(start)}",
                          budget=wide, warm_start=start, seed=1)  # fmt: skip
        assert subnets(result)[: len(front)] == front
        assert len(result.history) == wide
    listed = finished(Storage(None), warm_start=first.front, budget=7)
    assert subnets(listed) == front[:7]


def test_a_long_front_is_thinned_to_a_fifth_of_the_budget(storage: Storage) -> None:
    first = finished(storage)
    thinned = thinned_front(first, 4, name="a")
    values = first.front.column("f0")
    front = [e.subnet for e in first.front]
    assert len(thinned) == 4
    assert [s for s in front if s in thinned] == thinned, "in order"
    assert {front[int(np.argmin(values))], front[int(np.argmax(values))]} <= set(thinned)
    result = finished(storage, name="b", budget=20, warm_start="a", seed=1)
    assert subnets(result)[:4] == thinned
    assert {e.generation for e in result.history[:4]} == {0}
    assert result.history[4].generation == 1


def test_a_front_under_a_bound_relative_to_a_subnet_that_is_not_on_it(storage: Storage) -> None:
    space = grid(4, 5)
    first = finished(storage, warm_start=[space.largest], constraints={"f0": "<= 60%"})
    front = [e.subnet for e in first.front]
    assert front
    assert space.largest not in front
    result = finished(storage, name="b", budget=5 * len(front), warm_start="a", seed=1)
    assert subnets(result)[: len(front)] == front


def test_a_study_in_another_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    first = finished(url)
    result = finished(None, budget=200, warm_start=(url, "a"), seed=1)
    assert subnets(result)[: len(first.front)] == [e.subnet for e in first.front]


def test_a_resume_goes_on_with_what_it_started_from(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    other = f"sqlite:///{tmp_path}/other.db"
    first = finished(url, strategy=NSGA2(population=8))
    settings = {"name": "b", "seed": 1, "strategy": NSGA2(population=4), "warm_start": "a"}
    whole = finished(other, budget=30, **{**settings, "warm_start": (url, "a")})
    finished(url, budget=12, **settings)
    grown = finished(url, strategy=NSGA2(population=8), budget=90)
    assert [e.subnet for e in grown.front] != [e.subnet for e in first.front]
    resumed = finished(url, budget=30, **settings)
    start = subnets(resumed)[:2]
    assert start == thinned_front(first, 2, name="a")  # 12 // 5, as it was then
    assert len(resumed.history) == 30
    assert subnets(whole)[:6] == thinned_front(first, 6, name="a")
    # The result of a search that has grown is the same source.
    again = finished(url, budget=30, **{**settings, "warm_start": grown})
    assert record(again.history) == record(resumed.history)
    # A source that is gone is not asked for.
    Storage(url).find_study("a").forget(whole=True)
    assert record(finished(url, budget=30, **settings).history) == record(resumed.history)
    for start in ((), grid(4, 5).largest, "b"):
        with pytest.raises(StudyMismatchError, match="warm_"):
            finished(url, budget=30, **{**settings, "warm_start": start and [start]})


def test_a_nameless_source_with_the_same_front_is_the_same(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    runs = []
    for budget in (10, 20):
        source = finished(None, name=None)  # another name each time
        runs.append(finished(url, name="b", budget=budget, warm_start=[source.front[0]]))
    assert len(runs[1].history) == 20
    sources = [finished(None, name=None) for _ in range(2)]
    finished(url, name="c", budget=20, warm_start=sources[0])
    assert len(finished(url, name="c", budget=20, warm_start=sources[1]).history) == 20


def test_projection_takes_what_agrees_and_the_largest_else() -> None:
    old = SearchSpace(depth=[2, 3], width=[8, 16], stem=Choice(["a", "b"], ordered=False))
    new = conditional()
    (subnet,) = projected(new, [old.subnet(depth=2, width=8, stem="a")])
    assert subnet == new.subnet({"depth": 2, "ks.0": 7, "ks.1": 7})
    (deeper,) = projected(new, [old.subnet(depth=3, width=8, stem="a")])
    assert deeper == new.subnet({"depth": 3, "ks.0": 7, "ks.1": 7, "ks.2": 7})
    part = new.narrowed_to({"depth": [3, 4], "ks.0": [3, 5]})
    (inside,) = projected(part, [new.subnet({"depth": 2, "ks.0": 7, "ks.1": 3})])
    assert inside == part.subnet({"depth": 3, "ks.0": 5, "ks.1": 3, "ks.2": 7})
    pool = new.restricted_to(new.sample(20, rng=0))
    inside_pool = projected(pool, new.sample(30, rng=1))
    assert inside_pool
    assert all(s in pool for s in inside_pool)
    assert len(set(inside_pool)) == len(inside_pool)


def test_a_front_of_another_space_starts_a_search(storage: Storage) -> None:
    first = finished(storage, space=grid(3, 4))
    result = finished(storage, name="b", budget=60, warm_start="a")
    start = projected(grid(4, 5), [e.subnet for e in first.front])
    assert subnets(result)[: len(start)] == start
    assert all(s["x.3"] == 4 for s in start)


def test_crowding_keeps_the_ends() -> None:
    x = np.array([0.0, 1.0, 1.01, 1.02, 2.0, 4.0])
    F = np.stack([x, 4 - x], axis=1)
    assert uncrowded(F, 6) == list(range(6))
    assert uncrowded(F, 4) == [0, 1, 4, 5] or uncrowded(F, 4) == [0, 3, 4, 5]
    assert {0, 5} <= set(uncrowded(F, 2))
    assert len(uncrowded(np.ones((5, 2)), 3)) == 3


@pytest.mark.parametrize("strategy", [Hybrid(first=8, batch_size=4), LINAS(population=8,
                         predictions=400), NSGA2(population=8)])  # fmt: skip
def test_strategies_learn_from_a_warm_start_at_once(strategy: Any, storage: Storage) -> None:
    """With as many evaluations as a first population, nothing is drawn at random."""
    first = finished(storage, budget=120)
    start = [e.subnet for e in first.history[:9]]
    settings = {"space": grid(4, 5), "budget": 20, "strategy": strategy, "storage": None}
    search = search_of(**settings, warm_start=start)
    history = search.run(Counting(), progress=False).history
    proposed = [e.subnet for e in history if e.generation == 1]
    known = History(history.space, history[:9])
    problem = search.result().problem
    drawn = fill(
        problem, known, (), len(proposed), np.random.default_rng([0, 1]), uniform_draws(problem)
    )
    assert len(proposed) >= 4
    assert not set(proposed) <= set(drawn)
    again = strategy.propose(problem, known, strategy.batch_size, np.random.default_rng([0, 1]))
    assert again == proposed, "a warm start is ordinary history"


def test_random_subnets_fill_the_population_that_a_warm_start_begins() -> None:
    """arXiv:2205.10358, algorithm 1: a first population is random, or a warm start."""
    space, strategy = grid(4, 5), LINAS(population=12, predictions=400)
    start = space.sample(5, rng=3)
    search = search_of(space=space, budget=30, strategy=strategy, warm_start=start)
    history = search.run(Counting(), progress=False).history
    sizes = np.bincount([e.generation for e in history]).tolist()
    assert sizes == [5, 7, 12, 6], "the third follows what was measured of a whole population"
    # While some are being measured they are part of it, and one that all failed is drawn anew.
    problem, rng = search.result().problem, np.random.default_rng(0)
    assert len(strategy.propose(problem, History(space, history[:5]), 12, rng, start[:0])) == 7
    pending = [e.subnet for e in history[5:9]]
    assert len(strategy.propose(problem, History(space, history[:5]), 12, rng, pending)) == 3
    assert len(strategy.propose(problem, History(space, history[:5]), 2, rng, pending)) == 2
    failed = history_of(problem, [e.subnet for e in history[:12]], failed=lambda number: True)
    assert len(strategy.propose(problem, failed, 12, rng)) == 12


def bad(**settings: Any) -> Callable[[], Any]:
    return lambda: search_of(**settings)


def test_bad_sources_fail_before_anything_is_spent(storage: Storage) -> None:
    finished(storage, name="cpu", budget=5)
    empty = search_of(storage=None, name="e")
    calls: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
        (bad(storage=storage, warm_start="cpi"), ("'cpi'", "Did you mean 'cpu'?")),
        (bad(storage=storage, space=None, warm_start="cpi"), ("'cpi'", "'cpu'")),
        (bad(warm_start=5), ("5", "names no subnets")),
        (bad(warm_start=[grid().largest, 5]), ("5", "names no subnets")),
        (bad(warm_start=empty.result()), ("no front", "0 evaluations")),
        (bad(space=SearchSpace(a=[1, 2]), warm_start=finished(None)), ("shares no choice", "'a'")),
    ]
    for call, parts in calls:
        with pytest.raises(SubnetError) as caught:
            call()
        assert_clear(caught.value, *parts)
    with pytest.raises(SearchError, match="no such study"):
        search_of(storage=storage, name="me", warm_start="me")


def test_predictors_report_on_expensive_measures(storage: Storage) -> None:
    search: SubnetSearch = search_of(space=grid(4, 5), budget=60, storage=storage, name="p")
    with pytest.raises(SearchError, match="no successful evaluation") as caught:
        search.predictors()
    assert_clear(caught.value, "'p'", "Run the search first")
    assert storage.study_names() == [], "looking creates nothing"
    with pytest.raises(SearchError, match="no successful evaluation"):
        search_of(space=None).predictors()
    search.run(Counting(), progress=False)
    frame = search.predictors()
    assert list(frame.index) == ["f0", "f1"]
    assert (frame.n == 60).all()
    assert (frame.tau > 0.8).all()  # squares of distances: smooth
    assert (frame.spread >= 0).all()
    again = search_of(space=grid(4, 5), budget=60, storage=storage, name="p").predictors()
    assert again.equals(frame)


def test_subnets_that_do_not_fit_are_left_out_of_a_front_that_does() -> None:
    old, new = SearchSpace(q=[1, 2, 3, 40]), SearchSpace(q=[1, 2, 3], w=[1, 2])
    with pytest.warns(UserWarning, match="leaves out 1 of 4 subnets"):
        fitting = projected(new, list(old))
    assert [subnet["q"] for subnet in fitting] == [1, 2, 3]
    with pytest.raises(SearchError, match=r"'q': \(1, 2, 3\)"):
        projected(new, [old.subnet(q=40)])
