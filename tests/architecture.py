# SPDX-License-Identifier: Apache-2.0
"""The packages as they import one another: `python -m tests.architecture` draws them anew.

It prints the figures of the house and writes the picture in ARCHITECTURE.md.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter, defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_subnet"
FILES = sorted(PACKAGE.rglob("*.py"))
PICTURE = re.compile(r"```mermaid\n.*?```", re.DOTALL)
MARGIN = "testing"  # beside the floors: contract tests may use all of them


def floors() -> list[list[str]]:
    """Return the packages of each floor from the top, as pyproject.toml has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c["type"] == "layers")
    return [re.findall(r"\w+", layer) for layer in contract["layers"]]


@cache
def imports() -> tuple[tuple[str, str], ...]:
    """Return which module imports which, type-only imports included."""
    graph = grimp.build_graph("lightning_subnet")
    return tuple(
        (module, other)
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
    )


def arrows() -> dict[str, set[str]]:
    """Return, by package, the packages that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for pair in imports():
        one, two = (name.split(".")[1:2] for name in pair)
        if one and two and one not in (two, [MARGIN]):
            found[one[0]].add(two[0])
    return dict(found)


def circles() -> list[str]:
    """Return the circles among the children of each package."""
    children: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module, other in imports():
        one, two = module.split("."), other.split(".")
        same = next(
            (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b),
            min(len(one), len(two)),
        )
        if same < min(len(one), len(two)):
            children[".".join(one[:same])][one[same]].add(two[same])
    found = []
    for package, uses in children.items():
        try:
            TopologicalSorter(uses).prepare()
        except CycleError as error:
            found.append(f"{package}: {' -> '.join(error.args[1])}")
    return found


def upward() -> list[str]:
    """Return the arrows that do not go to a lower floor."""
    level = {name: -i for i, row in enumerate(floors()) for name in row}
    return [
        f"{one} -> {two}"
        for one, others in arrows().items()
        for two in others
        if level[two] >= level[one]
    ]


def shortened(uses: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the arrows without those that longer ways imply; there is no circle."""
    below: dict[str, set[str]] = {}
    for name in TopologicalSorter(uses).static_order():
        below[name] = set().union(*({b} | below[b] for b in uses.get(name, ())))
    return {a: {b for b in to if not any(b in below[c] for c in to)} for a, to in uses.items()}


def picture() -> str:
    """Return the packages as a Mermaid chart: floors from the top, arrows to what is imported."""
    lines = ["```mermaid", "flowchart TD"]
    for i, row in enumerate(floors()):
        lines.append(f"  subgraph floor{len(floors()) - i}[ ]")
        lines.append("    direction LR")
        lines += [f"    {name}" for name in row]
        lines.append("  end")
    for one, others in sorted(shortened(arrows()).items()):
        lines += [f"  {one} --> {two}" for two in sorted(others)]
    return "\n".join([*lines, "```"])


def code_lines(path: Path) -> int:
    """Return the lines of code of a file: docstrings, comments and empty lines are none."""
    text = path.read_text()
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
            docs |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(i not in docs and bool(x.strip()) and x.strip()[0] != "#" for i, x in lines)


def folders() -> Counter[str]:
    """Return how many files each folder holds, `__init__.py` aside."""
    names = [path.parent.relative_to(ROOT) for path in FILES if path.name != "__init__.py"]
    return Counter(map(str, names))


def levels() -> int:
    """Return the length of the longest way through the packages, in packages; without circles."""
    uses, depth = arrows(), {}
    for name in TopologicalSorter(uses).static_order():
        depth[name] = 1 + max((depth[other] for other in uses.get(name, ())), default=0)
    return max(depth.values())


if __name__ == "__main__":
    page = ROOT / "ARCHITECTURE.md"
    page.write_text(PICTURE.sub(lambda _: picture(), page.read_text(), count=1))
    deep = max(len(path.relative_to(PACKAGE).parts) - 1 for path in FILES)
    print(f"floors {len(floors())}, levels {levels()}, rooms {sum(map(len, floors()))}")
    print(f"arrows {sum(map(len, arrows().values()))}, upward {upward()}, circles {circles()}")
    print(f"files {len(FILES)}, deepest folder {deep}, fullest {folders().most_common(3)}")
    longest = sorted(((code_lines(path), path.name) for path in FILES), reverse=True)[:5]
    print(f"longest, in lines of code: {longest}")
