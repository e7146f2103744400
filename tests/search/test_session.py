# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lightning_subnet import (
    Budget,
    Evaluator,
    FunctionEvaluator,
    History,
    Measure,
    Objective,
    Subnet,
    measure,
)
from lightning_subnet.errors import (
    MeasurementError,
    ObjectiveError,
    SearchError,
    SpaceExhausted,
    StrategyError,
    TellError,
)
from lightning_subnet.search.session import Session
from lightning_subnet.strategies import RandomSearch, Strategy
from lightning_subnet.study import Problem
from lightning_subnet.study.storage import Storage
from tests.problems import Counting, assert_clear, cost, grid, objectives_of, problem_of, record


class Scripted(Strategy):
    """Proposes the grid in its order, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size = batch_size
        self._asked: list[dict[str, Any]] = []

    def propose(
        self,
        problem: Problem,
        history: History,
        n: int,
        rng: np.random.Generator,
        pending: Sequence[Subnet] = (),
    ) -> list[Subnet]:
        self._asked.append(
            {"n": n, "draw": rng.random(), "measured": len(history), "pending": list(pending)}
        )
        left = [s for s in problem.space if s not in history and s not in pending]
        if not left:
            raise SpaceExhausted
        return left[:n]


def session_of(
    storage: Storage | None = None,
    *,
    strategy: Strategy | None = None,
    budget: Any = 100,
    constraints: Any = None,
    measures: Sequence[Measure] = (cost,),
    name: str = "a",
    **more: Any,
) -> Session:
    space = more.pop("space", None) or grid()
    exact = [m for m in measures if m.exact]
    problem = problem_of(space, constraints=constraints, exact=exact)
    study = (storage or Storage(None)).create_study(name, {}, space, {})
    return Session(
        problem,
        strategy or Scripted(),
        measures={m.name: m for m in measures},
        study=study,
        budget=Budget.of(budget),
        seed=more.pop("seed", 3),
        **more,
    )


def tell_all(session: Session, subnets: Sequence[Subnet]) -> None:
    for subnet in subnets:
        session.tell(subnet, objectives_of(subnet))


# Handing out


def test_a_generation_is_asked_of_the_strategy_once_and_served_in_order() -> None:
    strategy = Scripted(batch_size=4)
    session = session_of(strategy=strategy)
    everything = list(grid())
    assert session.ask(3) == everything[:3]
    assert session.ask(3) == everything[3:4], "what is left of the open generation"
    tell_all(session, everything[:4])
    assert session.ask(100) == everything[4:8]
    assert [asked["n"] for asked in strategy._asked] == [4, 4]
    assert [asked["measured"] for asked in strategy._asked] == [0, 4]
    assert [e.generation for e in session.history] == [0] * 4


def test_each_generation_draws_from_its_own_seeded_generator() -> None:
    strategy = Scripted(batch_size=2)
    session = session_of(strategy=strategy, seed=9)
    for _ in range(3):
        tell_all(session, session.ask(2))
    draws = [asked["draw"] for asked in strategy._asked]
    assert draws == [np.random.default_rng([9, g]).random() for g in range(3)]


def test_proposals_are_committed_before_the_first_is_handed_out() -> None:
    session = session_of(strategy=Scripted(batch_size=4))
    first = session.ask(1)
    assert session.study.generations(grid()) == [list(grid())[:4]]
    assert first == list(grid())[:1]


def test_pending_subnets_are_not_repeated_and_the_strategy_is_told_of_them() -> None:
    strategy = Scripted(batch_size=4)
    session = session_of(strategy=strategy)
    served: list[Subnet] = []
    while subnets := session.ask(3):
        served += subnets
    assert sorted(served, key=lambda s: s.key) == sorted(grid(), key=lambda s: s.key)
    assert [len(asked["pending"]) for asked in strategy._asked] == [0, 4, 8, 12, 16, 20, 24, 25]
    assert session.exhausted


def test_a_new_session_serves_what_was_committed_and_not_measured_first() -> None:
    storage = Storage(None)
    session = session_of(storage, strategy=Scripted(batch_size=6))
    subnets = session.ask(6)
    session.tell(subnets[1], objectives_of(subnets[1]))
    session.fail(subnets[4], "broken")
    strategy = Scripted(batch_size=6)
    again = session_of(storage, strategy=strategy)
    assert record(again.history) == record(session.history)
    assert again.ask(2) == [subnets[0], subnets[2]]
    assert again.ask(10) == [subnets[3], subnets[5]]
    assert not strategy._asked
    tell_all(again, [subnets[i] for i in (0, 2, 3, 5)])
    assert again.ask(1) == list(grid())[6:7]
    assert strategy._asked[0]["draw"] == np.random.default_rng([3, 1]).random()


def test_what_is_given_back_is_asked_next() -> None:
    session = session_of()
    first, second = session.ask(2)
    session.give_back(first)
    assert session.ask(2) == [first, list(grid())[2]]
    session.tell(second, objectives_of(second))
    session.give_back(second)
    assert session.ask(1) == [list(grid())[3]], "what was told is not asked again"


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", None, True])
def test_ask_takes_a_positive_whole_number(n: Any) -> None:
    session = session_of()
    with pytest.raises(SearchError) as caught:
        session.ask(n)
    assert_clear(caught.value, f"n={n!r}", "whole number from 1", "ask(n)")
    assert len(session.ask(np.int64(2))) == 2


# Budget


def test_the_budget_counts_what_was_asked_for_and_pending() -> None:
    session = session_of(budget=5)
    subnets = session.ask(3)
    assert session.room == 2
    session.tell(subnets[0], objectives_of(subnets[0]))
    session.fail(subnets[1], "broken")
    assert (session.spent, session.room) == (2, 2)
    assert len(session.ask(10)) == 1, "the rest of the generation"
    assert len(session.ask(10)) == 1, "the rest of the budget"
    assert session.ask(1) == []
    assert not session.exhausted


def test_attached_subnets_do_not_count() -> None:
    session = session_of(budget=3)
    attached = session.tell(grid().largest, objectives_of(grid().largest))
    assert attached.generation is None
    assert (session.spent, session.room) == (0, 3)
    served: list[Subnet] = []
    while subnets := session.ask(1):
        tell_all(session, subnets)
        served += subnets
    assert len(served) == 3
    assert len(session.history) == 4


def test_a_waiting_subnet_that_is_told_unasked_counts_and_is_not_served() -> None:
    session = session_of(strategy=Scripted(batch_size=4), budget=4)
    everything = list(grid())
    session.ask(1)
    assert session.tell(everything[2], objectives_of(everything[2])).generation == 0
    assert session.spent == 1
    assert session.ask(9) == [everything[1], everything[3]]


def test_a_budget_of_seconds_ends_a_search() -> None:
    session = session_of(budget=Budget(seconds=1e-9))
    tell_all(session, session.ask(1))
    assert session.history[0].seconds > 0
    assert session.ask(1) == []
    assert len(session_of(budget=Budget(seconds=3600, evaluations=2)).ask(9)) == 2


@pytest.mark.parametrize(
    "given",
    [0, -3, 2.5, "10", None, True, Budget, float("nan"), float("inf"), [5]],
)
def test_a_budget_that_buys_nothing_is_refused(given: Any) -> None:
    with pytest.raises(SearchError) as caught:
        Budget.of(given)
    why = "buys nothing" if given is None else "whole number from 1"
    assert_clear(caught.value, f"evaluations={given!r}", why, "budget=250")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"seconds": 0},
        {"seconds": "60"},
        {"seconds": float("nan")},
        {"evaluations": 5, "seconds": -1},
    ],
)
def test_a_budget_object_is_checked_too(given: dict[str, Any]) -> None:
    with pytest.raises(SearchError) as caught:
        Budget(**given)
    assert_clear(caught.value, "buys nothing", "Budget(seconds=3600)")


# A strategy that breaks its contract


class Broken(Strategy):
    name = "broken"
    batch_size = 3

    def __init__(self, proposals: Any) -> None:
        self._proposals = proposals

    def propose(self, *_: Any, **__: Any) -> Any:
        return self._proposals


@pytest.mark.parametrize(
    ("proposals", "part"),
    [
        ([], "0 subnets"),
        ([grid().largest] * 2, "1 of them new"),
        ([grid().smallest], "0 of them new"),
        (None, "None"),
        ([{"x.0": 1, "x.1": 2}], "{'x.0': 1, 'x.1': 2}"),
        ([[0, 1]], "[0, 1]"),
        ([grid(3).largest], "Subnet(x=[4, 4, 4])"),
        ([grid(2, 9).largest], "Subnet(x=[8, 8])"),
    ],
)
def test_a_strategy_that_breaks_its_contract_is_named(proposals: Any, part: str) -> None:
    session = session_of(strategy=Broken(proposals))
    session.tell(grid().smallest, objectives_of(grid().smallest))
    with pytest.raises(StrategyError) as caught:
        session.ask(2)
    assert_clear(caught.value, "Broken()", part, "A strategy returns")
    assert session.study.generations(grid()) == []
    assert len(session.history) == 1


def test_a_proposal_outside_the_pool_is_refused() -> None:
    pool = grid().restricted_to(grid().sample(5, rng=0))
    outside = next(s for s in grid() if s not in pool)
    session = session_of(strategy=Broken([outside]), space=pool)
    with pytest.raises(StrategyError) as caught:
        session.ask()
    assert_clear(caught.value, str(outside), "not a subnet of the space")


# Taking in


def test_a_told_subnet_may_be_given_by_its_values() -> None:
    session = session_of()
    subnet = session.ask(1)[0]
    evaluation = session.tell({"x": [subnet["x.0"], subnet["x.1"]]}, objectives_of(subnet))
    assert evaluation.subnet == subnet
    assert evaluation.generation == 0


def test_values_may_come_with_standard_errors() -> None:
    session = session_of()
    evaluation = session.tell(grid().largest, {"f0": (0.5, 0.1), "f1": np.float32(2)})
    assert evaluation.values == {"f0": 0.5, "f1": 2.0, "cost": 9.0}
    assert evaluation.errors == {"f0": 0.1}
    assert all(type(value) is float for value in evaluation.values.values())


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 0.0])
def test_a_standard_error_that_is_not_known_counts_as_none(error: float) -> None:
    # The standard deviation of a single run is NaN, and SQLite has no NaN.
    storage = Storage(None)
    evaluator = FunctionEvaluator(lambda s: {"f0": (0.5, error), "f1": 1.0}, fingerprint="v1")
    session = session_of(storage)
    evaluation = session.measure(session.ask(1)[0], evaluator)
    assert evaluation.ok
    assert evaluation.errors == {}
    assert session.study.evaluations(grid())[0].values == evaluation.values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), np.float64("nan")])
def test_a_value_that_is_not_finite_is_a_recorded_failure(value: float) -> None:
    session = session_of()
    evaluation = session.tell(session.ask(1)[0], {"f0": value, "f1": 2.0})
    assert evaluation.status == "failed"
    assert evaluation.reason == f"f0 is {float(value)}"
    assert evaluation.values == {"f1": 2.0, "cost": 1.0}, "what is known stays known"
    assert np.isnan(session.history.column("f1")).all(), "and is no training data"
    assert session.spent == 1


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"f0": 1.0}, ("'f1' is missing", "'f0' came", "fail(subnet, reason)")),
        ({}, ("'f0' is missing", "nothing came")),
        ({"f0": 1.0, "f1": 2.0, "f2": 3.0}, ("'f2' is not a measure to be told", "'f0', 'f1'")),
        ({"f0": 1.0, "F1": 2.0}, ("'F1' is not a measure to be told", "'f0', 'f1'")),
        ({"f0": 1.0, "f1": 2.0, "cost": 3.0}, ("'cost'", "computed by the search", "leave it out")),
        ({"f0": "0.5", "f1": 2.0}, ("'f0' is '0.5'", "Tell a number")),
        ({"f0": None, "f1": 2.0}, ("'f0' is None", "Tell a number", "fail(subnet, reason)")),
        ({"f0": True, "f1": 2.0}, ("'f0' is True", "Tell a number")),
        ({"f0": [1.0, 2.0], "f1": 2.0}, ("'f0' is [1.0, 2.0]", "a pair (value, standard error)")),
        ({"f0": (1.0, -0.1), "f1": 2.0}, ("'f0' is (1.0, -0.1)", "standard error")),
        ({"f0": (1.0, 0.1, 3.0), "f1": 2.0}, ("'f0' is (1.0, 0.1, 3.0)", "a pair")),
        ({"f0": ("a", 0.1), "f1": 2.0}, ("'f0' is ('a', 0.1)", "Tell a number")),
        ({"f0": 1j, "f1": 2.0}, ("'f0' is 1j", "Tell a number")),
    ],
)
def test_values_that_do_not_fit_are_refused_and_nothing_is_recorded(
    values: dict[str, Any], parts: tuple[str, ...]
) -> None:
    session = session_of()
    first, second = session.ask(2)
    session.tell(first, objectives_of(first))
    with pytest.raises(TellError) as caught:
        session.tell(second, values)
    assert_clear(caught.value, *parts)
    assert len(session.history) == len(session.study.evaluations(grid())) == 1
    assert session.tell(second, objectives_of(second)).number == 1, (
        "the right values are still welcome"
    )


def test_a_subnet_is_told_once() -> None:
    session = session_of()
    subnet = session.ask(1)[0]
    session.tell(subnet, objectives_of(subnet))
    for again in (
        lambda: session.tell(subnet, {"f0": 9, "f1": 9}),
        lambda: session.fail(subnet, "x"),
    ):
        with pytest.raises(TellError) as caught:
            again()
        assert_clear(
            caught.value, str(subnet), "told already, as evaluation 0", "first values stay"
        )
    assert record(session.history) == record(session.study.evaluations(grid()))
    assert session.history[0].values["f0"] == objectives_of(subnet)["f0"]


def test_a_failure_needs_no_values() -> None:
    session = session_of()
    first, second = session.ask(2)
    assert session.fail(first, "out of memory").reason == "out of memory"
    failed = session.fail(second, "")
    assert failed.reason == "no reason given"
    assert not failed.ok


def test_two_processes_on_one_study_see_each_others_evaluations(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    one, two = session_of(Storage(url)), session_of(Storage(url))
    subnets = one.ask(4)
    assert two.ask(4) == subnets
    one.tell(subnets[0], objectives_of(subnets[0]))
    two.tell(subnets[1], objectives_of(subnets[1]))
    assert [e.subnet for e in two.history] == subnets[:2]
    assert [e.number for e in two.history] == [0, 1]
    with pytest.raises(TellError) as caught:
        one.tell(subnets[1], {"f0": 9, "f1": 9})
    assert_clear(caught.value, str(subnets[1]), "measured once")
    one.tell(subnets[2], objectives_of(subnets[2]))
    assert record(one.history) == record(one.study.evaluations(grid()))


# Measures that are computed here


def expensive(returns: Any, fingerprint: str | None = None) -> tuple[Measure, list[Subnet]]:
    calls: list[Subnet] = []

    def fn(subnets: list[Subnet]) -> Any:
        calls.extend(subnets)
        if isinstance(returns, Exception):
            raise returns
        return [returns for _ in subnets]

    return Measure("f1", fn, fingerprint=fingerprint), calls


def test_an_expensive_measure_is_computed_at_tell() -> None:
    f1, calls = expensive((2.5, 0.5))
    session = session_of(measures=[cost, f1])
    assert session.names_to_tell == ("f0",)
    subnet = session.ask(1)[0]
    evaluation = session.tell(subnet, {"f0": 1.0})
    assert evaluation.values == {"f0": 1.0, "cost": 1.0, "f1": 2.5}
    assert evaluation.errors == {"f1": 0.5}
    assert calls == [subnet]


def test_a_measure_that_raises_is_a_recorded_failure() -> None:
    f1, _ = expensive(RuntimeError("CUDA out of memory\nTried to allocate"))
    session = session_of(measures=[cost, f1])
    evaluation = session.tell(session.ask(1)[0], {"f0": 1.0})
    assert not evaluation.ok
    assert evaluation.reason == "f1: RuntimeError: CUDA out of memory"
    assert evaluation.values == {"f0": 1.0, "cost": 1.0}


@pytest.mark.parametrize("returns", [[1.0, 2.0, 3.0], "fast"])
def test_a_measure_that_returns_no_number_is_an_error(returns: Any) -> None:
    f1, _ = expensive(returns)
    session = session_of(measures=[f1])
    with pytest.raises(ObjectiveError) as caught:
        session.tell(session.ask(1)[0], {"f0": 1.0})
    assert_clear(caught.value, "'f1'", "1 subnets", "one pair")
    assert not len(session.history)


@pytest.mark.parametrize("way", ["tell", "measure"])
def test_values_of_a_measure_are_reused_by_fingerprint(way: str) -> None:
    storage = Storage(None)

    def go(name: str, fingerprint: str | None) -> tuple[Any, int]:
        f1, calls = expensive((7.0, 0.5), fingerprint)
        session = session_of(storage, measures=[cost, f1], name=name)
        subnet = session.ask(1)[0]
        if way == "tell":
            return session.tell(subnet, {"f0": 1.0}), len(calls)
        return session.measure(subnet, FunctionEvaluator(lambda s: {"f0": 1.0})), len(calls)

    first, calls = go("a", "cpu")
    assert (calls, first.reused) == (1, ())
    again, calls = go("b", "cpu")
    assert (calls, again.reused) == (0, ("f1",))
    assert again.values == first.values
    assert again.errors == first.errors == {"f1": 0.5}
    assert go("c", "gpu")[1] == 1
    assert go("d", None)[1] == 1


# Measuring with an evaluator


def test_measuring_records_what_the_evaluator_says() -> None:
    session = session_of()
    evaluator = Counting()
    subnet = session.ask(1)[0]
    evaluation = session.measure(subnet, evaluator)
    assert evaluation.values == {**objectives_of(subnet), "cost": 1.0}
    assert evaluator.calls == [subnet]
    assert evaluation.seconds > 0


def test_further_values_of_an_evaluator_are_kept() -> None:
    session = session_of()
    evaluator = FunctionEvaluator(
        lambda s: {"f0": 1, "f1": 2, "memory": 3.5, "odd": float("nan"), "cost": -1}
    )
    evaluation = session.measure(session.ask(1)[0], evaluator)
    assert evaluation.ok
    assert evaluation.values == {"f0": 1.0, "f1": 2.0, "memory": 3.5, "cost": 1.0}


def test_an_evaluator_that_cannot_work_at_all_ends_the_search() -> None:
    class Hopeless(Evaluator):
        def evaluate(self, subnet: Subnet) -> dict[str, float]:
            msg = "the cluster is gone"
            raise MeasurementError(msg)

    session = session_of()
    subnet = session.ask(1)[0]
    with pytest.raises(MeasurementError, match="the cluster is gone"):
        session.measure(subnet, Hopeless())
    assert not len(session.history)


@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        ({"f0": 1.0}, ("no 'f1'", "'f0'")),
        ({"f0": 1.0, "f_1": 2.0}, ("no 'f1'", "Did you mean 'f_1'?")),
        ({}, ("no 'f0'", "nothing")),
    ],
)
def test_an_evaluator_without_an_objective_ends_the_search(
    returned: Any, parts: tuple[str, ...]
) -> None:
    session = session_of()
    with pytest.raises(MeasurementError) as caught:
        session.measure(session.ask(1)[0], FunctionEvaluator(lambda s: returned))
    assert_clear(caught.value, *parts)


def test_nothing_to_measure_with_is_said() -> None:
    session = session_of()
    with pytest.raises(SearchError) as caught:
        session.measure(session.ask(1)[0], None)
    assert_clear(caught.value, "'f0'", "evaluator", "measures=")


def test_a_search_by_measures_alone_needs_no_evaluator() -> None:
    @measure("f0")
    def f0(subnets: Any) -> Any:
        return [subnet["x.0"] for subnet in subnets]

    @measure("f1", exact=True)
    def f1(subnets: Any) -> Any:
        return [subnet["x.1"] for subnet in subnets]

    session = session_of(measures=[f0, f1])
    evaluation = session.measure(session.ask(1)[0], None)
    assert evaluation.values == {"f0": 0.0, "f1": 0.0}


class PerMeasure(Counting):
    """An evaluator whose two values depend on different things."""

    def __init__(self, weights: str, device: str) -> None:
        super().__init__()
        self.prints = {"f0": weights, "f1": device}

    def fingerprint(self, name: str) -> str | None:
        return self.prints.get(name)


def test_a_value_is_reused_when_only_another_one_changes() -> None:
    storage = Storage(None)

    def go(name: str, evaluator: PerMeasure) -> Any:
        session = session_of(storage, name=name)
        return session.measure(session.ask(1)[0], evaluator)

    first = go("a", PerMeasure("w1", "cpu"))
    evaluator = PerMeasure("w1", "cpu")
    same = go("b", evaluator)
    assert (same.reused, len(evaluator.calls)) == (("f0", "f1"), 0)
    evaluator = PerMeasure("w1", "gpu")
    half = go("c", evaluator)
    assert (half.reused, len(evaluator.calls)) == (("f0",), 1)
    assert go("d", PerMeasure("w2", "gpu2")).reused == ()
    assert same.values == half.values == first.values


def test_first_subnets_are_generation_zero() -> None:
    storage = Storage(None)
    largest, smallest = grid().largest, grid().smallest
    strategy = RandomSearch(batch_size=5)
    session = session_of(storage, strategy=strategy, first=[largest, smallest, largest])
    assert session.ask(9) == [largest, smallest]
    tell_all(session, [largest, smallest])
    later = session.ask(9)
    rng = np.random.default_rng([3, 1])
    assert later == strategy.propose(session.problem, session.history, 5, rng)
    again = session_of(storage, strategy=strategy, first=[largest, smallest])
    assert again.ask(9) == later


# Measures that are relative to one another


def test_the_value_of_the_largest_is_told_where_it_was_measured_earlier() -> None:
    heard: list[tuple[Subnet, float]] = []

    def relative(fingerprint: str | None) -> Measure:
        return Measure(
            "ms",
            lambda subnets: [float(sum(s.values())) for s in subnets],
            fingerprint=fingerprint,
            on_reference=lambda subnet, value: heard.append((subnet, value)),
        )

    storage, space = Storage(None), grid()

    def opened(name: str) -> Session:
        study = storage.find_study(name) or storage.create_study(name, {}, space, {})
        return Session(
            Problem(space, (Objective("ms", "min"),)),
            RandomSearch(),
            measures={"ms": relative("here")},
            study=study,
            budget=Budget(evaluations=4),
            seed=0,
            first=[space.largest],
        )

    largest = (space.largest, float(sum(space.largest.values())))
    first = opened("one")
    for subnet in (first.ask()[0], first.ask()[0]):
        first.measure(subnet, None)
    assert heard == []  # it has measured the largest itself
    opened("one")  # a resume
    assert heard == [largest]
    other = opened("two")  # another study reuses the value
    assert heard == [largest]
    assert other.measure(other.ask()[0], None).reused == ("ms",)
    assert heard == [largest, largest]
