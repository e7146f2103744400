# SPDX-License-Identifier: Apache-2.0
"""Registry: classes of one kind by name, the package's own and those of other packages."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lightning_subnet._messages import warn
from lightning_subnet.errors import PluginError, PluginWarning


class Registry:
    """A table of names, which other packages extend by entry points.

    Nothing is imported before it is asked for by name. Another package names its own in its
    pyproject.toml, after which the name works as one of ours does:

        [project.entry-points."lightning_subnet.strategies"]
        mine = "my_package.module:MyStrategy"

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
        self._warned: set[str] = set()

    @cached_property
    def plugins(self) -> dict[str, list[EntryPoint]]:
        """The entry points of other packages by name; more than one where packages collide."""
        plugins: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            points = plugins.setdefault(point.name, [])
            if all(point.value != other.value for other in points):
                points.append(point)
        return plugins

    def names(self) -> list[str]:
        """Return all names: our own in the order of the table, then those of other packages."""
        return [*self.table, *sorted(self.plugins.keys() - self.table.keys())]

    def __contains__(self, name: object) -> bool:
        return name in self.table or name in self.plugins

    def __getitem__(self, name: str) -> Any:
        """Return the object of a name; a name of our own stays ours, with a warning.

        Raises:
            KeyError: The name is unknown.
            PluginError: It is of another package and cannot be imported, or of several packages.
        """
        if name in self.table:
            self._warn_of_collision(name)
            module, _, attribute = self.table[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        points = self.plugins[name]
        if len(points) > 1:
            msg = (
                f"Several packages offer a {self.kind} {name!r}: {_origins(points)}. "
                "Uninstall all but one of them, or pass an object instead of the name."
            )
            raise PluginError(msg)
        try:
            return points[0].load()
        except Exception as error:
            reason = f"cannot be imported: {type(error).__name__}: {error}"
            raise self.unusable(name, reason) from error

    def subclass(self, name: str, base: type[Any]) -> Any:
        """Return the class of a name, which is one of a kind.

        Raises:
            KeyError: The name is unknown.
            PluginError: It is of another package, which cannot be imported or offers something
                else.

        Example:
            >>> errors = Registry("error", "example.errors", {"value": "builtins:ValueError"})
            >>> errors.subclass("value", Exception)
            <class 'ValueError'>
        """
        kind = self[name]
        if isinstance(kind, type) and issubclass(kind, base):
            return kind
        what = f"{base.__module__}.{base.__qualname__}"
        raise self.unusable(name, f"is {kind!r:.80}, which is not a subclass of {what}")

    def unusable(self, name: str, reason: str) -> PluginError:
        """Return the error for an entry point of another package that cannot be used.

        Args:
            name: The name of the entry point.
            reason: What is wrong: a verb and what follows, without a full stop.
        """
        return PluginError(
            f"The {self.kind} {name!r} of {_origins(self.plugins[name])} {reason}. "
            "Repair or uninstall that package."
        )

    def _warn_of_collision(self, name: str) -> None:
        """Warn, once, where another package offers something under a name of our own."""
        if name in self.plugins and name not in self._warned:
            self._warned.add(name)
            warn(
                f"The {self.kind} {name!r} is that of lightning-subnet; the one of "
                f"{_origins(self.plugins[name])} is passed over. Pass an object of it instead "
                "of the name.",
                PluginWarning,
            )


def _origins(points: Iterable[EntryPoint]) -> str:
    """Return the packages of entry points, and where in them."""
    return " and ".join(
        f"{point.dist.name} ({point.value})" if point.dist is not None else point.value
        for point in points
    )
