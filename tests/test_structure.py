# SPDX-License-Identifier: Apache-2.0
"""The walls of the package: sizes, the cost of importing it, names. `make lint` has the floors."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_subnet
from tests import architecture
from tests.architecture import FILES, PACKAGE, ROOT

MAX_IMPORT_SECONDS = 0.3
MAX_FLOORS, MAX_FILES, MAX_LEVELS, MAX_LINES = 11, 12, 2, 400
PUBLIC = [path.parent for path in PACKAGE.rglob("__init__.pyi")]


def package_of(folder: Path) -> str:
    return ".".join(folder.relative_to(ROOT).parts)


# Floors and rooms


def test_the_house_has_few_floors_no_circle_and_no_arrow_up() -> None:
    assert len(architecture.floors()) <= MAX_FLOORS
    assert architecture.upward() == []
    assert architecture.circles() == []


def test_the_picture_is_that_of_the_imports() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    assert architecture.picture() in page, "run: .venv/bin/python -m tests.architecture"


def test_a_folder_holds_a_dozen_files_and_lies_at_most_two_deep() -> None:
    full = {folder: n for folder, n in architecture.folders().items() if n > MAX_FILES}
    assert full == {}, "a dozen files is the most: which of them make a room of their own?"
    deep = [path for path in FILES if len(path.relative_to(PACKAGE).parts) - 1 > MAX_LEVELS]
    assert deep == []


def test_files_stay_small() -> None:
    long = {str(p): n for p in FILES if (n := architecture.code_lines(p)) > MAX_LINES}
    assert long == {}


# What importing loads


def run(code: str) -> dict:
    """Run code in a new interpreter and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_and_takes_no_time() -> None:
    loaded = run(
        "import lightning, sys, time, json\n"
        "before = set(sys.modules); start = time.perf_counter()\n"
        "import lightning_subnet\n"
        "print(json.dumps({'seconds': time.perf_counter() - start,"
        " 'new': sorted(set(sys.modules) - before)}))"
    )
    assert loaded["new"] == ["lazy_loader", "lightning_subnet"]
    assert loaded["seconds"] < MAX_IMPORT_SECONDS


def test_the_search_core_works_without_torch() -> None:
    loaded = run(
        "import sys, json\n"
        "from lightning_subnet import SearchSpace, SubnetSearch, FunctionEvaluator\n"
        "search = SubnetSearch(space=SearchSpace(a=[1, 2, 3]), objectives={'f': 'min'},"
        " strategy='random', budget=2, storage=None)\n"
        "search.run(FunctionEvaluator(lambda s: {'f': s['a']}), progress=False)\n"
        "heavy = ['torch', 'lightning', 'pymoo', 'pandas', 'matplotlib', 'botorch', 'sklearn']\n"
        "print(json.dumps({'loaded': [name for name in heavy if name in sys.modules]}))"
    )
    assert loaded["loaded"] == []


# Names


@pytest.mark.parametrize("folder", PUBLIC, ids=package_of)
def test_every_public_name_resolves_and_none_is_a_module(folder: Path) -> None:
    package = importlib.import_module(package_of(folder))
    inside = {p.stem for p in folder.glob("*.py")} | {p.name for p in folder.iterdir()}
    packages = {path.name for path in PUBLIC if path.parent == folder} | {"errors"}
    for name in package.__all__:
        value = getattr(package, name)
        if folder == PACKAGE and name in packages:
            continue  # `lightning_subnet.costs` is a name of its own
        assert value.__name__ == name
        assert name not in inside
        assert value.__doc__, f"{name} is public and has no docstring"


def test_the_top_has_the_names_of_every_day() -> None:
    packages = {path.name for path in PUBLIC} | {"errors"}
    assert 25 <= len(set(lightning_subnet.__all__) - packages) <= 35
    with pytest.raises(AttributeError, match="lightning_subnet attribute SubnetSeach"):
        _ = lightning_subnet.SubnetSeach
