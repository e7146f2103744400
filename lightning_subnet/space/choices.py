# SPDX-License-Identifier: Apache-2.0
"""Choices: what may vary, in which order, and on which other choices each depends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._json import digest
from lightning_subnet._messages import did_you_mean, listed, warn
from lightning_subnet._types import Indices
from lightning_subnet.errors import ElasticityWarning, InvalidSubnetError, SpaceError

Value = str | int | float | bool | None

_RESERVED = {"front", "generation", "number", "reason", "reused", "seconds", "status"}
_MAX_VALUES = 2**16
_UNSAID: Any = None  # stands for True where the caller says nothing


def plain(value: object) -> Value:
    """Return a JSON scalar for a value (NumPy scalars are unpacked), or raise `SpaceError`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        msg = f"The value {value!r} is not finite. Values of a choice are finite JSON scalars."
        raise SpaceError(msg)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    msg = (
        f"The value {value!r} is a {type(value).__name__}. Values of a choice are str, int, float, "
        "bool or None: name a structured value by a string and look it up in `activate`."
    )
    raise SpaceError(msg)


def _numbers(values: Iterable[Value]) -> list[float]:
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


def _single(value: object) -> bool:
    """Return whether this is one value, not a collection of values."""
    return isinstance(value, (str, bytes)) or not isinstance(value, Iterable)


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing that varies between subnets.

    Args:
        values: The values it may take. For an ordered choice from the smallest network to the
            largest; `space.smallest` and `space.largest` are taken from its ends. A space warns of
            numbers that do not ascend.
        ordered: Whether the order of the values means something (3 < 5 < 7), as is supposed. A
            categorical choice (operators, say) has `ordered=False`. An `ordered=True` that is
            written out says that the order is meant, without a warning where numbers descend:
            with a stride or a patch size the larger number is the smaller network.
        when: The choice exists only while every named earlier choice exists and has one of the
            listed values: `{"depth": [3, 4]}`.
        same: Groups of values that mean the same network, as the first two depths of OFA's
            ResNet50 stem do: `[(0, 1)]`. Each group counts as one value, its first.

    Raises:
        SpaceError: No values, a repeated value, or a value that is not a JSON scalar.

    Example:
        >>> Choice([3, 5, 7], when={"depth": [3, 4]}).values
        (3, 5, 7)
        >>> Choice([0, 1, 2], same=[(0, 1)]).representative(1)
        0
        >>> from lightning_subnet import SearchSpace
        >>> SearchSpace(stride=Choice([4, 2, 1], ordered=True)).largest
        Subnet(stride=1)
    """

    values: Sequence[Value]
    ordered: bool = field(default=_UNSAID, kw_only=True)
    when: Mapping[str, Sequence[Value]] = field(default_factory=dict, kw_only=True)
    same: Sequence[Sequence[Value]] = field(default=(), kw_only=True)
    _supposed: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if _single(self.values) or isinstance(self.values, (Set, Mapping)):  # a set has no order
            msg = f"The values of a choice are a list, not {self.values!r}. Write [3, 5, 7], say."
            raise SpaceError(msg)
        values = tuple(plain(value) for value in self.values)
        if not values:
            msg = "A choice has no values. Give the list of values it may take."
            raise SpaceError(msg)
        if len(values) > _MAX_VALUES:
            msg = f"A choice has {len(values)} values; at most {_MAX_VALUES} are supported."
            raise SpaceError(msg)
        if len(set(values)) < len(values):
            repeated = next(v for i, v in enumerate(values) if v in values[:i])
            msg = f"The value {repeated!r} stands twice in {list(values)}. List each value once."
            raise SpaceError(msg)
        if not isinstance(self.when or {}, Mapping):
            msg = f"when={self.when!r} is not a mapping. Write when={{'depth': [3, 4]}}, say."
            raise SpaceError(msg)
        when = {
            name: tuple(plain(v) for v in ([allowed] if _single(allowed) else allowed))
            for name, allowed in (self.when or {}).items()
        }
        grouped = not _single(self.same) and not any(_single(group) for group in self.same)
        same = tuple(tuple(plain(v) for v in group) for group in self.same) if grouped else ()
        members = [v for group in same for v in group]
        if not grouped or any(v not in values for v in members) or len(set(members)) < len(members):
            msg = (
                f"same={self.same!r} must name values of {list(values)}, "
                "each once: same=[(0, 1)] says that 0 and 1 mean the same network."
            )
            raise SpaceError(msg)
        supposed = self.ordered is _UNSAID
        settled = {"values": values, "when": when, "same": same, "_supposed": supposed}
        if supposed:
            settled["ordered"] = True
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @property
    def ascends(self) -> bool:
        """Whether the numbers among its values grow, values that mean the same network aside.

        Texts, booleans and None have no size, so they stand anywhere.
        """
        distinct = [v for i, v in enumerate(self.values) if self.representative(i) == i]
        numbers = _numbers(distinct)
        return numbers == sorted(numbers)

    def representative(self, index: int) -> int:
        """Return the index of the first value that means the same network as `values[index]`."""
        for group in self.same:
            if self.values[index] in group:
                return min(self.values.index(v) for v in group)
        return index

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON-able data, without defaults."""
        data: dict[str, Any] = {"values": list(self.values)}
        if not self.ordered:
            data["ordered"] = False
        if self.when:
            data["when"] = {name: list(allowed) for name, allowed in self.when.items()}
        if self.same:
            data["same"] = [list(group) for group in self.same]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """Return the choice that `to_json` described."""
        options = {key: data[key] for key in ("when", "same") if key in data}
        # The order was that of the data: a study that is opened again repeats no warning.
        return cls(data["values"], ordered=data.get("ordered", True), **options)


def by_name(
    mapping: Mapping[str, Choice | Sequence[Value]] | None,
    keywords: Mapping[str, Choice | Sequence[Value]],
) -> dict[str, Choice]:
    """Return the choices of a space by name, those of a mapping and those of keywords.

    Raises:
        SpaceError: Not a mapping, a name in both, or values that a choice cannot have.
    """
    if mapping is not None and not isinstance(mapping, Mapping):
        msg = (
            f"A space is made of choices by name, not of a {type(mapping).__name__}. "
            'Write SearchSpace({"depth": [2, 3, 4]}).'
        )
        raise SpaceError(msg)
    if twice := [name for name in keywords if name in (mapping or {})]:
        msg = f"Choice {twice[0]!r} is given in the mapping and as a keyword. Give it once."
        raise SpaceError(msg)
    choices = {}
    for name, choice in {**(mapping or {}), **keywords}.items():
        try:
            choices[name] = choice if isinstance(choice, Choice) else Choice(choice)
        except SpaceError as error:
            msg = f"Choice {name!r}: {error}"
            raise SpaceError(msg) from None
    return choices


def warn_of_order(choices: Choices) -> None:
    """Warn of ordered choices whose numbers do not ascend, unless their order is said to be meant.

    One warning names them all, and none of them is named again: a choice that is used in another
    space (a copy, a part) was warned of before.
    """
    doubtful = {
        name: choice
        for name, choice in choices.by_name.items()
        if choice.ordered and choice._supposed and not choice.ascends
    }
    if not doubtful:
        return
    for choice in doubtful.values():
        object.__setattr__(choice, "_supposed", False)
    name, first = next(iter(doubtful.items()))
    numbers = iter(sorted(_numbers(first.values)))
    ascending = [next(numbers) if _numbers([value]) else value for value in first.values]
    others = f" So it is with {listed([*doubtful][1:], 20)}." if len(doubtful) > 1 else ""
    warn(
        f"The values of {name!r}, {list(first.values)!r:.120}, do not ascend. An ordered choice "
        "goes from the smallest network to the largest, so the largest subnet has "
        f"{first.values[-1]!r} there.{others} Write {ascending!r:.120}, or "
        "Choice(..., ordered=False) for values without an order; Choice(..., ordered=True) says "
        "that the order is meant, as where a larger stride is a smaller network.",
        ElasticityWarning,
    )


class Choices:
    """The resolved choices of a space: names, value tables, dependencies by index.

    An assignment of n subnets is an integer array (n, n_choices) of value indices, in the order of
    the choices. It is *canonical* if every inactive choice has index 0 and every active one the
    first of the values that mean the same network.

    Args:
        choices: The choices by name; the order is the gene order.

    Attributes:
        by_name: The choices.
        names: Their names.
        position: The place of each name in the order.
        values: The values of each.
        index_of: By choice, the index of each value.
        representatives: By choice, for each value index that of the first value which means the
            same network.
        distinct: By choice, the value indices that mean different networks.
        dependencies: By choice, the position of each choice that it depends on, with the mask of
            the value indices under which it exists.

    Raises:
        SpaceError: No choices, a bad name, or a `when=` that cannot be resolved.
    """

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        if not choices:
            msg = 'A space needs at least one choice, e.g. SearchSpace({"depth": [2, 3, 4]}).'
            raise SpaceError(msg)
        self.by_name: Mapping[str, Choice] = MappingProxyType(dict(choices))
        self.names = tuple(self.by_name)
        self.position = {name: i for i, name in enumerate(self.names)}
        self.values = tuple(choice.values for choice in self.by_name.values())
        self.index_of = tuple({v: i for i, v in enumerate(values)} for values in self.values)
        self.representatives = tuple(
            np.array([choice.representative(i) for i in range(len(choice.values))])
            for choice in self.by_name.values()
        )
        self.distinct = tuple(np.unique(reps) for reps in self.representatives)
        self.dependencies = tuple(self._resolve(name) for name in self.names)

    def _resolve(self, name: str) -> tuple[tuple[int, npt.NDArray[np.bool_]], ...]:
        """Return the dependencies of one choice."""
        if not isinstance(name, str) or not name or name in _RESERVED:
            msg = (
                f"The name {name!r} cannot be used: names of choices are non-empty strings, "
                f"other than {', '.join(sorted(_RESERVED))}, which are columns of every table."
            )
            raise SpaceError(msg)
        resolved = []
        for parent, allowed in self.by_name[name].when.items():
            if parent not in self.position:
                msg = (
                    f"Choice {name!r} exists when {parent!r} has some value, but the space has "
                    f"no such choice.{did_you_mean(parent, self.names)} "
                    f"Its choices: {listed(self.names)}."
                )
                raise SpaceError(msg)
            at = self.position[parent]
            if at >= self.position[name]:
                msg = (
                    f"Choice {name!r} depends on {parent!r}, which does not stand before it. "
                    f"A choice depends on earlier ones: put {parent!r} before {name!r}."
                )
                raise SpaceError(msg)
            unknown = [v for v in allowed if v not in self.index_of[at]]
            if unknown or not allowed:
                msg = (
                    f"Choice {name!r} exists when {parent!r} is in {list(allowed)}, but "
                    f"{parent!r} takes {list(self.values[at])}. List one or more of those values."
                )
                raise SpaceError(msg)
            reps = self.representatives[at]
            mask = np.isin(reps, [reps[self.index_of[at][v]] for v in allowed])
            resolved.append((at, mask))
        return tuple(resolved)

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return Choices, (dict(self.by_name),)

    def active(self, X: Indices) -> npt.NDArray[np.bool_]:
        """Return a mask (n, n_choices) of the choices that exist in assignments (n, n_choices)."""
        mask = np.ones(X.shape, dtype=bool)
        for j, dependencies in enumerate(self.dependencies):
            for parent, allowed in dependencies:
                mask[:, j] &= mask[:, parent] & allowed[X[:, parent]]
        return mask

    def as_indices(self, X: npt.ArrayLike) -> Indices:
        """Return value indices as an integer array (n, n_choices).

        Raises:
            InvalidSubnetError: Another shape, not whole numbers, or an index out of range.
        """
        X = np.asarray(X)
        if X.dtype.kind not in "iu" and not (X.dtype.kind == "f" and (np.floor(X) == X).all()):
            msg = f"Indices are whole numbers, not {X!r:.60}. Use space.subnet(...) for values."
            raise InvalidSubnetError(msg)
        if X.ndim != 2 or X.shape[1] != len(self.names):  # noqa: PLR2004 - a matrix
            msg = f"Indices have shape (n, {len(self.names)}), one column a choice, not {X.shape}."
            raise InvalidSubnetError(msg)
        limits = np.array([len(values) for values in self.values])
        wrong = np.argwhere((limits <= X) | (X < 0))
        if len(wrong):
            row, j = wrong[0]
            msg = (
                f"Index {X[row, j]} of {self.names[j]!r} in row {row} is not in 0..{limits[j] - 1}."
            )
            raise InvalidSubnetError(msg)
        return X.astype(np.int64)

    def canonical(self, X: Indices) -> Indices:
        """Return `X` in canonical form, so that equal networks have equal rows."""
        out = np.where(self.active(X), X, 0)
        for j, reps in enumerate(self.representatives):
            if len(self.distinct[j]) < len(reps):
                out[:, j] = reps[out[:, j]]
        return out

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Positions by group: `ks.0, ks.1` form the group `ks`, a name without a number itself."""
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            stem, dot, tail = name.rpartition(".")
            groups.setdefault(stem if dot and stem and tail.isdigit() else name, []).append(i)
        numbers = {stem: [self.names[i] for i in at] for stem, at in groups.items()}
        result: dict[str, tuple[int, ...]] = {}
        for stem, at in groups.items():
            if numbers[stem] == [stem]:
                result[stem] = tuple(at)
            elif sorted(numbers[stem]) == sorted(f"{stem}.{k}" for k in range(len(at))):
                result[stem] = tuple(
                    sorted(at, key=lambda i: int(self.names[i].rpartition(".")[2]))
                )
            else:  # ks, ks.0 or ks.1, ks.3: no list can hold them, so each stands alone
                result.update({self.names[i]: (i,) for i in at})
        return result

    def is_list(self, group: str) -> bool:
        """Return whether the group is a numbered list, not a single choice."""
        return self.groups[group] != (self.position.get(group),)

    def flatten(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values by name of choice from flat or grouped ones.

        Raises:
            InvalidSubnetError: An unknown name, or a list of the wrong length.
        """
        flat: dict[str, Any] = {}
        for name, value in values.items():
            if name in self.position:
                flat[name] = value
                continue
            at = self.groups.get(name)
            if at is None:
                names = [*self.groups, *(n for n in self.names if n not in self.groups)]
                msg = (
                    f"{name!r} is not a choice of this space.{did_you_mean(name, names)} "
                    f"Its choices: {listed(self.groups)}."
                )
                raise InvalidSubnetError(msg)
            items = (
                list(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
            )
            if items is None or len(items) != len(at):
                instead = f"{len(items)} values" if items is not None else repr(value)
                msg = (
                    f"{name!r} is a list of {len(at)} choices, not {instead}. "
                    f"Give a list of {len(at)}."
                )
                raise InvalidSubnetError(msg)
            members = {self.names[i]: item for i, item in zip(at, items, strict=True)}
            if twice := [member for member in members if member in values]:
                msg = f"{twice[0]!r} is given alone and within {name!r}. Give it once."
                raise InvalidSubnetError(msg)
            flat.update(members)
        return flat

    def read(self, values: Mapping[str, Any]) -> Indices:
        """Return the canonical row (1, n_choices) of flat or grouped values.

        Raises:
            InvalidSubnetError: An unknown name or value, or no value for a choice that exists.
        """
        flat = self.flatten(values)
        X = np.zeros((1, len(self.names)), dtype=np.int64)
        unread = np.zeros(X.shape, dtype=bool)
        problems: dict[int, str] = {}
        for j, name in enumerate(self.names):
            if name not in flat or (flat[name] is None and None not in self.index_of[j]):
                unread[0, j] = True
                problems[j] = f"The value of {name!r} is missing."
                continue
            try:
                X[0, j] = self.index_of[j][plain(flat[name])]
            except (KeyError, SpaceError):
                unread[0, j] = True
                problems[j] = f"{name!r} cannot be {flat[name]!r}."
        if problems:
            needed = np.flatnonzero(self.active(X)[0] & unread[0])
            if len(needed):
                j = int(needed[0])
                msg = f"{problems[j]} It takes one of {listed(self.values[j])}."
                raise InvalidSubnetError(msg)
        return self.canonical(X)

    def to_json(self) -> dict[str, Any]:
        """Return the choices as JSON-able data."""
        return {name: choice.to_json() for name, choice in self.by_name.items()}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the choices that is the same in every process."""
        return digest(self.to_json())
