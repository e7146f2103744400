# SPDX-License-Identifier: Apache-2.0
"""The pieces of messages, and warnings that point at the user's line."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest

import lightning_subnet
from lightning_subnet import SearchSpace, SubnetSearch
from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.errors import BudgetWarning

PACKAGE = Path(lightning_subnet.__file__).parent


def test_did_you_mean_names_the_nearest_or_nothing() -> None:
    assert did_you_mean("dept", ["width", "depth"]) == " Did you mean 'depth'?"
    assert did_you_mean("zzz", ["width", "depth"]) == ""
    assert did_you_mean(44, [4, 440]) == " Did you mean '440'?"
    assert did_you_mean("a", []) == ""


def test_did_you_mean_looks_past_capitals_and_keeps_those_of_the_option() -> None:
    assert did_you_mean("DEPTH", ["width", "depth"]) == " Did you mean 'depth'?"
    assert did_you_mean("adamw", ["SGD", "AdamW"]) == " Did you mean 'AdamW'?"


def test_listed_is_short() -> None:
    assert listed(["a", 2]) == "'a', 2"
    assert listed([]) == "nothing"
    assert listed(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7, ... (9 in all)"
    assert listed(iter("abc"), limit=2) == "'a', 'b', ... (3 in all)"


def test_a_warning_points_at_the_user_s_line_and_says_how_to_silence_it() -> None:
    space = SearchSpace(depth=list(range(9)), width=list(range(9)))
    with pytest.warns(BudgetWarning) as caught:
        SubnetSearch(space=space, objectives={"error": "min"}, strategy="linas", budget=4)
    (warning,) = caught
    assert warning.filename == __file__
    line = 'warnings.simplefilter("ignore", lightning_subnet.errors.BudgetWarning)'
    assert str(warning.message).endswith(f" Silence it: {line}.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(line, {"warnings": warnings, "lightning_subnet": lightning_subnet})
        SubnetSearch(space=space, objectives={"error": "min"}, strategy="linas", budget=4)


def test_the_package_warns_in_one_way_only() -> None:
    callers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "warnings.warn"
    }
    assert callers == {"_messages.py"}
