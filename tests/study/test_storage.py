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
from lightning_subnet import Evaluation, SearchSpace
from lightning_subnet.errors import StorageError, StudyMismatchError, TellError
from lightning_subnet.study.storage import Storage, Study
from tests.problems import ROOT, assert_clear, conditional, grid, mixed, record, search_of

WRITERS, ROWS = 4, 500


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return f"sqlite:///{tmp_path}/search.db" if request.param == "file" else None


def new_study(storage: Storage, name: str = "a", space: SearchSpace | None = None) -> Study:
    return storage.create_study(name, {"seed": 0}, space or grid(), {"numpy": "2"})


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


def test_studies_are_kept_by_name(url: str | None) -> None:
    storage = Storage(url)
    for name in ("zebra", "apple", "with 'quotes\" and ünicode/7"):
        new_study(storage, name, conditional())
    assert storage.study_names() == ["zebra", "apple", "with 'quotes\" and ünicode/7"]
    found = storage.find_study("with 'quotes\" and ünicode/7")
    assert found is not None
    assert found.header == {"seed": 0}
    assert found.versions == {"numpy": "2"}
    assert found.space == conditional()
    assert storage.find_study("Apple") is None


@pytest.mark.parametrize("space", [grid(), conditional(), mixed(), grid(3, 4)], ids=repr)
def test_evaluations_come_back_as_they_were(url: str | None, space: SearchSpace) -> None:
    pool = space.restricted_to(space.sample(12, rng=0))
    for home in (space, pool):
        study = new_study(Storage(url), repr(home), home)
        written = [
            Evaluation(0, s, {"f0": 1 / (i + 3), "f1": -1e300}, {"f0": 1e-17}, generation=i)
            for i, s in enumerate(home.sample(6, rng=1))
        ]
        written += [
            Evaluation(0, s, {}, status="failed", reason='it\'s "broken" ümlaut\n;--', seconds=0.25)
            for s in home
            if s not in [e.subnet for e in written]
        ][:3]
        stored = [study.add_evaluation(e) for e in written]
        assert [e.number for e in stored] == list(range(9))
        assert study.evaluations(home) == stored
        assert study.evaluations(home, start=7) == stored[7:]
        assert [e.subnet for e in stored] == [e.subnet for e in written]


def test_generations_come_back_in_order(url: str | None) -> None:
    space = conditional()
    study = new_study(Storage(url), space=space)
    batches = [space.sample(n, rng=n) for n in (5, 1, 12)]
    for number, batch in enumerate(batches):
        assert study.add_generation(number, batch) == batch
    assert study.generations(space) == batches


def test_the_generation_that_was_committed_first_stays(url: str | None) -> None:
    study = new_study(Storage(url))
    first, second = grid().sample(3, rng=0), grid().sample(3, rng=1)
    study.add_generation(0, first)
    assert study.add_generation(0, second) == first
    assert study.generations(grid()) == [first]


def test_a_subnet_is_stored_once_in_a_study(url: str | None) -> None:
    storage = Storage(url)
    study, other = new_study(storage, "a"), new_study(storage, "b")
    study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 1.0}))
    with pytest.raises(TellError) as caught:
        study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 2.0}))
    assert_clear(caught.value, str(grid().smallest), "'a'", "measured once")
    assert [e.values["f0"] for e in study.evaluations(grid())] == [1.0]
    assert other.add_evaluation(Evaluation(0, grid().smallest, {"f0": 2.0})).number == 0


def test_values_are_found_by_fingerprint_and_subnet(url: str | None) -> None:
    storage = Storage(url)
    prints = {"f0": "weights:f0", "latency_ms": "cpu-1"}
    a, b = grid().sample(2, rng=0)
    new_study(storage, "a").add_evaluation(
        Evaluation(0, a, {"f0": 0.5, "latency_ms": 2.0, "f1": 9.0}, {"latency_ms": 0.25}), prints
    )
    assert storage.known_values(prints, a) == {"f0": (0.5, 0.0), "latency_ms": (2.0, 0.25)}
    assert storage.known_values(prints | {"latency_ms": "cpu-2"}, a) == {"f0": (0.5, 0.0)}
    assert storage.known_values({"top1": "weights:f0"}, a) == {"top1": (0.5, 0.0)}
    assert storage.known_values(prints, b) == {}
    assert storage.known_values({}, a) == {}
    twin = grid().subnet(a.to_json())
    assert storage.known_values(prints, twin) == storage.known_values(prints, a)


def test_the_first_value_of_a_fingerprint_stays(url: str | None) -> None:
    storage = Storage(url)
    for name, value in (("a", 1.0), ("b", 2.0)):
        new_study(storage, name).add_evaluation(
            Evaluation(0, grid().smallest, {"f0": value}), {"f0": "x"}
        )
    assert storage.known_values({"f0": "x"}, grid().smallest) == {"f0": (1.0, 0.0)}


def test_a_refused_evaluation_leaves_no_values(url: str | None) -> None:
    storage = Storage(url)
    study = new_study(storage)
    study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 1.0}))
    with pytest.raises(TellError):
        study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 2.0}), {"f0": "x"})
    assert storage.known_values({"f0": "x"}, grid().smallest) == {}


def test_committed_rows_are_there_for_others_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/search.db"
    study = new_study(Storage(url))
    other = Storage(url).find_study("a")
    assert other is not None
    for number, subnet in enumerate(grid().sample(5, rng=0)):
        study.add_evaluation(Evaluation(0, subnet, {"f0": 1.0}))
        assert len(other.evaluations(grid())) == number + 1


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


def test_a_header_with_other_settings_shows_the_difference(url: str | None) -> None:
    storage = Storage(url)
    header = {"seed": 0, "strategy": {"name": "nsga2", "population": 50}, "x": [1, 2], "same": None}
    storage.create_study("a", header, grid(), {})
    other = {"seed": 1, "strategy": {"name": "nsga2", "population": 20}, "y": "new", "same": None}
    with pytest.raises(StudyMismatchError) as caught:
        storage.create_study("a", other, grid(), {})
    assert_clear(
        caught.value,
        "'a'",
        "seed: stored 0, now 1",
        "strategy.population: stored 50, now 20",
        "x: stored [1, 2], now nothing",
        'y: stored nothing, now "new"',
        "another name=",
    )
    assert "same" not in str(caught.value)
    study = storage.find_study("a")
    assert study is not None
    study.check(header)
    study.check({**header, "x": (1, 2)})  # a tuple is a list in JSON


def test_a_long_difference_stays_readable() -> None:
    storage = Storage(None)
    storage.create_study("a", {f"k{i}": "x" * 500 for i in range(20)}, grid(), {})
    with pytest.raises(StudyMismatchError) as caught:
        storage.create_study("a", {f"k{i}": "y" * 500 for i in range(20)}, grid(), {})
    assert len(str(caught.value)) < 1000
    assert len(str(caught.value).splitlines()) <= 3


def test_equal_studies_created_twice_are_one(url: str | None) -> None:
    storage = Storage(url)
    first = new_study(storage)
    first.add_evaluation(Evaluation(0, grid().smallest, {"f0": 1.0}))
    second = new_study(storage)
    assert record(second.evaluations(grid())) == record(first.evaluations(grid()))
    assert storage.study_names() == ["a"]
