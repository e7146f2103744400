# SPDX-License-Identifier: Apache-2.0
"""Errors have a base and a built-in one; warnings have a base and say how to silence them."""

from __future__ import annotations

import pickle
import warnings

import pytest

import lightning_subnet
from lightning_subnet import errors
from lightning_subnet.errors import NoFeasibleSubnet, SubnetError, SubnetWarning

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type)]
OWN = [kind for kind in CLASSES if issubclass(kind, Exception) and not issubclass(kind, Warning)]
WARNINGS = [kind for kind in CLASSES if issubclass(kind, Warning)]


@pytest.mark.parametrize("kind", OWN)
def test_every_error_has_the_base_and_a_built_in_one(kind: type[Exception]) -> None:
    assert issubclass(kind, SubnetError)
    if kind is not SubnetError:
        built_in = (ValueError, RuntimeError, LookupError, ImportError)
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


@pytest.mark.parametrize("kind", WARNINGS)
def test_a_warning_has_the_base_and_its_docstring_silences_it(kind: type[Warning]) -> None:
    assert issubclass(kind, SubnetWarning)
    assert kind.__doc__ is not None
    line = f'warnings.simplefilter("ignore", lightning_subnet.errors.{kind.__name__})'
    assert f"`{line}`" in kind.__doc__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(line, {"warnings": warnings, "lightning_subnet": lightning_subnet})
        warnings.warn("it happened", kind, stacklevel=1)
    assert caught == []
