# SPDX-License-Identifier: Apache-2.0
"""JSON files of a form are read or refused in one wording; differences name their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_subnet import _json
from lightning_subnet.errors import ExportError, StorageError
from tests.problems import assert_clear


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = {"format": "table 1", "values": [1, 0.1, None, "ümlaut"], "inner": {"a": True}}
    _json.write(tmp_path / "file.json", data)
    assert _json.read(tmp_path / "file.json", "table 1", "Table") == data


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"values": []}', '{"format": "table 2"}', "\x00"]
)
def test_another_file_is_refused_in_one_wording(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StorageError) as caught:
        _json.read(path, "table 1", "Table")
    assert_clear(caught.value, f"{path} holds no Table (", "Write one with Table.save(path).")
    with pytest.raises(ExportError) as exported:
        _json.read(path, "table 1", "metadata", error=ExportError, hint="Export again.")
    assert_clear(exported.value, f"{path} holds no metadata (", "Export again.")


def test_a_missing_file_is_refused_in_the_same_wording(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        _json.read(tmp_path / "none.json", "table 1", "Table")
    assert_clear(caught.value, "none.json holds no Table (FileNotFoundError(")
    error = _json.unreadable(tmp_path / "file.json", "Table", KeyError("values"))
    assert_clear(error, "file.json holds no Table (KeyError('values'))", "Table.save(path)")


def test_a_digest_depends_on_the_content_alone() -> None:
    assert _json.digest({"b": [1, 2], "a": None}) == _json.digest({"a": None, "b": [1, 2]})
    assert _json.digest({"b": [1, 2]}) != _json.digest({"b": [2, 1]})
    # Stored studies and fingerprints hold such hashes: they stay what they are.
    assert _json.digest({"depth": 1}) == "b6f4fb25f1d2c232491ad54f158b1e97"


@pytest.mark.parametrize(
    ("stored", "now", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        (1, 2, [": stored 1, now 2"]),
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}, ["a.b[1].c: stored 2, now 3"]),
        ({"a": 1}, {"b": 2}, ["a: stored 1, now nothing", "b: stored nothing, now 2"]),
        ({"a": [1, 2]}, {"a": [1]}, ["a: stored [1, 2], now [1]"]),
        ({"a": 1}, {"a": True}, []),  # equal in Python
        ({"a": "x" * 200}, {"a": ""}, [f'a: stored "{"x" * 76}..., now ""']),
    ],
)
def test_differences_name_their_place(stored: Any, now: Any, lines: list[str]) -> None:
    assert list(_json.differences(stored, json.loads(json.dumps(now)))) == lines
