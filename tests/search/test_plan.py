# SPDX-License-Identifier: Apache-2.0
"""Settings and plans: what a search is made of before it runs."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_subnet import Budget, Latency, SearchSpace, SubnetSearch
from lightning_subnet.errors import BudgetWarning, SearchError
from lightning_subnet.search.plan import Plan
from lightning_subnet.search.settings import Settings
from lightning_subnet.strategies import NSGA2, RandomSearch
from lightning_subnet.strategies.base import Opening
from lightning_subnet.study.storage import Storage
from tests.problems import Counting, assert_clear, cost, grid, record, search_of


def test_settings_are_the_arguments_of_a_search_and_nothing_else() -> None:
    arguments = list(inspect.signature(SubnetSearch).parameters)
    assert [field.name for field in dataclasses.fields(Settings)] == arguments
    for name in ("plan", "session", "problem"):
        with pytest.raises(SearchError, match=f"'{name}' is not a setting"):
            search_of().replace(**{name: None})


def test_neither_settings_nor_a_plan_can_be_changed() -> None:
    search = search_of()
    for part, name in ((search.plan, "budget"), (search.plan.settings, "seed"), (search, "seed")):
        with pytest.raises(AttributeError):
            setattr(part, name, 7)


def test_a_plan_is_what_the_settings_mean() -> None:
    plan = search_of(measures=cost, constraints={"cost": "<= 60%"}, name="a").plan
    assert plan.measures == (cost,)
    assert plan.names == ("f0", "f1", "cost")
    assert plan.budget == Budget(6)
    assert plan.strategy.name == plan.settings.strategy == "random"
    assert plan.name == "a"
    assert plan.problem().exact == {"cost": cost}
    assert plan.first() == []
    assert plan.require_space() == grid()


def test_measures_of_an_iterator_survive_a_replacement() -> None:
    search = search_of(measures=iter([cost]), constraints={"cost": "<= 60%"})
    assert search.replace(seed=1).plan.measures == search.plan.measures == (cost,)


def test_names_of_a_warm_start_are_looked_up_where_the_search_was_made() -> None:
    storage = Storage(None)
    source = search_of(storage=storage, name="source").run(Counting(), progress=False)
    search = search_of(storage=storage, warm_start="source", seed=1, budget=20)
    elsewhere = search.replace(storage=None)
    assert elsewhere.plan.storage is not storage
    assert elsewhere.plan.first() == search.plan.first()
    assert set(search.plan.first()) <= {e.subnet for e in source.front}


def test_a_plan_opens_its_study_and_goes_on_with_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    plan = search_of(storage=url, name="a").plan
    assert plan.find_study() is None
    assert not list(tmp_path.iterdir())
    session = plan.open()
    subnet = session.ask()[0]
    session.fail(subnet, "it broke")
    assert record(search_of(storage=url, name="a").plan.open().history) == record(session.history)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"space": None}, ("no space", "space=SearchSpace", "fit(model, datamodule)")),
        ({"measures": [Latency()]}, ("'latency_ms'", "measures networks", "measures=")),
    ],
)
def test_what_waits_for_a_model_opens_no_study(
    settings: dict[str, Any], parts: tuple[str, ...]
) -> None:
    plan = search_of(**settings).plan
    assert plan.resumed() is None
    with pytest.raises(SearchError) as caught:
        plan.open()
    assert_clear(caught.value, *parts)
    bound = dataclasses.replace(plan, space=grid(), measures=())
    assert bound.open().ask(1)[0] in grid()


def test_a_strategy_that_does_not_name_its_setting_is_warned_about_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RandomSearch, "opening", Opening(size=6))
    with pytest.warns(BudgetWarning) as caught:
        search_of()
    assert_clear(caught[0].message, "strategy='random'", "6 subnets", "Give a larger budget")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_of(budget=7)
        search_of(strategy=RandomSearch())  # an object, with the numbers that its user wants
        search_of(strategy=NSGA2(population=6))


def test_a_plan_keeps_the_settings_beside_what_they_mean() -> None:
    search = SubnetSearch(space=SearchSpace(a=[1, 2]), objectives={"f": "min"}, storage=None)
    assert isinstance(search.plan, Plan)
    assert search.plan.settings.storage is None
    assert isinstance(search.plan.storage, Storage)
    assert search.plan.settings.name is None
    assert search.name == search.plan.name != search.replace().name


def test_an_attribute_of_a_strategy_that_is_passed_is_its_own_matter() -> None:
    class Mine(RandomSearch):
        opening = 7  # type: ignore[assignment] # of something else

    search = search_of(strategy=Mine(), budget=3)
    assert len(search.ask(3)) == 3
