# SPDX-License-Identifier: Apache-2.0
"""The error classes and the two helpers that their messages are written with."""

from __future__ import annotations

import pickle

import pytest

from lightning_subnet import errors
from lightning_subnet.errors import NoFeasibleSubnet, SubnetError, did_you_mean, listed

OWN = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]


@pytest.mark.parametrize("kind", OWN)
def test_every_error_has_the_base_and_a_built_in_one(kind: type[Exception]) -> None:
    assert issubclass(kind, SubnetError)
    if kind is not SubnetError:
        built_in = (ValueError, RuntimeError, LookupError)
        assert issubclass(kind, built_in)


def test_no_feasible_subnet_carries_the_nearest() -> None:
    assert NoFeasibleSubnet("none", nearest=3).nearest == 3
    assert NoFeasibleSubnet("none").nearest is None


def test_errors_survive_pickling() -> None:  # a process pool sends them home
    for kind in OWN:
        copy = pickle.loads(pickle.dumps(kind("what went wrong")))
        assert type(copy) is kind
        assert str(copy) == "what went wrong"
    assert pickle.loads(pickle.dumps(NoFeasibleSubnet("none", nearest=3))).nearest == 3


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
