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
from lightning_subnet.space.encoding import encoded
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

    def brought_in(self, X: Indices) -> Indices:
        """Return rows, canonical or not, with kept values in place of dropped ones."""
        return X

    def free(self, X: Indices, taken: set[bytes]) -> Indices:
        """Return each row that is no member as the nearest one not taken, or leave it out."""
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


def kept_positions(
    choices: Choices, values: Mapping[str, Sequence[Value]], *, own: Mapping[str, Sequence[Value]]
) -> list[Indices]:
    """Return the indices of the values of each choice that stay.

    Args:
        choices: The resolved choices.
        values: What stays, by name; a choice that is not named keeps its own.
        own: The values that each choice has now.

    Raises:
        SpaceError: An unknown name or value, or no value.
    """
    if unknown := [name for name in values if name not in own]:
        msg = (
            f"{unknown[0]!r} is not a choice of this space.{did_you_mean(unknown[0], own)} "
            f"Its choices: {listed(own)}."
        )
        raise SpaceError(msg)
    kept: list[Indices] = []
    for j, (name, has) in enumerate(own.items()):
        wanted = values.get(name, has)
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        if not wanted or any(value not in has for value in wanted):
            msg = f"{name!r} cannot be narrowed to {wanted}: list one or more of {listed(has)}."
            raise SpaceError(msg)
        reps = choices.representatives[j]  # what means the same network stays with it
        at = [reps[choices.index_of[j][plain(value)]] for value in wanted]
        kept.append(np.flatnonzero(np.isin(reps, at)))
    return kept


class PartMembers(Members):
    """The subnets of some values of each choice, as rows of the whole space.

    Args:
        choices: The resolved choices of the whole.
        kept: By choice, the indices of the values that stay, in order, at least one; values that
            mean the same network stay or go together.
    """

    def __init__(self, choices: Choices, kept: Sequence[Indices]) -> None:
        self._choices = choices
        self.kept = tuple(kept)
        self._inside = [
            np.isin(np.arange(len(values)), at)
            for values, at in zip(choices.values, kept, strict=True)
        ]
        self._into = [self._moves(j) for j in range(len(choices))]
        part = Choices(self._narrowed())
        self._at = np.array([choices.position[name] for name in part.names])
        self._part = AllMembers(part)
        self.size = self._part.size

    def _narrowed(self) -> dict[str, Choice]:
        """Return the choices that can exist, with the values that stay."""
        made: dict[str, Choice] = {}
        for j, (name, choice) in enumerate(self._choices.by_name.items()):
            values = [choice.values[i] for i in self.kept[j]]
            when = {
                parent: [v for v in allowed if parent in made and v in made[parent].values]
                for parent, allowed in choice.when.items()
            }
            same = [group for group in choice.same if group[0] in values]
            if all(when.values()):
                made[name] = Choice(values, ordered=choice.ordered, when=when, same=same)
        return made

    def _moves(self, j: int) -> Indices:
        """Return where each value of a choice goes: kept ones to themselves.

        Others go to the nearest in order; those of categorical choices to the kept ones by turns.
        """
        reps, distinct = self._choices.representatives[j], self._choices.distinct[j]
        moves: Indices = np.arange(len(reps))
        kept = np.intersect1d(self.kept[j], distinct)
        for turn, i in enumerate(i for i in distinct if not self._inside[j][i]):
            ordered = self._choices.by_name[self._choices.names[j]].ordered
            near = int(np.argmin(np.abs(kept - i))) if ordered else turn % len(kept)
            moves[i] = kept[near]
        moved: Indices = moves[reps]
        return moved

    def _whole(self, rows: Indices) -> Indices:
        """Return rows of the part as rows of the whole."""
        X = np.zeros((len(rows), len(self._choices)), dtype=np.int64)
        for k, j in enumerate(self._at):
            X[:, j] = self.kept[j][rows[:, k]]
        return self._choices.canonical(X)

    def contains(self, X: Indices) -> npt.NDArray[np.bool_]:
        """Return which rows have kept values only, in the choices that exist."""
        stays = np.stack([inside[X[:, j]] for j, inside in enumerate(self._inside)], axis=1)
        return np.asarray((stays | ~self._choices.active(X)).all(axis=1))

    def brought_in(self, X: Indices) -> Indices:
        """Return rows, canonical or not, with kept values in place of dropped ones."""
        return np.stack([into[X[:, j]] for j, into in enumerate(self._into)], axis=1)

    def sample(self, n: int, rng: np.random.Generator) -> Indices:
        """Return n distinct members, uniformly drawn."""
        return self._whole(self._part.sample(n, rng))

    def blocks(self) -> Iterator[Indices]:
        """Yield all members in a fixed order."""
        return map(self._whole, self._part.blocks())

    def neighbours(self, row: Indices, distance: int) -> Indices:
        """Return the members around a row, or around where its dropped values go."""
        inside = self._choices.canonical(self.brought_in(row[None]))[0]
        # A choice that does not exist has index 0: dropped or not, that is position 0.
        at = np.array([np.searchsorted(self.kept[j], inside[j]) for j in self._at])
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

    def free(self, X: Indices, taken: set[bytes]) -> Indices:
        """Return each row that is no member as the nearest one not taken, or leave it out."""
        taken = set(taken)
        rows = []
        for row, member in zip(X, self.contains(X), strict=True):
            found = row if member else self.nearest(row, taken)
            if found is not None:
                taken.add(row_codes(found[None])[0])
                rows.append(found)
        return np.stack(rows) if rows else X[:0]


def end_of(choices: Choices, members: Members, *, largest: bool) -> Indices:
    """Return the largest or the smallest member as a row (1, n_choices); see `SearchSpace`."""
    ordered = np.array([choice.ordered for choice in choices.by_name.values()])
    last = np.array([len(values) - 1 for values in choices.values])
    X = choices.canonical(members.brought_in(np.where(ordered & largest, last, 0)[None]))
    if isinstance(members, PoolMembers) and not members.contains(X)[0]:
        score = encoded(choices, members.rows, "ordinal")[:, ordered].sum(axis=1)
        X = members.rows[[int(np.argmax(score if largest else -score))]]
    return X
