# SPDX-License-Identifier: Apache-2.0
"""Results as files: saved, loaded, and files that are something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_subnet import SearchResult
from lightning_subnet.errors import StorageError
from tests.problems import Counting, assert_clear, conditional, cost, grid, record, search_of
from tests.results.test_record import result_of


@pytest.mark.parametrize("constraints", [None, {"cost": "<= 50%"}, {"f0": "<= 70%", "f1": ">= 0"}])
def test_a_saved_result_is_the_same_result(tmp_path: Path, constraints: Any) -> None:
    search = search_of(
        space=conditional(),
        objectives={"f0": "min", "f1": "max", "cost": "min"},
        measures=[cost],
        constraints=constraints,
        strategy="nsga2",
        budget=40,
        name="ünïcode",
    )
    result = search.run(Counting(), progress=False)
    result.save(tmp_path / "result.json")
    loaded = SearchResult.load(tmp_path / "result.json")
    assert record(loaded.history) == record(result.history)
    assert loaded.name == "ünïcode"
    assert loaded.objectives == result.objectives
    assert record(loaded.front) == record(result.front)
    assert len(result.front)
    assert loaded.best("f0") == result.best("f0")
    assert loaded.history.space == result.history.space
    np.testing.assert_array_equal(loaded.minimised(), result.minimised())
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "result.json").read_text()


def test_a_saved_result_is_strict_json(tmp_path: Path) -> None:
    result = result_of()
    result.save(tmp_path / "r.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert len(data["evaluations"]) == 6


def test_a_pool_is_saved_with_its_result(tmp_path: Path) -> None:
    pool = grid().restricted_to(grid().sample(9, rng=0))
    search_of(space=pool, budget=99).run(Counting(), progress=False).save(tmp_path / "r.json")
    loaded = SearchResult.load(str(tmp_path / "r.json"))
    assert loaded.history.space.size == len(loaded.history) == 9


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "not json", '"x"', "null"])
def test_what_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(StorageError) as caught:
        SearchResult.load(path)
    assert_clear(caught.value, str(path), "no SearchResult", "SearchResult.save(path)")


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        SearchResult.load(tmp_path / "none.json")
    assert_clear(caught.value, "none.json", "SearchResult.save(path)")


@pytest.mark.parametrize("part", ["name", "space", "objectives", "constraints", "evaluations"])
def test_a_result_that_lacks_a_part_is_named(tmp_path: Path, part: str) -> None:
    path = tmp_path / "r.json"
    result_of().save(path)
    data = json.loads(path.read_text())
    del data[part]
    path.write_text(json.dumps(data))
    with pytest.raises(StorageError) as caught:
        SearchResult.load(path)
    assert_clear(caught.value, str(path), "no SearchResult", repr(part))
