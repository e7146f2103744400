# SPDX-License-Identifier: Apache-2.0
"""Strategies by name, ours and those of other packages, and the list of public names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_subnet import FunctionEvaluator, SubnetSearch, strategies
from lightning_subnet.errors import PluginError, PluginWarning, StrategyError
from lightning_subnet.strategies import Hybrid, Strategy, names, resolve
from lightning_subnet.strategies.registry import STRATEGIES
from tests import stubs
from tests.plugins import installed, write_package
from tests.problems import assert_clear, grid, search_of

MODULE = """
from lightning_subnet.strategies import Strategy, fill


class Last(Strategy):
    name = "last"

    def __init__(self, batch_size=3):
        self.batch_size = batch_size

    def propose(self, problem, history, n, rng, pending=()):
        rows = problem.space.indices(list(problem.space))[::-1]
        return fill(problem, history, pending, n, rng, lambda k, rng: rows)
"""


def write(folder: Path, points: str, package: str = "demo", text: str = "") -> Path:
    group = "[lightning_subnet.strategies]"
    write_package(folder / package, package, {package: text or MODULE}, f"{group}\n{points}\n")
    return folder / package


def test_every_name_gives_a_strategy_of_that_name() -> None:
    for name in STRATEGIES.table:
        strategy = resolve(name)
        assert isinstance(strategy, Strategy)
        assert strategy.name == name
        assert type(strategy) is getattr(strategies, type(strategy).__name__)
        assert type(strategy).__name__ in strategies.__all__
    assert names()[: len(STRATEGIES.table)] == list(STRATEGIES.table)


def test_the_stubs_are_those_of_the_tables() -> None:
    assert stubs.stale() == [], "run: .venv/bin/python -m tests.stubs"


def test_names_cost_no_import_of_a_strategy() -> None:
    code = (
        "import json, sys\n"
        "from lightning_subnet.strategies import names, resolve\n"
        "names(); resolve('random')\n"
        "print(json.dumps([m for m in sys.modules if 'strategies.' in m or m == 'sklearn']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.rpartition(".")[2] for name in json.loads(done.stdout)}
    assert loaded == {"registry", "base", "random"}


# Strategies of other packages


def test_a_strategy_of_another_package_is_searched_with_by_name(tmp_path: Path) -> None:
    space = grid(3, 4)
    with installed(STRATEGIES, write(tmp_path, "demo-last = demo:Last")):
        assert names() == [*STRATEGIES.table, "demo-last"]
        assert resolve("demo-last").batch_size == 3
        search = search_of(space=space, strategy="demo-last", budget=6)
        evaluator = FunctionEvaluator(lambda s: {"f0": float(s["x.0"]), "f1": float(s["x.1"])})
        history = search.run(evaluator, progress=False).history
        with pytest.raises(StrategyError, match="Did you mean 'demo-last'"):
            resolve("demo-lst")
    assert [e.subnet for e in history] == list(space)[::-1][:6]
    with pytest.raises(StrategyError, match="is unknown"):
        resolve("demo-last")


def test_a_strategy_that_cannot_be_imported_breaks_no_other(tmp_path: Path) -> None:
    folder = write(tmp_path, "broken = demo:Last", text="import nothing_of_this_name\n")
    with installed(STRATEGIES, folder):
        assert resolve("hybrid").name == "hybrid"
        with pytest.raises(PluginError) as caught:
            SubnetSearch(space=grid(), objectives={"f": "min"}, strategy="broken", storage=None)
    assert_clear(caught.value, "The strategy 'broken' of demo (demo:Last)", "ModuleNotFoundError")


@pytest.mark.parametrize("target", ["demo:fill", "demo", "demo:Strategy.__doc__"])
def test_what_is_not_a_strategy_is_named_with_its_package(tmp_path: Path, target: str) -> None:
    text = MODULE + "\n\ndef fill():\n    return 3\n"
    with (
        installed(STRATEGIES, write(tmp_path, f"wrong = {target}", text=text)),
        pytest.raises(PluginError) as caught,
    ):
        resolve("wrong")
    assert_clear(caught.value, f"'wrong' of demo ({target})", "which is not a Strategy")


def test_a_name_of_ours_stays_ours(tmp_path: Path) -> None:
    with (
        installed(STRATEGIES, write(tmp_path, "hybrid = demo:Last")),
        pytest.warns(PluginWarning, match="'hybrid' is that of lightning-subnet") as caught,
    ):
        strategy = resolve("hybrid")
    assert type(strategy) is Hybrid
    assert caught[0].filename == __file__


def test_two_packages_with_one_name_are_both_named(tmp_path: Path) -> None:
    one = write(tmp_path, "last = demo:Last")
    two = write(tmp_path, "last = other:Last\nfine = other:Last", package="other")
    with installed(STRATEGIES, one, two):
        assert resolve("fine").name == "last"
        with pytest.raises(PluginError) as caught:
            resolve("last")
    assert_clear(caught.value, "'last'", "demo (demo:Last)", "other (other:Last)")


# Errors


class Nameless(Strategy):
    def propose(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        ("nsga", ("'nsga' is unknown", "Did you mean 'nsga2'?", "'bayesian'")),
        ("FullSearch", ("Did you mean 'full'?",)),
        (Hybrid, ("is a class", "add ()")),
        (3, ("strategy=3 is not a Strategy",)),
        (None, ("strategy=None is not a Strategy",)),
        (Nameless(), ("Nameless has no name",)),
    ],
)
def test_what_is_wrong_is_said(strategy: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(StrategyError) as caught:
        resolve(strategy)
    assert_clear(caught.value, *parts)
