# SPDX-License-Identifier: Apache-2.0
"""Members: which assignments belong to a space. All of them, or a pool of listed ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lightning_subnet._diagram import Diagram
from lightning_subnet.choices import Choices, Indices
from lightning_subnet.subnet import CODE

_BLOCK = 4096


def row_codes(X: Indices) -> list[bytes]:
    """Return each row of value indices as bytes, to look rows up in sets and dicts."""
    width = CODE.itemsize * X.shape[1]
    blob = np.ascontiguousarray(X, dtype=CODE).tobytes()
    return [blob[i : i + width] for i in range(0, len(blob), width)]


def distinct_rows(X: Indices) -> npt.NDArray[np.int64]:
    """Return where each distinct row comes first, in their order."""
    first: npt.NDArray[np.int64] = np.sort(np.unique(X, axis=0, return_index=True)[1])
    return first


class Members(ABC):
    """The subnets of a space as canonical index rows (n, n_choices)."""

    size: int

    @abstractmethod
    def contains(self, X: Indices) -> npt.NDArray[np.bool_]:
        """Return which canonical rows are members, (n,)."""

    @abstractmethod
    def sample(self, n: int, rng: np.random.Generator) -> Indices:
        """Return n distinct members, uniformly drawn; n is at most `size`."""

    @abstractmethod
    def blocks(self) -> Iterator[Indices]:
        """Yield all members in a fixed order, in arrays of some thousand rows."""

    @abstractmethod
    def neighbours(self, row: Indices, distance: int) -> Indices:
        """Return the members that differ from the row in 1 to `distance` choices."""


class AllMembers(Members):
    """Every distinct subnet that the choices allow."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self._diagram = Diagram(choices)
        self.size = self._diagram.size

    def contains(self, X: Indices) -> npt.NDArray[np.bool_]:
        """Return True for every canonical row."""
        return np.ones(len(X), dtype=bool)

    def sample(self, n: int, rng: np.random.Generator) -> Indices:
        """Return n distinct members, uniformly drawn."""
        if self._diagram.numbered:
            return self._diagram.unrank(rng.choice(self.size, n, replace=False))
        X = self._diagram.draw(n, rng)
        while len(first := distinct_rows(X)) < n:
            X = np.concatenate([X[first], self._diagram.draw(n - len(first), rng)])
        return X

    def blocks(self) -> Iterator[Indices]:
        """Yield all members by number; a space of 2**62 or more has no numbers."""
        for start in range(0, self.size, _BLOCK):
            yield self._diagram.unrank(np.arange(start, min(start + _BLOCK, self.size)))

    def neighbours(self, row: Indices, distance: int) -> Indices:
        """Change 1 to `distance` existing choices; what comes to exist has its first value."""
        seen = {row_codes(row[None])[0]}
        ring = row[None]
        found = []
        for step in range(1, distance + 1):
            steps = np.concatenate([self._one_away(at) for at in ring])
            # Changing one choice twice may reset others that hang on it: too far away.
            steps = steps[self._differences(row, steps) == step]
            fresh = []
            for code, there in zip(row_codes(steps), steps, strict=True):
                if code not in seen:
                    seen.add(code)
                    fresh.append(there)
            if not fresh:
                break
            ring = np.stack(fresh)
            found.append(ring)
        return np.concatenate(found) if found else row[None][:0]

    def _differences(self, row: Indices, X: Indices) -> Indices:
        """Return in how many choices rows differ, but for new choices at their first value."""
        return np.asarray((self._choices.active(X) & (row != X)).sum(axis=1))

    def _one_away(self, row: Indices) -> Indices:
        rows = [row[None][:0]]
        for j in np.flatnonzero(self._choices.active(row[None])[0]):
            others = self._choices.distinct[j][self._choices.distinct[j] != row[j]]
            changed = np.repeat(row[None], len(others), axis=0)
            changed[:, j] = others
            rows.append(changed)
        return self._choices.canonical(np.concatenate(rows))


class PoolMembers(Members):
    """A listed part of a space.

    Args:
        choices: The resolved choices.
        X: Canonical rows (n, n_choices); repeated rows count once. The order is kept.
    """

    def __init__(self, choices: Choices, X: Indices) -> None:
        self._rows = X[distinct_rows(X)]
        self._codes = set(row_codes(self._rows))
        self._choices = choices
        self._marked = self._mark(self._rows)
        self.size = len(self._rows)

    @property
    def rows(self) -> Indices:
        """The members, (size, n_choices)."""
        return self._rows

    def _mark(self, X: Indices) -> Indices:
        """Return the indices plus one, and 0 for choices that do not exist."""
        return np.where(self._choices.active(X), X + 1, 0)

    def contains(self, X: Indices) -> npt.NDArray[np.bool_]:
        """Return which rows are listed."""
        return np.array([code in self._codes for code in row_codes(X)], dtype=bool)

    def sample(self, n: int, rng: np.random.Generator) -> Indices:
        """Return n distinct members, uniformly drawn."""
        return self._rows[rng.choice(self.size, n, replace=False)]

    def blocks(self) -> Iterator[Indices]:
        """Yield all members in the given order."""
        for start in range(0, self.size, _BLOCK):
            yield self._rows[start : start + _BLOCK]

    def distances(self, row: Indices) -> npt.NDArray[np.int64]:
        """Return the Hamming distance of a canonical row to every member, (size,).

        Counted over choices that exist in either; one that exists in one of them only counts too.
        """
        distances: npt.NDArray[np.int64] = (self._marked != self._mark(row[None])).sum(axis=1)
        return distances

    def neighbours(self, row: Indices, distance: int) -> Indices:
        """Return the members at Hamming distance 1 to `distance`."""
        away = self.distances(row)
        return self._rows[(away >= 1) & (away <= distance)]

    def nearest(self, row: Indices, taken: set[bytes]) -> Indices | None:
        """Return the nearest member that is not taken (first in order among equals), or None."""
        for i in np.argsort(self.distances(row), kind="stable"):
            if row_codes(self._rows[i][None])[0] not in taken:
                nearest: Indices = self._rows[i]
                return nearest
        return None
