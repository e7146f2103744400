# SPDX-License-Identifier: Apache-2.0
"""Subnet: one frozen, hashable, JSON-able assignment of every choice, in canonical form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lightning_subnet._json import digest
from lightning_subnet._messages import did_you_mean
from lightning_subnet._types import Indices
from lightning_subnet.space.choices import Choice, Choices, Value

CODE = np.dtype("<u2")


class Subnet(Mapping[str, Value]):
    """One sub-network, as a mapping from the name of each choice to its value.

    Subnets come from a `SearchSpace` (`space.subnet(...)`, `space.sample(...)`). They compare and
    hash by content: the values of the choices that exist in them. A choice that does not exist
    under the others' values reads as its first value, so that code may index it without a test.

    Example:
        >>> from lightning_subnet import Choice, SearchSpace
        >>> space = SearchSpace({"depth": [1, 2], "ks.0": [3, 5],
        ...                      "ks.1": Choice([3, 5], when={"depth": [2]})})
        >>> subnet = space.subnet(depth=1, ks=[5, 5])
        >>> subnet["ks.0"], subnet["ks.1"], subnet.active
        (5, 3, {'depth': 1, 'ks.0': 5})
        >>> subnet.grouped()
        {'depth': 1, 'ks': [5, 3]}
    """

    __slots__ = ("_active", "_choices", "_code", "_hash", "_key")

    def __init__(self, choices: Choices, code: bytes) -> None:
        self._choices = choices
        self._code = code
        self._key: str | None = None
        self._hash: int | None = None
        self._active: dict[str, Value] | None = None

    @property
    def indices(self) -> Indices:
        """Value indices in the order of the choices, shape (n_choices,)."""
        return np.frombuffer(self._code, CODE).astype(np.int64)

    @property
    def choices(self) -> Mapping[str, Choice]:
        """The choices of its space by name, in gene order; read-only."""
        return self._choices.by_name

    def code(self, choices: Choices) -> bytes | None:
        """Return the value indices as bytes, if they are those of these very choices.

        Args:
            choices: The resolved choices of a space.
        """
        return self._code if self._choices is choices else None

    @property
    def active(self) -> dict[str, Value]:
        """The choices that exist in this subnet, with their values."""
        if self._active is None:
            index = self.indices
            mask = self._choices.active(index[None])[0]
            self._active = {
                name: values[i]
                for name, values, i, on in zip(
                    self._choices.names, self._choices.values, index, mask, strict=True
                )
                if on
            }
        return dict(self._active)

    @property
    def key(self) -> str:
        """A hash of the content that is the same in every process."""
        if self._key is None:
            self._key = digest(self.active)
        return self._key

    def grouped(self) -> dict[str, Any]:
        """Return the values with numbered choices as lists: `{"depth": 3, "ks": [5, 3, 3]}`."""
        return {
            group: [self[self._choices.names[i]] for i in at]
            if self._choices.is_list(group)
            else self[group]
            for group, at in self._choices.groups.items()
        }

    def to_json(self) -> dict[str, Value]:
        """Return the JSON form: the choices that exist; `space.subnet(...)` reads it back."""
        return self.active

    def __getitem__(self, name: str) -> Value:
        try:
            at = self._choices.position[name]
        except KeyError:
            hint = did_you_mean(name, self._choices.names)
            if name in self._choices.groups:
                hint = f" It is a group: subnet.grouped()[{name!r}]."
            msg = f"{name!r} is not a choice of this subnet.{hint}"
            raise KeyError(msg) from None
        return self._choices.values[at][int.from_bytes(self._code[2 * at : 2 * at + 2], "little")]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices.names)

    def __len__(self) -> int:
        return len(self._choices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Subnet):
            return NotImplemented
        if self._choices is other._choices:
            return self._code == other._code
        return self.key == other.key

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = int(self.key[:15], 16)
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Subnet, (self._choices, self._code)

    def __repr__(self) -> str:
        active = self.active
        parts = []
        for group, at in self._choices.groups.items():
            shown = [
                repr(active[n]) if (n := self._choices.names[i]) in active else "-" for i in at
            ]
            parts.append(
                f"{group}=[{', '.join(shown)}]"
                if self._choices.is_list(group)
                else f"{group}={shown[0]}"
            )
        return f"Subnet({', '.join(parts)})"
