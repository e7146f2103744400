# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_subnet import (
    Budget,
    Choice,
    FunctionEvaluator,
    SearchSpace,
    Subnet,
    SubnetSearch,
    measure,
)
from lightning_subnet.errors import (
    InvalidSubnetError,
    MeasurementError,
    ObjectiveError,
    SearchError,
    SpaceError,
    StorageError,
    StrategyError,
    StudyMismatchError,
    SubnetError,
    TellError,
    VersionWarning,
)
from lightning_subnet.strategies import NSGA2, RandomSearch
from tests.problems import (
    Counting,
    assert_clear,
    conditional,
    cost,
    grid,
    objectives_of,
    record,
    search_of,
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/search.db"


def ask_and_tell(search: SubnetSearch, n: int = 1) -> list[dict[str, Any]]:
    while subnets := search.ask(n):
        for subnet in subnets:
            search.tell(subnet, objectives_of(subnet))
    return record(search.history)


# Three ways to run, the same evaluations


@pytest.mark.parametrize("strategy", ["random", NSGA2(population=7), RandomSearch(batch_size=5)])
def test_ask_tell_and_run_make_the_same_evaluations(strategy: Any) -> None:
    def search() -> SubnetSearch:
        return search_of(space=conditional(), strategy=strategy, budget=40, seed=4)

    by_run = record(search().run(Counting(), progress=False).history)
    assert len(by_run) == 40
    assert ask_and_tell(search(), 1) == by_run
    assert ask_and_tell(search(), 3) == by_run


def test_seeds_make_different_searches() -> None:
    subnets = [
        [e.subnet for e in search_of(seed=seed).run(Counting(), progress=False).history]
        for seed in (0, 1, np.int64(0))
    ]
    assert subnets[0] != subnets[1]
    assert subnets[0] == subnets[2]


def test_values_may_be_a_mapping_or_keywords_or_both() -> None:
    search = search_of()
    a, b, c = search.ask(3)
    assert search.tell(a, {"f0": 1, "f1": 2}).values == {"f0": 1.0, "f1": 2.0}
    assert search.tell(b, f0=1, f1=2).values == {"f0": 1.0, "f1": 2.0}
    assert search.tell(c, {"f0": 1}, f1=2).values == {"f0": 1.0, "f1": 2.0}


def test_a_search_ends_when_the_space_is_exhausted() -> None:
    result = search_of(budget=1000).run(Counting(), progress=False)
    assert {e.subnet for e in result.history} == set(grid())
    assert len(result.history) == 25


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", ["random", "nsga2", "u-nsga3", "sms-emoa"])
def test_one_to_four_objectives(m: int, strategy: str) -> None:
    directions = {f"f{k}": "max" if k % 2 else "min" for k in range(m)}
    search = search_of(space=grid(3, 4), objectives=directions, strategy=strategy, budget=64)
    result = search.run(Counting(m), progress=False)
    assert len(result.history) == 64, "the whole space"
    # The front by definition: nobody is as good in all objectives and better in one.
    values = {
        e.number: [objectives_of(e.subnet, m)[k] * (-1) ** i for i, k in enumerate(directions)]
        for e in result.history
    }
    front = {
        number
        for number, mine in values.items()
        if not any(
            all(b <= a for a, b in zip(mine, other, strict=True)) and other != mine
            for other in values.values()
        )
    }
    assert {e.number for e in result.front} == front
    assert front


def test_all_objectives_may_be_exact() -> None:
    @measure("other", exact=True)
    def other(subnets: Any) -> Any:
        return [(4 - s["x.0"]) ** 2 for s in subnets]

    search = search_of(objectives={"cost": "min", "other": "min"}, measures=[cost, other], budget=9)
    result = search.run(progress=False)
    assert len(result.history) == 9, "proposals count"
    assert all(set(e.values) == {"cost", "other"} for e in result.history)


def test_warm_start_is_measured_first_and_counts() -> None:
    front = [grid().largest, grid().smallest]
    for start in (front, iter(front), [dict(s) for s in front]):
        search = search_of(warm_start=start, budget=4)
        again = search.replace(seed=1)
        for one in (search, again):
            history = one.run(Counting(), progress=False).history
            assert [e.subnet for e in history[:2]] == front
            assert len(history) == 4


def test_history_is_empty_before_the_first_ask_and_nothing_is_written(tmp_path: Path) -> None:
    search = search_of(storage=f"sqlite:///{tmp_path}/s.db")
    assert len(search.history) == 0
    assert search.space == grid()
    assert not list(tmp_path.iterdir())
    search.ask()
    assert list(tmp_path.iterdir())


# Constraints


def test_an_exact_constraint_relative_to_the_largest_subnet_is_kept_by_every_proposal() -> None:
    # cost of the largest subnet: 1 + 2 + 4 * 2 = 11
    for strategy in ("random", NSGA2(population=5)):
        search = search_of(
            space=conditional(),
            measures=[cost],
            objectives={"f0": "min", "f1": "min"},
            constraints={"cost": "<= 60%"},
            strategy=strategy,
            budget=30,
        )
        history = search.run(Counting(), progress=False).history
        assert len(history) == 30
        assert max(e.values["cost"] for e in history) <= 6.6
        assert conditional().largest not in history, "an exact reference costs nothing"


def test_a_measured_relative_constraint_measures_the_largest_subnet_first() -> None:
    search = search_of(
        space=conditional(),
        objectives={"f1": "min"},
        constraints={"f0": "<= 60%"},
        strategy=NSGA2(population=10),
        budget=60,
    )
    result = search.run(Counting(), progress=False)
    reference = result.history[0]
    assert reference.subnet == conditional().largest
    assert reference.generation == 0
    assert len(result.history) == 60, "and it counts"
    bound = 0.6 * reference.values["f0"]
    allowed = [e for e in result.history if e.values["f0"] <= bound]
    assert 0 < len(allowed) < 60
    assert result.best("f1") == min(allowed, key=lambda e: e.values["f1"])
    assert all(e.values["f0"] <= bound for e in result.front)


def test_asking_before_the_reference_is_told_says_what_to_do() -> None:
    search = search_of(constraints={"f0": "<= 60%"})
    subnets = search.ask(5)
    assert subnets == [grid().largest]
    with pytest.raises(ObjectiveError) as caught:
        search.ask()
    assert_clear(caught.value, "'f0'", "relative to the largest subnet", "tell space.largest first")
    search.tell(subnets[0], objectives_of(subnets[0]))
    assert len(search.ask(3)) == 3


def test_a_reference_that_is_told_may_be_of_any_run() -> None:
    search = search_of(constraints={"f0": "<= 60%"})
    search.tell(grid().largest, objectives_of(grid().largest))
    assert len(search.ask(3)) >= 1


def test_a_reference_that_failed_ends_the_search_with_a_reason() -> None:
    def fails(subnet: Subnet) -> dict[str, float]:
        if subnet == grid().largest:
            msg = "out of memory"
            raise RuntimeError(msg)
        return objectives_of(subnet)

    search = search_of(constraints={"f0": "<= 60%"})
    with pytest.raises(ObjectiveError) as caught:
        search.run(FunctionEvaluator(fails), progress=False)
    assert_clear(caught.value, "'f0'", "largest subnet", "absolute bound")
    assert [e.reason for e in search.history] == ["RuntimeError: out of memory"]


def test_several_bounds_on_one_measure() -> None:
    search = search_of(
        measures=[cost],
        constraints={"cost": [">= 3", "<= 50%", "<= 4"], "f0": ">= 0"},
        budget=5,
    )
    costs = {e.values["cost"] for e in search.run(Counting(), progress=False).history}
    assert costs <= {3.0, 4.0}


# Resume


def straight(**settings: Any) -> list[dict[str, Any]]:
    return record(search_of(**settings).run(Counting(), progress=False).history)


GROWING: dict[str, Any] = {"space": grid(4, 4), "strategy": NSGA2(population=12), "seed": 2}


@pytest.mark.parametrize("first", [1, 12, 13, 40])
def test_a_budget_may_grow(url: str, first: int) -> None:
    for budget in (first, 80):
        search = search_of(**GROWING, storage=url, name="a", budget=budget)
        search.run(Counting(), progress=False)
        assert len(search.history) == budget
    assert record(search.history) == straight(**GROWING, budget=80)


def test_a_budget_may_grow_in_ask_and_tell(url: str) -> None:
    ask_and_tell(search_of(**GROWING, storage=url, name="a", budget=40), 3)
    history = ask_and_tell(search_of(**GROWING, storage=url, name="a", budget=80), 3)
    assert history == straight(**GROWING, budget=80)


def test_a_finished_study_makes_nothing_more(url: str) -> None:
    settings = {**GROWING, "storage": url, "name": "a"}
    search_of(**settings, budget=20).run(Counting(), progress=False)
    for budget in (20, 5):
        evaluator = Counting()
        result = search_of(**settings, budget=budget).run(evaluator, progress=False)
        assert len(result.history) == 20
        assert not evaluator.calls


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MeasurementError])
def test_an_interrupted_run_goes_on_where_it_was(error: type[BaseException], url: str) -> None:
    class Interrupted(Counting):
        def evaluate(self, subnet: Subnet) -> Any:
            if len(self.calls) == 7:
                self.calls.append(subnet)
                raise error
            return super().evaluate(subnet)

    search = search_of(**GROWING, storage=url, name="a", budget=30)
    evaluator = Interrupted()
    with pytest.raises(error):
        search.run(evaluator, progress=False)
    assert len(search.history) == 7
    search.run(evaluator, progress=False)  # in the same process, on the same object
    assert record(search.history) == straight(**GROWING, budget=30)
    assert record(search_of(**GROWING, storage=url, name="a").history) == record(search.history)


def test_history_is_there_on_construction(url: str) -> None:
    search_of(storage=url, name="a").run(Counting(), progress=False)
    assert len(search_of(storage=url, name="a").history) == 6
    assert len(search_of(storage=url, name="b").history) == 0
    assert len(search_of(storage=url).history) == 0, "without a name a study is new each time"


def test_resume_auto_must_and_never(url: str) -> None:
    with pytest.raises(SearchError) as caught:
        search_of(storage=url, name="study", resume="must")
    assert_clear(caught.value, "no study 'study'", url, "resume='must'", "nothing")
    search_of(storage=url, name="study", resume="never").run(Counting(), progress=False)
    assert len(search_of(storage=url, name="study", resume="must").history) == 6
    assert len(search_of(storage=url, name="study", resume="auto").history) == 6
    with pytest.raises(SearchError) as caught:
        search_of(storage=url, name="study", resume="never")
    assert_clear(caught.value, "'study' exists", url, "another name=")
    with pytest.raises(SearchError) as caught:
        search_of(storage=url, name="studi", resume="must")
    assert_clear(caught.value, "no study 'studi'", "Did you mean 'study'?")
    with pytest.raises(SearchError) as caught:
        search_of(storage=url, resume="must")
    assert_clear(caught.value, "resume='must'", "name=")


def other_measure(fingerprint: str | None, *, exact: bool = True) -> Any:
    return measure("cost", exact=exact, fingerprint=fingerprint)(
        lambda subnets: [1.0 for _ in subnets]
    )


DIFFERENCES: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({"seed": 1}, {"seed": 2}, ("seed: stored 1, now 2",)),
    ({}, {"strategy": "nsga2"}, ('strategy.name: stored "random", now "nsga2"',)),
    (
        {"strategy": NSGA2(population=10)},
        {"strategy": NSGA2(population=20)},
        ("strategy.population: stored 10, now 20",),
    ),
    ({}, {"objectives": {"f0": "min", "f1": "max"}}, ('objectives.f1: stored "min", now "max"',)),
    ({}, {"objectives": {"f0": "min"}}, ('objectives.f1: stored "min", now nothing',)),
    (
        {"constraints": {"f0": "<= 1", "f1": "<= 3.0000001"}},
        {"constraints": {"f0": "<= 1", "f1": "<= 3.0000002"}},
        ("constraints[1].bound: stored 3.0000001, now 3.0000002",),
    ),
    (
        {"space": SearchSpace(a=range(40), b=[1, 2])},
        {"space": SearchSpace(a=[*range(39), 77], b=[1, 2])},
        ("space.a.values[39]: stored 39, now 77",),
    ),
    ({}, {"space": grid(3)}, ("space.x.2: stored nothing",)),
    (
        {},
        {"space": grid(2, 4)},
        ("space.x.0.values: stored [0, 1, 2, 3, 4], now [0, 1, 2, 3]",),
    ),
    ({}, {"space": grid().restricted_to(grid().sample(9, rng=0))}, ("pool: stored null, now",)),
    ({}, {"warm_start": [grid().largest]}, ("warm_start: stored []",)),
    (
        {"measures": [other_measure("v1")]},
        {"measures": [other_measure("v2")]},
        ('measures.cost.fingerprint: stored "v1", now "v2"',),
    ),
    (
        {"measures": [other_measure(None)]},
        {"measures": [other_measure(None, exact=False)]},
        ("measures.cost.exact: stored true, now false",),
    ),
]


@pytest.mark.parametrize(("stored", "now", "parts"), DIFFERENCES)
def test_a_study_of_other_settings_is_refused_with_the_difference(
    url: str, stored: dict[str, Any], now: dict[str, Any], parts: tuple[str, ...]
) -> None:
    search = search_of(**stored, storage=url, name="a")
    search.tell(search.ask()[0], f0=0.5, f1=1)
    for settings in (now, stored | now):
        if settings == stored:
            continue
        with pytest.raises(StudyMismatchError) as caught:
            search_of(**settings, storage=url, name="a")
        assert_clear(caught.value, "'a'", url, "Restore them", "another name=")
    assert_clear(caught.value, *parts)
    assert len(search_of(**stored, storage=url, name="a").history) == 1, "nothing is lost"


def test_a_study_may_be_resumed_with_another_budget(url: str) -> None:
    first = search_of(storage=url, name="a").ask()
    for budget in (1, 1000, Budget(seconds=60)):
        assert search_of(storage=url, name="a", budget=budget).ask() == first


def test_other_versions_warn_once_and_can_be_silenced(url: str, tmp_path: Path) -> None:
    search_of(storage=url, name="a").ask()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_of(storage=url, name="a").ask()
    connection = sqlite3.connect(tmp_path / "search.db")
    with connection:
        connection.execute(
            """UPDATE subnet_study SET versions = json_set(
            versions, '$.numpy', '1.0', '$.forgotten', '7')"""
        )
    connection.close()
    with pytest.warns(VersionWarning) as caught:
        search_of(storage=url, name="a").ask()
    assert len(caught) == 1
    assert_clear(caught[0].message, "'a'", f"numpy 1.0 -> {np.__version__}", "VersionWarning")
    assert caught[0].filename == __file__ or Path(caught[0].filename).name == "problems.py"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", VersionWarning)
        search_of(storage=url, name="a").ask()


# Reuse


def test_values_of_equal_fingerprint_are_reused_and_count(url: str) -> None:
    everything = Counting(fingerprint="weights-1")
    search_of(storage=url, name="a", seed=0, budget=15).run(everything, progress=False)
    evaluator = Counting(fingerprint="weights-1")
    result = search_of(storage=url, name="b", seed=1, budget=15).run(evaluator, progress=False)
    assert len(result.history) == 15, "reused values count towards the budget"
    reused = {e.subnet for e in result.history if e.reused}
    assert reused == {e.subnet for e in result.history} & set(everything.calls)
    assert 0 < len(reused) < 15
    assert set(evaluator.calls) == {e.subnet for e in result.history} - reused
    assert all(e.values == objectives_of(e.subnet) for e in result.history)
    assert all(e.reused == ("f0", "f1") for e in result.history if e.subnet in reused)


@pytest.mark.parametrize("fingerprint", ["weights-2", None])
def test_values_of_another_fingerprint_or_none_are_measured_anew(
    url: str, fingerprint: str | None
) -> None:
    for name in ("a", "b"):
        evaluator = Counting(fingerprint=fingerprint if name == "b" else "weights-1")
        search_of(storage=url, name=name).run(evaluator, progress=False)
        assert len(evaluator.calls) == 6


def test_a_search_with_reused_values_makes_the_same_evaluations(url: str) -> None:
    settings: dict[str, Any] = {
        "space": conditional(),
        "strategy": NSGA2(population=8),
        "budget": 40,
    }
    search_of(**settings, storage=url, name="a").run(Counting(fingerprint="w"), progress=False)
    evaluator = Counting(fingerprint="w")
    reused = search_of(**settings, storage=url, name="b").run(evaluator, progress=False).history
    assert not evaluator.calls
    alone = search_of(**settings).run(Counting(), progress=False).history
    assert [(e.subnet, e.values) for e in reused] == [(e.subnet, e.values) for e in alone]


def test_failures_are_not_reused(url: str) -> None:
    def fails(subnet: Subnet) -> dict[str, float]:
        msg = "out of memory"
        raise RuntimeError(msg)

    search_of(storage=url, name="a").run(FunctionEvaluator(fails, fingerprint="w"), progress=False)
    evaluator = Counting(fingerprint="w")
    result = search_of(storage=url, name="b").run(evaluator, progress=False)
    assert len(evaluator.calls) == 6
    assert all(e.ok for e in result.history)


# replace


def test_replace_keeps_everything_else() -> None:
    search = search_of(
        constraints={"f0": "<= 3"},
        measures=[cost],
        strategy="nsga2",
        seed=7,
        warm_start=[grid().largest],
    )
    other = search.replace(seed=8, budget=11)
    assert (other.seed, other.budget) == (8, Budget(11))
    assert (search.seed, search.budget) == (7, Budget(6))
    for name in ("constraints", "measures", "strategy", "warm_start", "space", "objectives"):
        same = getattr(other.plan, name), getattr(search.plan, name)
        assert same[0] == same[1] or repr(same[0]) == repr(same[1])


def test_replace_names_what_is_no_setting() -> None:
    with pytest.raises(SearchError) as caught:
        search_of().replace(sead=1)
    assert_clear(caught.value, "'sead'", "Did you mean 'seed'?")


# profile


def test_profile_says_what_is_possible_before_any_budget_is_spent(tmp_path: Path) -> None:
    search = search_of(
        storage=f"sqlite:///{tmp_path}/s.db", measures=[cost], constraints={"cost": "<= 0.5"}
    )
    profile = search.profile()
    assert not profile.satisfiable
    assert profile.nearest == grid().smallest
    assert not list(tmp_path.iterdir())


# Bad input: one clear error before anything is spent


def settings(**changes: Any) -> Callable[[], Any]:
    return lambda: search_of(**changes).ask()


BAD: list[tuple[str, Callable[[], Any], type[SubnetError], tuple[str, ...]]] = [
    ("no value", lambda: SearchSpace(a=[1, 2], b=[]), SpaceError, ("'b'", "no values")),
    ("one subnet", lambda: SearchSpace(a=[1]), SpaceError, ("single subnet", "a=1", "two values")),
    ("no choice", lambda: SearchSpace({}), SpaceError, ("at least one choice",)),
    (
        "later condition",
        lambda: SearchSpace({"a": Choice([1, 2], when={"b": [1]}), "b": [1, 2]}),
        SpaceError,
        ("'a'", "'b'", "put 'b' before 'a'"),
    ),
    (
        "unknown condition",
        lambda: SearchSpace({"depth": [1, 2], "a": Choice([1, 2], when={"dept": [1]})}),
        SpaceError,
        ("'dept'", "Did you mean 'depth'?"),
    ),
    ("space", settings(space={"a": [1, 2]}), SearchError, ("{'a': [1, 2]}", "SearchSpace({...})")),
    ("no space", settings(space=None), SearchError, ("no space", "space=SearchSpace")),
    ("budget 0", settings(budget=0), SearchError, ("evaluations=0", "whole number from 1")),
    ("budget text", settings(budget="many"), SearchError, ("'many'", "whole number from 1")),
    ("seed", settings(seed=-1), SearchError, ("seed=-1", "whole number from 0")),
    ("seed float", settings(seed=0.5), SearchError, ("seed=0.5", "whole number from 0")),
    ("resume", settings(resume="maybe"), SearchError, ("'maybe'", "'auto'", "'must'", "'never'")),
    ("no objective", settings(objectives={}), ObjectiveError, ("{}", "objectives={")),
    ("objective list", settings(objectives=["f0"]), ObjectiveError, ("['f0']", "objectives={")),
    (
        "direction",
        settings(objectives={"f0": "maxi"}),
        ObjectiveError,
        ("'f0'", "'maxi'", "'min' or 'max'", "Did you mean 'max'?"),
    ),
    (
        "constraint text",
        settings(constraints={"f0": "< 3"}),
        ObjectiveError,
        ("'f0'", "'< 3'", "'<= 3e8'"),
    ),
    (
        "constraint number",
        settings(constraints={"f0": 3}),
        ObjectiveError,
        ("'f0'", "3", "'<= 3e8'"),
    ),
    ("constraint list", settings(constraints=["f0 <= 3"]), ObjectiveError, ("f0 <= 3", "mapping")),
    (
        "contradiction",
        settings(constraints={"f0": ["<= 1", ">= 2"]}),
        ObjectiveError,
        ("f0 >= 2", "f0 <= 1", "contradict", "Loosen"),
    ),
    (
        "contradiction of a share and a number",
        settings(measures=[cost], constraints={"cost": ["<= 50%", ">= 6"]}),
        ObjectiveError,
        ("cost >= 6", "cost <= 4.5", "contradict"),
    ),
    ("strategy", settings(strategy="nsga"), StrategyError, ("'nsga'", "Did you mean 'nsga2'?")),
    ("a class", settings(strategy="NSGA2"), StrategyError, ("'NSGA2'", "Did you mean 'nsga2'?")),
    ("another", settings(strategy="FullSearch"), StrategyError, ("Did you mean 'full'?",)),
    ("capitals", settings(strategy="HYBRID"), StrategyError, ("Did you mean 'hybrid'?",)),
    ("strategy class", settings(strategy=NSGA2), StrategyError, ("add ()", "'nsga2'")),
    ("strategy none", settings(strategy=None), StrategyError, ("None", "'nsga2'")),
    ("measure", settings(measures=[len]), ObjectiveError, ("len", "@measure(name)")),
    ("measures twice", settings(measures=[cost, cost]), ObjectiveError, ("'cost'", "its own name")),
    (
        "warm start of another space",
        settings(warm_start=[grid(3).largest]),
        InvalidSubnetError,
        ("x.2",),
    ),
    (
        "warm start outside the pool",
        settings(
            space=grid().restricted_to(grid().neighbours(grid().smallest)),
            warm_start=[grid().largest],
        ),
        InvalidSubnetError,
        (str(grid().largest), "pool"),
    ),
    ("storage", settings(storage="search.db"), StorageError, ("'search.db'", "sqlite:///")),
    (
        "evaluator",
        lambda: search_of().run(objectives_of, progress=False),
        SearchError,
        ("objectives_of", "FunctionEvaluator(fn)"),
    ),
    (
        "no evaluator",
        lambda: search_of().run(progress=False),
        SearchError,
        ("'f0'", "evaluator", "measures="),
    ),
]


@pytest.mark.parametrize(("make", "error", "parts"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_settings_give_one_clear_error(
    make: Callable[[], Any], error: type[SubnetError], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        make()
    assert_clear(caught.value, *parts)


WRONG: list[
    tuple[str, Callable[[SubnetSearch, Subnet], Any], type[SubnetError], tuple[str, ...]]
] = [
    ("twice", lambda s, _: s.tell(s.history[0].subnet, f0=1, f1=1), TellError, ("evaluation 0",)),
    ("missing measure", lambda s, x: s.tell(x, f0=1), TellError, ("'f1' is missing",)),
    ("unknown measure", lambda s, x: s.tell(x, f0=1, f1=1, g=1), TellError, ("'g'", "'f0', 'f1'")),
    ("text", lambda s, x: s.tell(x, f0="0.5", f1=1), TellError, ("'0.5'", "Tell a number")),
    ("values that are no mapping", lambda s, x: s.tell(x, 0.5), TellError, ("0.5", "by name")),
    ("values that are a text", lambda s, x: s.tell(x, "f0"), TellError, ("'f0'", "by name")),
    ("no subnet", lambda s, _: s.tell("x", f0=1, f1=1), InvalidSubnetError, ("'x'", "by name")),
    ("a list", lambda s, _: s.tell([1, 2], f0=1, f1=1), InvalidSubnetError, ("[1, 2]", "by name")),
    (
        "unknown name",
        lambda s, _: s.tell({"x.0": 1, "x.1": 1, "y": 1}, f0=1, f1=1),
        InvalidSubnetError,
        ("'y' is not a choice",),
    ),
    (
        "unknown value",
        lambda s, _: s.tell({"x.0": 1, "x.1": 9}, f0=1, f1=1),
        InvalidSubnetError,
        ("'x.1' cannot be 9", "0, 1, 2, 3, 4"),
    ),
    (
        "another space",
        lambda s, _: s.tell(conditional().largest, f0=1, f1=1),
        InvalidSubnetError,
        ("is not a choice of this space",),
    ),
    ("fail of nothing", lambda s, _: s.fail({}, "x"), InvalidSubnetError, ("'x.0' is missing",)),
    ("ask 0", lambda s, _: s.ask(0), SearchError, ("n=0", "ask(n)")),
    (
        "evaluator without an objective",
        lambda s, _: s.run(FunctionEvaluator(lambda x: {"f0": 1.0}), progress=False),
        MeasurementError,
        ("no 'f1'", "'f0'"),
    ),
    (
        "evaluator that returns a number",
        lambda s, _: s.run(FunctionEvaluator(lambda x: 1.0), progress=False),
        MeasurementError,
        ("returned 1.0", "by name"),
    ),
    (
        "evaluator that returns a text",
        lambda s, _: s.run(FunctionEvaluator(lambda x: {"f0": "a", "f1": 1}), progress=False),
        TellError,
        ("'f0'", "'a'", "number"),
    ),
]


@pytest.mark.parametrize(
    ("do", "error", "parts"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_an_error_within_a_search_loses_nothing(
    url: str,
    do: Callable[[SubnetSearch, Subnet], Any],
    error: type[SubnetError],
    parts: tuple[str, ...],
) -> None:
    def fresh(storage: str | None) -> SubnetSearch:
        return search_of(storage=storage, name="a", strategy=NSGA2(population=3), budget=12)

    search = fresh(url)
    for _ in range(5):
        for subnet in search.ask(1):
            search.tell(subnet, objectives_of(subnet))
    pending = search.ask(1)[0]
    before = record(search.history)
    with pytest.raises(error) as caught:
        do(search, pending)
    assert_clear(caught.value, *parts)
    assert record(search.history) == before
    assert record(fresh(url).history) == before, "what was measured is in the storage"
    search.tell(pending, objectives_of(pending))
    ask_and_tell(search)
    assert record(search.history) == ask_and_tell(fresh(None)), (
        "and the search goes on as if nothing was"
    )


def test_nan_is_a_recorded_failure(url: str) -> None:
    search = search_of(storage=url, name="a")
    subnet = search.ask()[0]
    evaluation = search.tell(subnet, f0=float("nan"), f1=2)
    assert evaluation.status == "failed"
    assert "f0 is nan" in evaluation.reason
    again = search_of(storage=url, name="a")
    assert record(again.history) == record(search.history)
    assert again.ask()[0] != subnet, "a failure is not measured again"


def test_a_subnet_that_was_never_asked_for_is_attached(url: str) -> None:
    attached = grid().subnet(x=[3, 1])
    search = search_of(storage=url, name="a", budget=4)
    search.tell(attached, f0=-1, f1=-1)
    ask_and_tell(search)
    assert len(search.history) == 5
    assert [e.generation for e in search.history] == [None, 0, 0, 0, 0]
    assert [e.subnet for e in search.result().front] == [attached]
    assert search_of(storage=url, name="a", budget=4).ask() == []


def test_strategies_learn_from_what_is_attached() -> None:
    from tests.problems import history_of, problem_of

    plain = search_of(strategy=NSGA2(population=4), space=grid(4, 4), budget=8)
    informed = search_of(strategy=NSGA2(population=4), space=grid(4, 4), budget=8)
    for evaluation in history_of(problem_of(grid(4, 4)), grid(4, 4).sample(20, rng=0)):
        informed.tell(evaluation.subnet, objectives_of(evaluation.subnet))
    assert ask_and_tell(plain) != ask_and_tell(informed)[20:]


def test_an_exact_measure_that_fails_for_one_subnet_fails_that_subnet_alone() -> None:
    @measure("cost", exact=True)
    def cost(subnets: list[Subnet]) -> list[float]:
        if any(s["a"] == 2 for s in subnets):
            raise RuntimeError("no cost of two")
        return [float(s["a"]) for s in subnets]

    search = SubnetSearch(
        space=SearchSpace(a=[1, 2, 3, 4]),
        measures=cost,
        objectives={"error": "min"},
        constraints={"cost": "<= 3"},
        strategy="random",
        budget=4,
        storage=None,
    )
    result = search.run(FunctionEvaluator(lambda s: {"error": 1 / s["a"]}), progress=False)
    failed = [e for e in result.history if not e.ok]
    assert [e.subnet["a"] for e in failed] == [2]
    assert "no cost of two" in failed[0].reason
    assert {e.subnet["a"] for e in result.history[:2]} == {1, 3}


def test_names_that_tables_need_are_refused() -> None:
    with pytest.raises(SpaceError, match="'status' cannot be used"):
        SearchSpace(status=[1, 2])
    with pytest.raises(ObjectiveError, match="'a' is a choice of the space and a measure"):
        SubnetSearch(space=SearchSpace(a=[1, 2]), objectives={"a": "min"}, storage=None)
