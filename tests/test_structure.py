# SPDX-License-Identifier: Apache-2.0
"""The walls of the package: floors, doors of large libraries, the cost of importing it, names."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_subnet

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lightning_subnet"
FILES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")
}
DOORS = {
    "lightning": "_lightning",
    "pytorch_lightning": "nowhere",
    "pymoo": "strategies/_pymoo",
    "sqlalchemy": "storage",
    "matplotlib": "plotting",
    "moocore": "pareto",
    "sklearn": "_sklearn",
    "botorch": "_gp",
    "gpytorch": "_gp",
    "onnx": "conversion",
    "onnxscript": "conversion",
    "onnxruntime": "conversion",
    "openvino": "conversion",
    "pynvml": "costs/energy",
}
MAX_IMPORT_SECONDS = 0.3


def floors() -> dict[str, int]:
    """Return the floor of each file, from the table in ARCHITECTURE.md."""
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
    return {name.strip(): int(floor) for floor, names in rows for name in names.split(",")}


def imported(path: Path) -> set[str]:
    """Return the dotted modules that a file imports at run time, anywhere in it."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """Return the package's own files that a file imports."""
    names = {
        name.removeprefix("lightning_subnet.").replace(".", "/")
        for name in imported(path)
        if name.startswith("lightning_subnet.")
    }
    return {f"{n}/__init__" if f"{n}/__init__" in FILES else n for n in names} & set(FILES)


def test_every_file_has_a_floor() -> None:
    assert set(floors()) == set(FILES) - {"__init__"}


def test_no_file_imports_upwards_or_in_a_circle() -> None:
    floor = floors()
    graph = {name: own_imports(path) for name, path in FILES.items() if name != "__init__"}
    upward = [(a, b) for a, uses in graph.items() for b in uses if floor[b] > floor[a]]
    assert upward == []
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_torch_stays_above_the_search_floor() -> None:
    low = [name for name, floor in floors().items() if floor <= 2 and name != "_gp"]
    assert [n for n in low if any(m.split(".")[0] == "torch" for m in imported(FILES[n]))] == []


@pytest.mark.parametrize("library", DOORS)
def test_a_large_library_has_one_door(library: str) -> None:
    users = {n for n, p in FILES.items() if any(m.split(".")[0] == library for m in imported(p))}
    assert users <= {DOORS[library]}


def run(code: str) -> dict:
    """Run code in a new interpreter and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_and_takes_no_time() -> None:
    told = run(
        "import lightning, sys, time, json\n"
        "before = set(sys.modules); start = time.perf_counter()\n"
        "import lightning_subnet\n"
        "print(json.dumps({'seconds': time.perf_counter() - start,"
        " 'new': sorted(set(sys.modules) - before)}))"
    )
    assert told["new"] == ["lightning_subnet"]
    assert told["seconds"] < MAX_IMPORT_SECONDS


def test_the_search_core_works_without_torch() -> None:
    told = run(
        "import sys, json\n"
        "from lightning_subnet import SearchSpace, SubnetSearch, FunctionEvaluator\n"
        "search = SubnetSearch(space=SearchSpace(a=[1, 2, 3]), objectives={'f': 'min'},"
        " strategy='random', budget=2, storage=None)\n"
        "search.run(FunctionEvaluator(lambda s: {'f': s['a']}), progress=False)\n"
        "heavy = ['torch', 'lightning', 'pymoo', 'pandas', 'matplotlib', 'botorch', 'sklearn']\n"
        "print(json.dumps({'loaded': [name for name in heavy if name in sys.modules]}))"
    )
    assert told["loaded"] == []


def test_no_public_name_is_a_submodule() -> None:
    for package in {path.parent for path in FILES.values()}:
        modules = {p.stem for p in package.glob("*.py")} | {p.name for p in package.iterdir()}
        tree = ast.parse((package / "__init__.py").read_text())
        exported = next(
            (
                ast.literal_eval(node.value)
                for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            ),
            [],
        )
        assert set(exported) & modules == set()


def test_every_public_name_resolves() -> None:
    assert sorted(lightning_subnet._HOME) == lightning_subnet.__all__
    for name in lightning_subnet.__all__:
        assert getattr(lightning_subnet, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'SubnetSeach'"):
        _ = lightning_subnet.SubnetSeach


def test_files_stay_small() -> None:
    long = {n: k for n, p in FILES.items() if (k := len(p.read_text().splitlines())) > 420}
    assert long == {}
