# SPDX-License-Identifier: Apache-2.0
"""Other packages with entry points, as pip would install them, for tests of what they add."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from lightning_subnet import _registry
from lightning_subnet._registry import Registry


def write_package(folder: Path, package: str, modules: Mapping[str, str], points: str) -> None:
    """Write modules and the metadata of a distribution into a folder.

    Args:
        folder: The folder, which is to be on `sys.path`.
        package: The name of the distribution.
        modules: The text of each module by its name.
        points: The text of `entry_points.txt`.
    """
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(points)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


@contextmanager
def installed(registry: Registry, *folders: Path) -> Iterator[None]:
    """Have a registry look for entry points anew, in these folders, which are on `sys.path`.

    What else is installed here is hidden: a package of the developer's may have entry points too.
    """

    def of_folders(**parameters: str) -> list[EntryPoint]:
        return [
            point
            for point in entry_points(**parameters)
            if point.dist is not None and Path(str(point.dist.locate_file(""))) in folders
        ]

    modules = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(folder)
        patch.setattr(_registry, "entry_points", of_folders)
        _forget(registry)
        try:
            yield
        finally:
            _forget(registry)
            for name in set(sys.modules) - modules:
                if Path(getattr(sys.modules[name], "__file__", None) or "").parent in folders:
                    del sys.modules[name]


def _forget(registry: Registry) -> None:
    with suppress(AttributeError):  # it has not looked yet
        del registry.plugins
