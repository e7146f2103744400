# SPDX-License-Identifier: Apache-2.0
"""SearchSpace: named choices and their subnets, counted, sampled, encoded and validated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_subnet._json import digest
from lightning_subnet._types import Indices
from lightning_subnet.errors import InvalidSubnetError, SpaceError, SpaceExhausted
from lightning_subnet.space.choices import Choice, Choices, Value, by_name, warn_of_order
from lightning_subnet.space.encoding import Encoding, column_names, encode
from lightning_subnet.space.members import (
    AllMembers,
    Members,
    PartMembers,
    PoolMembers,
    end_of,
    row_codes,
    value_indices,
)
from lightning_subnet.space.subnet import CODE, Subnet

Rng = np.random.Generator | int | None


class SearchSpace:
    """A space of named choices, some of which exist only under certain values of others.

    Args:
        choices: The choices by name, in gene order. A plain list is an ordered choice.
        **more: The same as keywords.

    Raises:
        SpaceError: No choices, fewer than two distinct subnets, or a `when=` that cannot hold.

    Example:
        >>> space = SearchSpace({
        ...     "depth": [2, 3, 4], "ks.0": [3, 5, 7], "ks.1": [3, 5, 7],
        ...     "ks.2": Choice([3, 5, 7], when={"depth": [3, 4]}),
        ...     "ks.3": Choice([3, 5, 7], when={"depth": [4]}),
        ... })
        >>> space.size  # 9 + 27 + 81
        117
        >>> space.largest
        Subnet(depth=4, ks=[7, 7, 7, 7])
        >>> space.encode(space.sample(10, rng=0)).shape
        (10, 15)
    """

    def __init__(
        self,
        choices: Mapping[str, Choice | Sequence[Value]] | None = None,
        /,
        **more: Choice | Sequence[Value],
    ) -> None:
        self._choices = Choices(by_name(choices, more))
        self._members: Members = AllMembers(self._choices)
        if self.size < 2:  # noqa: PLR2004 - a search needs an alternative
            msg = (
                f"The space has a single subnet, {self.smallest}, so there is nothing to search. "
                "Give at least one choice two values or more."
            )
            raise SpaceError(msg)
        warn_of_order(self._choices)

    # Choices and members

    @property
    def choices(self) -> dict[str, Choice]:
        """The choices by name, in gene order."""
        return dict(self._choices.by_name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the choices, in gene order."""
        return self._choices.names

    @property
    def values(self) -> dict[str, tuple[Value, ...]]:
        """The values that each choice takes; in a narrowed space, those that stayed."""
        values = {name: tuple(choice.values) for name, choice in self._choices.by_name.items()}
        if not isinstance(self._members, PartMembers):
            return values
        pairs = zip(values.items(), self._members.values, strict=True)
        return {name: tuple(whole[i] for i in part) for (name, whole), part in pairs}

    @property
    def size(self) -> int:
        """The exact number of distinct subnets."""
        return self._members.size

    @property
    def is_pool(self) -> bool:
        """Whether this is a listed part of a space (`restricted_to`)."""
        return isinstance(self._members, PoolMembers)

    @cached_property
    def smallest(self) -> Subnet:
        """Every choice at its first value; in a pool without that, the opposite of `largest`."""
        return self._wrap(end_of(self._choices, self._members, largest=False))[0]

    @cached_property
    def largest(self) -> Subnet:
        """Every ordered choice at its last value, categorical ones at their first.

        In a pool without that, the member with the greatest sum of relative positions, over the
        ordered choices.
        """
        return self._wrap(end_of(self._choices, self._members, largest=True))[0]

    def __contains__(self, subnet: object) -> bool:
        if not isinstance(subnet, Subnet):
            return False
        try:
            X = self.indices([subnet])
        except InvalidSubnetError:
            return False
        return bool(self._members.contains(X)[0]) and self._wrap(X)[0] == subnet

    def __iter__(self) -> Iterator[Subnet]:
        """Yield every subnet once, in a fixed order."""
        for X in self.index_blocks():
            yield from self.from_indices(X)

    def index_blocks(self) -> Iterator[Indices]:
        """Yield all subnets as canonical index arrays of some thousand rows, in a fixed order.

        Raises:
            SpaceError: The space has 2**62 subnets or more.
        """
        if self.size >= 2**62:
            msg = f"The space has {self.size} subnets, too many to enumerate. Use sample()."
            raise SpaceError(msg)
        return self._members.blocks()

    # Subnets from values and back

    def subnet(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> Subnet:
        """Return the subnet with these values, checked and in canonical form.

        Args:
            values: Values by name, flat (`{"ks.0": 3}`) or grouped (`{"ks": [3, 5]}`). Choices that
                do not exist under the others' values may be passed (and are ignored) or omitted.
            **more: The same as keywords.

        Returns:
            The subnet.

        Raises:
            InvalidSubnetError: An unknown name or value, a missing choice, or not in the pool.

        Example:
            >>> space = SearchSpace({"ks.0": [3, 5], "ks.1": [3, 5]})
            >>> space.subnet(ks=[3, 5]) == space.subnet({"ks.0": 3, "ks.1": 5})
            True
        """
        if values is not None and not isinstance(values, Mapping):
            msg = (
                f"A subnet is made of values by name, not of {values!r:.60}. "
                f"Write space.subnet({{{self.names[0]!r}: {self._choices.values[0][0]!r}, ...}})."
            )
            raise InvalidSubnetError(msg)
        X = self._choices.read({**(values or {}), **more})
        if not self._members.contains(X)[0]:
            hint = "Use a member (space.sample), or the space that this was made from."
            raise InvalidSubnetError(f"{self._not_a_member(X)} {hint}")
        return self._wrap(X)[0]

    def _not_a_member(self, X: Indices) -> str:
        kind = "pool" if self.is_pool else "space, which was narrowed"
        return f"{self._wrap(X)[0]} is not among the {self.size} subnets of this {kind}."

    def _wrap(self, X: Indices) -> list[Subnet]:
        return [Subnet(self._choices, code) for code in row_codes(X)]

    def from_indices(self, X: npt.ArrayLike) -> list[Subnet]:
        """Return subnets from value indices (n, n_choices), brought into canonical form.

        Raises:
            InvalidSubnetError: Another shape, or an index out of range.
        """
        return self._wrap(self._choices.canonical(self._choices.as_indices(X)))

    def indices(self, subnets: Iterable[Subnet]) -> Indices:
        """Return value indices (n, n_choices) of subnets, in the order of the choices.

        Raises:
            InvalidSubnetError: A subnet of another space whose values do not fit this one.
        """
        codes = [self._code_of(subnet) for subnet in subnets]
        return np.frombuffer(b"".join(codes), CODE).reshape(-1, len(self.names)).astype(np.int64)

    def _code_of(self, subnet: Subnet) -> bytes:
        """Return the value indices of a subnet, of this or another instance of the space."""
        if not isinstance(subnet, Subnet):
            msg = (
                f"{subnet!r:.60} is a {type(subnet).__name__}, not a Subnet. "
                "Give a list of subnets, each made by space.subnet(...)."
            )
            raise InvalidSubnetError(msg)
        code = subnet.code(self._choices)
        return row_codes(self._choices.read(subnet.active))[0] if code is None else code

    def canonical(self, X: Indices) -> Indices:
        """Return index rows in canonical form, so that equal networks have equal rows.

        In a narrowed space, values that it does not have go to the nearest ones that it has.
        """
        return self._choices.canonical(self._members.project(X))

    def active(self, X: Indices) -> npt.NDArray[np.bool_]:
        """Return a mask (n, n_choices) of the choices that exist in each index row."""
        return self._choices.active(X)

    # Drawing and moving

    def sample(self, n: int, rng: Rng = None) -> list[Subnet]:
        """Return n distinct subnets, uniform over the distinct subnets of the space.

        Args:
            n: How many; drawn without replacement.
            rng: A NumPy generator, or a seed for one.

        Raises:
            SpaceExhausted: n is more than `size`.
        """
        return self._wrap(self.sample_indices(n, rng))

    def sample_indices(self, n: int, rng: Rng = None) -> Indices:
        """Return n distinct subnets as canonical value indices (n, n_choices); see `sample`."""
        if n > self.size:
            msg = (
                f"{n} distinct subnets were asked of a space of {self.size}. "
                f"Ask for at most {self.size}."
            )
            raise SpaceExhausted(msg)
        if n < 1:
            return np.zeros((0, len(self.names)), dtype=np.int64)
        return self._members.sample(n, np.random.default_rng(rng))

    def neighbours(self, subnet: Subnet, *, distance: int = 1) -> list[Subnet]:
        """Return the subnets that differ in 1 to `distance` choices, nearest first.

        A choice that comes into existence by a change takes its first value and does not count as
        a difference. In a pool the members within that Hamming distance are returned.
        """
        return self._wrap(self._members.neighbours(self.indices([subnet])[0], distance))

    def restricted_to(self, subnets: Iterable[Subnet] | Indices) -> SearchSpace:
        """Return the pool of these subnets: a space that has no other members.

        Args:
            subnets: Members, as subnets or as value indices (n, n_choices).

        Raises:
            SpaceError: Fewer than two distinct members, or one outside this pool.

        Example:
            >>> space = SearchSpace({"depth": [1, 2, 3], "width": [8, 16]})
            >>> space.restricted_to(space.sample(4, rng=0)).size
            4
        """
        X = self.indices(
            self.from_indices(subnets) if isinstance(subnets, np.ndarray) else list(subnets)
        )
        if not (inside := self._members.contains(X)).all():
            hint = "Restrict the space that it was made from."
            raise SpaceError(f"{self._not_a_member(X[~inside])} {hint}")
        pool = self._of(PoolMembers(self._choices, X))
        if pool.size < 2:  # noqa: PLR2004 - a search needs an alternative
            msg = f"A pool needs at least two distinct subnets, not {pool.size}."
            raise SpaceError(msg)
        return pool

    def narrowed_to(self, values: Mapping[str, Sequence[Value]]) -> SearchSpace:
        """Return the part of the space in which choices have the listed values only.

        Its subnets are subnets of this space: the same choices, of which some values do not occur.
        A choice that depends on values which do not occur any more exists in none of them.

        Args:
            values: The values that stay, by name; a choice that is not named keeps all of its own.

        Raises:
            SpaceError: An unknown name or value, no value, or fewer than two subnets left.

        Example:
            >>> space = SearchSpace({"depth": [1, 2, 3], "width": [8, 16, 32]})
            >>> part = space.narrowed_to({"depth": [2, 3]})
            >>> part.size, part.smallest, part.largest in space
            (6, Subnet(depth=2, width=8), True)
        """
        members = PartMembers(
            self._choices, value_indices(self._choices, values, whole=self.values)
        )
        if isinstance(self._members, PoolMembers):
            rows = self._members.rows
            return self.restricted_to(rows[members.contains(rows)])
        part = self._of(members)
        if part.size < 2:  # noqa: PLR2004 - a search needs an alternative
            msg = f"A single subnet is left, {part.smallest}. Let more values stay."
            raise SpaceError(msg)
        return part

    def _of(self, members: Members) -> SearchSpace:
        """Return a space of the same choices with other members."""
        space = object.__new__(SearchSpace)
        space._choices, space._members = self._choices, members
        return space

    def nearest(self, X: Indices, exclude: set[bytes]) -> Indices:
        """Map rows that are not members to the nearest member; drop those for which none is left.

        Members come back as they are; so does every row where this is not a pool.

        Args:
            X: Canonical value indices (n, n_choices).
            exclude: Members that no row is mapped to, as `row_codes`. Nor are two rows to one.
        """
        return self._members.nearest(X, exclude)

    # Numbers for models

    def encode(
        self, subnets: Iterable[Subnet] | Indices, *, kind: Encoding = "onehot"
    ) -> npt.NDArray[np.float64]:
        """Return features (n, d) in which choices that do not exist are masked.

        Args:
            subnets: Subnets, or canonical value indices (n, n_choices).
            kind: `"onehot"`: one column per distinct value, all 0 where the choice does not exist.
                `"ordinal"`: one column per choice, the position of the value in (0, 1], 0 where the
                choice does not exist.

        Raises:
            SpaceError: Another kind.
        """
        X = subnets if isinstance(subnets, np.ndarray) else self.indices(subnets)
        return encode(self._choices, X, kind)

    def feature_names(self, kind: Encoding = "onehot") -> list[str]:
        """Return the names of the columns of `encode`."""
        return column_names(self._choices, kind)

    # Keeping

    def to_json(self) -> dict[str, Any]:
        """Return the space as JSON-able data; `from_json` reads it back."""
        data: dict[str, Any] = {"choices": self._choices.to_json()}
        if isinstance(self._members, PoolMembers):
            data["pool"] = self._members.rows.tolist()
        if isinstance(self._members, PartMembers):
            data["values"] = {name: list(values) for name, values in self.values.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> SearchSpace:
        """Return the space that `to_json` (or `json.dumps` of it) described.

        Raises:
            SpaceError: Not the data of a space.
        """
        try:
            data = json.loads(data) if isinstance(data, str) else data
            choices = {name: Choice.from_json(spec) for name, spec in data["choices"].items()}
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            msg = (
                f"This is not the JSON of a search space ({error!r}). "
                "Write it with space.to_json()."
            )
            raise SpaceError(msg) from error
        space = cls(choices)
        if "values" in data:
            return space.narrowed_to(data["values"])
        return space.restricted_to(np.array(data["pool"])) if "pool" in data else space

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the space that is the same in every process."""
        return digest({**self.to_json(), "order": self.names})  # pools and genes depend on it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SearchSpace) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return int(self.fingerprint[:15], 16)

    def __repr__(self) -> str:
        part = "narrowed space" if isinstance(self._members, PartMembers) else "SearchSpace"
        kind = "pool" if self.is_pool else part
        groups = ", ".join(
            f"{group}[{len(at)}]" if self._choices.is_list(group) else group
            for group, at in self._choices.groups.items()
        )
        return f"<{kind} of {self.size:,} subnets over {len(self.names)} choices: {groups}>"
