# SPDX-License-Identifier: Apache-2.0
"""Results: of a resumed study, of a record, and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_subnet import SearchResult
from lightning_subnet.errors import SearchError
from lightning_subnet.results import SearchRecord
from tests.problems import Counting, assert_clear, record, search_of
from tests.results.test_record import result_of


def test_the_result_of_a_resumed_study_is_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/s.db", "name": "a"}
    first = search_of(**settings).run(Counting(), progress=False)
    again = search_of(**settings).result()
    assert record(again.front) == record(first.front)
    assert str(again) == str(first)


def test_a_record_becomes_a_result_that_does_not_know_its_network() -> None:
    before = result_of({"ms": "<= 8"})
    plain = SearchRecord(before.problem, before.history, name="b", measures={"ms": {"unit": "s"}})
    result = SearchResult.of_record(plain)
    assert (result.name, result.measures) == ("b", {"ms": {"unit": "s"}})
    assert record(result.front) == record(before.front)
    assert repr(result) == "<SearchResult 'b': 6 evaluations, 3 on the front>"
    with pytest.raises(SearchError) as caught:
        result.extract(result.knee)
    assert_clear(caught.value, "does not know the network", "fit()")
    with pytest.raises(SearchError) as caught:
        result.example_input()
    assert_clear(caught.value, "does not know the input of its network", "example_input=")
