# SPDX-License-Identifier: Apache-2.0
"""Stubs of the packages with a table, whose public classes `python -m tests.stubs` writes.

A stub, `__init__.pyi`, is the list of a package's public names. Its first part is written by hand;
below a marker come the classes that the table of `registry.py` names.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import lightning_subnet
from lightning_subnet.predictors.registry import PREDICTORS
from lightning_subnet.strategies.registry import STRATEGIES

PACKAGE = Path(lightning_subnet.__file__).parent
MARKER = "# The classes in the table of registry.py, written by `python -m tests.stubs`.\n"
TABLES = {"predictors": PREDICTORS, "strategies": STRATEGIES}


def path_of(package: str) -> Path:
    """Return where the stub of a package is."""
    return PACKAGE / package / "__init__.pyi"


def written(package: str) -> str:
    """Return the text that the stub of a package must have."""
    names = defaultdict(set)
    for target in TABLES[package].table.values():
        module, _, name = target.partition(":")
        if name[0].isupper():  # a function in a table makes what another class is
            names[module.removeprefix(f"lightning_subnet.{package}")].add(name)
    by_hand, marker, _ = path_of(package).read_text("utf-8").partition(MARKER)
    assert marker, f"{path_of(package)} has lost the line {MARKER!r}"
    lines = [
        f"from {module} import (\n"
        # Constants, then classes, as ruff sorts them.
        + "".join(f"    {name} as {name},\n" for name in sorted(classes, key=_place))
        + ")\n"
        for module, classes in sorted(names.items())
    ]
    return by_hand + MARKER + "".join(lines)


def _place(name: str) -> tuple[bool, str]:
    return not name.isupper(), name


def stale() -> list[str]:
    """Return the packages whose stub does not agree with their table."""
    return [name for name in TABLES if path_of(name).read_text("utf-8") != written(name)]


if __name__ == "__main__":
    for stale_package in stale():
        path_of(stale_package).write_text(written(stale_package), "utf-8")
        print(f"wrote {path_of(stale_package)}")
