# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import lightning_subnet
from lightning_subnet import Evaluation
from lightning_subnet.errors import StorageError, StudyMismatchError
from lightning_subnet.study.storage import Storage
from lightning_subnet.testing.storage import StorageContract, new_study
from tests.problems import ROOT, assert_clear, grid, search_of

WRITERS, ROWS = 4, 500


class TestFile(StorageContract):
    def make(self, place: Path) -> Storage:
        return Storage(f"sqlite:///{place}/search.db")


class TestMemory(StorageContract):
    shared = False

    def make(self, place: Path) -> Storage:
        return Storage(None)


# What goes in comes out


def test_nothing_is_created_before_the_first_write(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    storage = Storage(f"sqlite:///{path}")
    assert storage.study_names() == []
    assert storage.find_study("a") is None
    assert storage.known_values({"f0": "x"}, grid().smallest) == {}
    assert not path.exists()
    new_study(storage)
    assert path.exists()


def test_memory_is_not_shared_between_storages() -> None:
    new_study(Storage(None))
    assert Storage(None).study_names() == []
    assert Storage("sqlite://").study_names() == []


def test_a_file_holds_readable_text_only(tmp_path: Path) -> None:
    study = new_study(Storage(f"sqlite:///{tmp_path}/s.db"))
    study.add_generation(0, grid().sample(2, rng=0))
    study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 1.0}), {"f0": "x"})
    with sqlite3.connect(tmp_path / "s.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        tables = [
            row[0]
            for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        cells = [
            cell
            for table in tables
            for row in connection.execute(f"SELECT * FROM {table}")
            for cell in row
        ]
    assert len(cells) > 15
    assert not any(isinstance(cell, bytes) for cell in cells)


def test_the_package_pickles_nothing() -> None:
    folder = Path(lightning_subnet.__file__).parent
    forbidden = {
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
    }
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: Sequence[str] = ()
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Name | ast.Attribute):
                names = [node.id if isinstance(node, ast.Name) else node.attr]
            found += [
                (path.name, n) for n in names if n.split(".")[0] in {*forbidden, "PickleType"}
            ]
    assert not found
    assert len(list(folder.rglob("*.py"))) > 20


# Several writers


def run_writers(url: str, studies: Sequence[str]) -> list[list[int]]:
    """Run one writer of 500 rows for each name, all at once; return the numbers they got."""
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.programs.writer_program",
                url,
                name,
                str(i * ROWS),
                str(ROWS),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, name in enumerate(studies)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(studies)
    return [json.loads(text) for text in printed]


def check_file(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_four_processes_write_one_study_at_once(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    numbers = run_writers(f"sqlite:///{path}", ["shared"] * WRITERS)
    check_file(path)
    storage = Storage(f"sqlite:///{path}")
    assert storage.study_names() == ["shared"]
    study = storage.find_study("shared")
    assert study is not None
    space = grid(4, 7)
    subnets = list(space)
    evaluations = study.evaluations(space)
    assert [e.number for e in evaluations] == list(range(WRITERS * ROWS))
    by_number = {e.number: e for e in evaluations}
    for writer, column in enumerate(numbers):
        assert column == sorted(column), "a writer's rows keep their order"
        for row, number in enumerate(column, start=writer * ROWS):
            assert by_number[number].subnet == subnets[row]
            assert by_number[number].values == {"f0": float(row)}
    assert sorted(n for column in numbers for n in column) == list(range(WRITERS * ROWS))
    assert any(column != list(range(column[0], column[0] + ROWS)) for column in numbers), (
        "the writers took turns, or this test shows nothing"
    )
    for row in range(0, WRITERS * ROWS, 97):
        found = storage.known_values({"f0": f"shared:{row % 3}"}, subnets[row])
        assert found == {"f0": (float(row), 0.0)}


@pytest.mark.slow
def test_four_processes_write_four_studies_of_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    names = [f"study {i}" for i in range(WRITERS)]
    numbers = run_writers(f"sqlite:///{path}", names)
    check_file(path)
    assert numbers == [list(range(ROWS))] * WRITERS
    storage = Storage(f"sqlite:///{path}")
    assert sorted(storage.study_names()) == names
    space = grid(4, 7)
    subnets = list(space)
    for i, name in enumerate(names):
        study = storage.find_study(name)
        assert study is not None
        rows = range(i * ROWS, (i + 1) * ROWS)
        evaluations = study.evaluations(space)
        assert [e.number for e in evaluations] == list(range(ROWS))
        assert [e.subnet for e in evaluations] == [subnets[row] for row in rows]
        assert [e.values["f0"] for e in evaluations] == [float(row) for row in rows]


def test_connections_that_open_a_new_file_at_once_all_get_it(tmp_path: Path) -> None:
    # SQLite fails one of two that switch to the write-ahead log at once, without waiting.
    together, failed = 8, []
    for k in range(100):
        start = threading.Barrier(together)

        def look(url: str = f"sqlite:///{tmp_path}/{k}.db", start: Any = start) -> None:
            storage = Storage(url)
            Path(url.removeprefix("sqlite:///")).touch()
            start.wait()
            try:
                storage.study_names()
            except StorageError as error:
                failed.append(str(error))

        threads = [threading.Thread(target=look) for _ in range(together)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


# Places that cannot be used


def test_a_corrupt_file_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    path.write_bytes(b"this was never a database\n" * 500)
    before = path.read_bytes()
    with pytest.raises(StorageError) as caught:
        search_of(storage=f"sqlite:///{path}", name="a")
    assert_clear(caught.value, str(path), "not a database", "move it away")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["search.db"]


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    search = search_of(storage=f"sqlite:///{path}", name="a")
    search.ask(3)
    del search
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = bytearray(path.read_bytes())
    content[100:] = bytes(len(content) - 100)
    path.write_bytes(bytes(content))
    with pytest.raises(StorageError) as caught:
        search_of(storage=f"sqlite:///{path}", name="a")
    assert_clear(caught.value, str(path), "malformed", "move it away")


def test_a_foreign_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE users (name TEXT)")
    connection.close()
    before = path.read_bytes()
    for name in ("a", None):
        with pytest.raises(StorageError) as caught:
            search_of(storage=f"sqlite:///{path}", name=name).ask()
        assert_clear(caught.value, str(path), "something else", "users", "new file")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["app.db"]


def test_an_empty_file_is_a_new_storage(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    path.touch()
    new_study(Storage(f"sqlite:///{path}"))
    assert Storage(f"sqlite:///{path}").study_names() == ["a"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    new_study(Storage(f"sqlite:///{path}"))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE subnet_format SET version = '99'")
    connection.close()
    with pytest.raises(StorageError) as caught:
        Storage(f"sqlite:///{path}").study_names()
    assert_clear(caught.value, str(path), "format 99")


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("search.db", "sqlite:///search.db"),
        ("foo://x", "foo"),
        (7, "7"),
        ("", "URL"),
        (Path("search.db"), "search.db"),
    ],
)
def test_what_is_no_url_is_refused(given: Any, part: str) -> None:
    with pytest.raises(StorageError) as caught:
        search_of(storage=given)
    assert_clear(caught.value, repr(given), part, "sqlite:///", "None")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        search_of(storage=f"sqlite:///{tmp_path}/none/search.db")
    assert_clear(caught.value, f"{tmp_path}/none", "does not exist", "create it")
    assert not (tmp_path / "none").exists()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        search_of(storage=f"sqlite:///{tmp_path}")
    assert_clear(caught.value, str(tmp_path), "is a folder", "name a file")


_AS_NOBODY = """
import os, sys
from lightning_subnet.errors import StorageError
from tests.problems import search_of
search_of().ask()  # imports everything while the interpreter's own files may be read
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
for url in sys.argv[1:]:
    try:
        search_of(storage=url, name="a").ask()
    except StorageError as error:
        print(error)
    else:
        print("no error")
"""


def test_a_read_only_place_is_named(tmp_path: Path) -> None:
    folder, file = tmp_path / "sealed", tmp_path / "open" / "search.db"
    folder.mkdir()
    file.parent.mkdir()
    new_study(Storage(f"sqlite:///{file}"))
    file.chmod(0o444)
    folder.chmod(0o555)
    file.parent.chmod(0o777)
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)  # pytest's folders are closed to others
    urls = [f"sqlite:///{folder}/search.db", f"sqlite:///{file}"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, *urls],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        folder.chmod(0o755)
    messages = done.stdout.splitlines()
    assert len(messages) == 2
    assert_clear(messages[0], urls[0], f"{folder} is read-only", "choose a place")
    assert_clear(messages[1], urls[1], f"{file} is read-only", "choose a place")
    assert not os.listdir(folder)


def test_a_file_that_vanishes_in_a_search_is_an_error_of_the_storage(tmp_path: Path) -> None:
    search = search_of(storage=f"sqlite:///{tmp_path}/s.db", name="a")
    subnets = search.ask(2)
    search.tell(subnets[0], f0=1, f1=2)
    with sqlite3.connect(tmp_path / "s.db") as connection:
        connection.execute("DROP TABLE subnet_evaluation")
    connection.close()
    with pytest.raises(StorageError) as caught:
        search.tell(subnets[1], f0=1, f1=2)
    assert_clear(caught.value, "s.db", "no such table")
    assert len(search.history) == 1


# The header


def test_a_long_difference_stays_readable() -> None:
    storage = Storage(None)
    storage.create_study("a", {f"k{i}": "x" * 500 for i in range(20)}, grid(), {})
    with pytest.raises(StudyMismatchError) as caught:
        storage.create_study("a", {f"k{i}": "y" * 500 for i in range(20)}, grid(), {})
    assert len(str(caught.value)) < 1000
    assert len(str(caught.value).splitlines()) <= 3
