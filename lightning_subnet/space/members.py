# SPDX-License-Identifier: Apache-2.0
"""Members: which assignments belong to a space: all, those of some values, or listed ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._types import Indices
from lightning_subnet.errors import SpaceError
from lightning_subnet.space._diagram import Diagram
from lightning_subnet.space.choices import Choice, Choices, Value, plain
from lightning_subnet.space.encoding import encode
from lightning_subnet.space.subnet import CODE

_BLOCK = 4096


def row_codes(X: Indices) -> list[bytes]:
    """Return each row of value indices as bytes, to look rows up in sets and dicts."""
    width = CODE.itemsize * X.shape[1]
    blob = np.ascontiguousarray(X, dtype=CODE).tobytes()
    return [blob[i : i + width] for i in range(0, len(blob), width)]


def distinct_rows(X: Indices) -> npt.NDArray[np.int64]:
    """Return the first position of every distinct row, in order."""
    first: dict[bytes, int] = {}
    for i, code in enumerate(row_codes(X)):
        first.setdefault(code, i)
    return np.fromiter(first.values(), dtype=np.int64, count=len(first))


class Members(ABC):
    """The subnets of a space as canonical index rows (n, n_choices)."""

    size: int

    @abstractmethod
    def contains(self, X: Indices) -> npt.NDArray[np.bool_]:
        """Return a mask (n,) of the canonical rows that are members."""

    @abstractmethod
    def sample(self, n: int, rng: np.random.Generator) -> Indices:
        """Return n distinct members, uniformly drawn; n is at most `size`."""

    @abstractmethod
    def blocks(self) -> Iterator[Indices]:
        """Yield all members in a fixed order, in arrays of some thousand rows."""

    @abstractmethod
    def neighbours(self, row: Indices, distance: int) -> Indices:
        """Return the members that differ from the row in 1 to `distance` choices."""

    def project(self, X: Indices) -> Indices:
        """Return rows, canonical or not, with values of this space in place of others."""
        return X

    def nearest(self, X: Indices, exclude: set[bytes]) -> Indices:
        """Return members as they are, other rows as the nearest member; see `SearchSpace`."""
        return X


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
        if self._diagram.is_numbered:
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
        rings = []
        for step in range(1, distance + 1):
            steps = np.concatenate([self._one_away(at) for at in ring])
            # Changing one choice twice may reset others that hang on it: too far away.
            steps = steps[self._differences(row, steps) == step]
            firsts = []
            for code, step_row in zip(row_codes(steps), steps, strict=True):
                if code not in seen:
                    seen.add(code)
                    firsts.append(step_row)
            if not firsts:
                break
            ring = np.stack(firsts)
            rings.append(ring)
        return np.concatenate(rings) if rings else row[None][:0]

    def _differences(self, row: Indices, X: Indices) -> Indices:
        """Return the number of choices that differ, but for new ones at their first value."""
        return np.asarray((self._choices.active(X) & (row != X)).sum(axis=1))

    def _one_away(self, row: Indices) -> Indices:
        """Return the rows with one existing choice changed, repeated ones too."""
        rows = [row[None][:0]]
        for j in np.flatnonzero(self._choices.active(row[None])[0]):
            others = self._choices.distinct[j][self._choices.distinct[j] != row[j]]
            changed = np.repeat(row[None], len(others), axis=0)
            changed[:, j] = others
            rows.append(changed)
        return self._choices.canonical(np.concatenate(rows))


def value_indices(
    choices: Choices, values: Mapping[str, Sequence[Value]], *, whole: Mapping[str, Sequence[Value]]
) -> list[Indices]:
    """Return, by choice, the indices of the values that stay when a space is narrowed.

    Args:
        choices: The resolved choices.
        values: The values that stay, by name; a choice that is not named keeps all.
        whole: The values that each choice has in the space to be narrowed.

    Raises:
        SpaceError: An unknown name or value, or no value.
    """
    if unknown := [name for name in values if name not in whole]:
        msg = (
            f"{unknown[0]!r} is not a choice of this space.{did_you_mean(unknown[0], whole)} "
            f"Its choices: {listed(whole)}."
        )
        raise SpaceError(msg)
    indices: list[Indices] = []
    for j, (name, options) in enumerate(whole.items()):
        part = values.get(name, options)
        part = [part] if isinstance(part, str) else list(part)
        if not part or any(value not in options for value in part):
            msg = f"{name!r} cannot be narrowed to {part}: list one or more of {listed(options)}."
            raise SpaceError(msg)
        reps = choices.representatives[j]  # what means the same network stays with it
        at = [reps[choices.index_of[j][plain(value)]] for value in part]
        indices.append(np.flatnonzero(np.isin(reps, at)))
    return indices


class PartMembers(Members):
    """The subnets of some values of each choice, as rows of the whole space.

    Args:
        choices: The resolved choices of the whole.
        values: By choice, the indices of the values that stay, in order, at least one; values that
            mean the same network stay or go together.
    """

    def __init__(self, choices: Choices, values: Sequence[Indices]) -> None:
        self._choices = choices
        self.values = tuple(values)
        self._masks = [
            np.isin(np.arange(len(whole)), part)
            for whole, part in zip(choices.values, values, strict=True)
        ]
        self._targets = [self._moves(j) for j in range(len(choices))]
        part = Choices(self._narrowed())
        self._at = np.array([choices.position[name] for name in part.names])
        self._part = AllMembers(part)
        self.size = self._part.size

    def _narrowed(self) -> dict[str, Choice]:
        """Return the choices that can exist, with the values that stay."""
        part: dict[str, Choice] = {}
        for j, (name, choice) in enumerate(self._choices.by_name.items()):
            values = [choice.values[i] for i in self.values[j]]
            when = {
                parent: [v for v in allowed if parent in part and v in part[parent].values]
                for parent, allowed in choice.when.items()
            }
            same = [group for group in choice.same if group[0] in values]
            if all(when.values()):
                part[name] = Choice(values, ordered=choice.ordered, when=when, same=same)
        return part

    def _moves(self, j: int) -> Indices:
        """Return the value index that each one of a choice goes to: to itself if it stays.

        Others go to the nearest in order; those of categorical choices to those that stay by turns.
        """
        reps, distinct = self._choices.representatives[j], self._choices.distinct[j]
        moves: Indices = np.arange(len(reps))
        goals = np.intersect1d(self.values[j], distinct)
        for turn, i in enumerate(i for i in distinct if not self._masks[j][i]):
            ordered = self._choices.by_name[self._choices.names[j]].ordered
            near = int(np.argmin(np.abs(goals - i))) if ordered else turn % len(goals)
            moves[i] = goals[near]
        targets: Indices = moves[reps]
        return targets

    def _whole(self, rows: Indices) -> Indices:
        """Return rows of the part as rows of the whole."""
        X = np.zeros((len(rows), len(self._choices)), dtype=np.int64)
        for k, j in enumerate(self._at):
            X[:, j] = self.values[j][rows[:, k]]
        return self._choices.canonical(X)

    def contains(self, X: Indices) -> npt.NDArray[np.bool_]:
        """Return a mask (n,) of the rows with values that stay, in the choices that exist."""
        stays = np.stack([mask[X[:, j]] for j, mask in enumerate(self._masks)], axis=1)
        return np.asarray((stays | ~self._choices.active(X)).all(axis=1))

    def project(self, X: Indices) -> Indices:
        """Return rows, canonical or not, with values that stay in place of others."""
        return np.stack([target[X[:, j]] for j, target in enumerate(self._targets)], axis=1)

    def sample(self, n: int, rng: np.random.Generator) -> Indices:
        """Return n distinct members, uniformly drawn."""
        return self._whole(self._part.sample(n, rng))

    def blocks(self) -> Iterator[Indices]:
        """Yield all members in a fixed order."""
        return map(self._whole, self._part.blocks())

    def neighbours(self, row: Indices, distance: int) -> Indices:
        """Return the members around a row, or around its projection."""
        inside = self._choices.canonical(self.project(row[None]))[0]
        # A choice that does not exist has index 0: whether that value stays or not, position 0.
        at = np.array([np.searchsorted(self.values[j], inside[j]) for j in self._at])
        return self._whole(self._part.neighbours(at, distance))


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
        self._marks = self._mark(self._rows)
        self.size = len(self._rows)

    @property
    def rows(self) -> Indices:
        """The members, (size, n_choices)."""
        return self._rows

    def _mark(self, X: Indices) -> Indices:
        """Return the indices plus one, and 0 for choices that do not exist."""
        return np.where(self._choices.active(X), X + 1, 0)

    def contains(self, X: Indices) -> npt.NDArray[np.bool_]:
        """Return a mask (n,) of the rows that are listed."""
        return np.array([code in self._codes for code in row_codes(X)], dtype=bool)

    def sample(self, n: int, rng: np.random.Generator) -> Indices:
        """Return n distinct members, uniformly drawn."""
        return self._rows[rng.choice(self.size, n, replace=False)]

    def blocks(self) -> Iterator[Indices]:
        """Yield all members in the order of the list."""
        for start in range(0, self.size, _BLOCK):
            yield self._rows[start : start + _BLOCK]

    def distances(self, row: Indices) -> npt.NDArray[np.int64]:
        """Return the Hamming distance of a canonical row to every member, (size,).

        Counted over choices that exist in either; one that exists in one of them only counts too.
        """
        distances: npt.NDArray[np.int64] = (self._marks != self._mark(row[None])).sum(axis=1)
        return distances

    def neighbours(self, row: Indices, distance: int) -> Indices:
        """Return the members at Hamming distance 1 to `distance`."""
        away = self.distances(row)
        return self._rows[(away >= 1) & (away <= distance)]

    def nearest(self, X: Indices, exclude: set[bytes]) -> Indices:
        """Return members as they are, other rows as the nearest member that none has become."""
        exclude = set(exclude)
        rows = []
        for row, member in zip(X, self.contains(X), strict=True):
            target = row if member else self._nearest_to(row, exclude)
            if target is not None:
                exclude.add(row_codes(target[None])[0])
                rows.append(target)
        return np.stack(rows) if rows else X[:0]

    def _nearest_to(self, row: Indices, exclude: set[bytes]) -> Indices | None:
        """Return the nearest member but those (first in order among equals), or None."""
        for i in np.argsort(self.distances(row), kind="stable"):
            if row_codes(self._rows[i][None])[0] not in exclude:
                nearest: Indices = self._rows[i]
                return nearest
        return None


def end_of(choices: Choices, members: Members, *, largest: bool) -> Indices:
    """Return the largest or the smallest member as a row (1, n_choices); see `SearchSpace`."""
    ordered = np.array([choice.ordered for choice in choices.by_name.values()])
    last = np.array([len(values) - 1 for values in choices.values])
    X = choices.canonical(members.project(np.where(ordered & largest, last, 0)[None]))
    if isinstance(members, PoolMembers) and not members.contains(X)[0]:
        score = encode(choices, members.rows, "ordinal")[:, ordered].sum(axis=1)
        X = members.rows[[int(np.argmax(score if largest else -score))]]
    return X
