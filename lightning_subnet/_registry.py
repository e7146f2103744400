# SPDX-License-Identifier: Apache-2.0
"""Registry: things of one kind by name, the package's own and those of other packages."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lightning_subnet._messages import warn
from lightning_subnet.errors import PluginError, PluginWarning


class Registry:
    """A table of names, which other packages extend by entry points.

    Nothing is imported before it is asked for by name.

    Args:
        kind: What the names stand for, in one word for messages: `"strategy"`.
        group: The group of entry points: `"lightning_subnet.strategies"`.
        table: By name where it is: `"package.module:attribute"`.

    Example:
        >>> numbers = Registry("number", "example.numbers", {"pi": "math:pi"})
        >>> numbers.names(), "pi" in numbers, "tau" in numbers
        (['pi'], True, False)
        >>> round(numbers["pi"], 2)
        3.14
    """

    def __init__(self, kind: str, group: str, table: Mapping[str, str]) -> None:
        self.kind, self.group, self.table = kind, group, dict(table)

    @cached_property
    def plugins(self) -> dict[str, EntryPoint]:
        """The entry points of other packages by name; a name of our own stays ours."""
        plugins: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            other = plugins.get(point.name)
            if other is not None and other.value != point.value:
                msg = (
                    f"Two packages offer a {self.kind} {point.name!r}: {_origin(other)} and "
                    f"{_origin(point)}. Uninstall one of them, or pass an object instead of a name."
                )
                raise PluginError(msg)
            if point.name in self.table:
                warn(
                    f"{_origin(point)} offers a {self.kind} {point.name!r}, which is a name of "
                    "lightning-subnet's own, and is passed over. Pass an object of it instead of "
                    "the name.",
                    PluginWarning,
                )
                continue
            plugins[point.name] = point
        return plugins

    def names(self) -> list[str]:
        """Return all names: our own in the order of the table, then those of other packages."""
        return [*self.table, *sorted(self.plugins)]

    def __contains__(self, name: object) -> bool:
        return name in self.table or name in self.plugins

    def __getitem__(self, name: str) -> Any:
        """Return what a name stands for.

        Raises:
            KeyError: The name is unknown.
            PluginError: It is of another package, and cannot be imported.
        """
        if name in self.table:
            module, _, attribute = self.table[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        point = self.plugins[name]
        try:
            return point.load()
        except Exception as error:
            msg = (
                f"The {self.kind} {name!r} of {_origin(point)} cannot be imported: "
                f"{type(error).__name__}: {error}. Repair or uninstall that package."
            )
            raise PluginError(msg) from error


def _origin(point: EntryPoint) -> str:
    """Return the package of an entry point and where in it."""
    package = f"{point.dist.name} " if point.dist is not None else ""
    return f"{package}({point.value})"
