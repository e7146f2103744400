# SPDX-License-Identifier: Apache-2.0
"""A whole number is checked in one place and one wording."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_subnet._checks import checked_int
from lightning_subnet.errors import SearchError, StrategyError
from tests.problems import assert_clear


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(3), 10**30])
def test_whole_numbers_become_ints(value: Any) -> None:
    number = checked_int(value, "n", error=SearchError)
    assert number == value
    assert type(number) is int


@pytest.mark.parametrize(
    "value", [0, -1, 1.0, 2.5, True, np.True_, "3", None, float("nan"), np.float64(3), [3]]
)
def test_anything_else_is_refused_with_the_value_and_what_was_expected(value: Any) -> None:
    with pytest.raises(SearchError) as caught:
        checked_int(value, "n_random", error=SearchError, hint="2 is usual.")
    assert_clear(caught.value, f"n_random={value!r} must be a whole number from 1. 2 is usual.")


def test_the_least_number_and_the_class_are_the_caller_s() -> None:
    assert checked_int(0, "n", error=SearchError, least=0) == 0
    with pytest.raises(StrategyError) as caught:
        checked_int(19, "n", error=StrategyError, least=20)
    assert str(caught.value) == "n=19 must be a whole number from 20."
