# SPDX-License-Identifier: Apache-2.0
"""Places of the blocks in a network, looked up by choices for thousands of subnets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.costs.tables.blocks import Tracer

_MOST = 512  # combinations of the choices that one block depends on
_VERIFIED = 24  # random subnets on which the lookup is verified
_SAME_FOR, _MOST_TRACED = 30, 600  # without a lookup: until so many subnets show nothing new


@dataclass(frozen=True)
class Place:
    """The block in one place of a network, by the choices that it depends on.

    Args:
        at: The positions of those choices.
        keys: The key of the block, by the value indices of the choices; no block without a key.
    """

    at: tuple[int, ...]
    keys: Mapping[tuple[int, ...], str]

    def costs(self, X: Indices, sizes: Sequence[int], ms: Mapping[str, float]) -> Floats:
        """Return the cost of the block in each row of X (n,); 0 where there is none.

        Args:
            X: Value indices (n, n_choices).
            sizes: How many values each choice has.
            ms: The cost of each kind of block, by key.
        """
        table = np.full([sizes[j] for j in self.at] or [1], np.nan)
        for combination, key in self.keys.items():
            table[combination or 0] = ms[key] if key else 0.0
        costs: Floats = table[tuple(X[:, j] for j in self.at) or np.zeros(len(X), dtype=int)]
        return costs


def layout(tracer: Tracer, *, rng: np.random.Generator) -> list[Place] | None:
    """Return the places of all subnets' blocks, or None if a place depends on too many choices.

    One choice after the other is changed, in the largest and in a random subnet, to see which
    blocks it changes; then all combinations of those choices are looked at. The outcome is verified
    on random subnets.

    Args:
        tracer: Traces subnets; afterwards it has one block of each kind in the space.
        rng: Draws subnets.
    """
    space = tracer.space
    sizes = [len(choice.values) for choice in space.choices.values()]
    bases = [space.largest, *space.sample(1, rng)]
    depends: dict[str, set[int]] = {}
    for base in bases:
        row, before = space.indices([base])[0], tracer(base)
        for place in before:
            depends.setdefault(place, set())
        for near in space.neighbours(base):
            there = tracer(near)
            positions = np.flatnonzero(space.indices([near])[0] != row)
            live = space.active(row[None])[0][positions]
            (j, *_) = positions[live] if live.any() else positions
            for place in {*before, *there}:
                if before.get(place) != there.get(place):
                    depends.setdefault(place, set()).add(int(j))
    ats = {place: tuple(sorted(on)) for place, on in depends.items()}
    if any(np.prod([sizes[j] for j in at]) > _MOST for at in ats.values()):
        return None
    keys = _keys_of(tracer, ats, sizes, [space.indices([base])[0] for base in bases])
    places = {place: Place(ats[place], table) for place, table in keys.items()}
    for subnet in space.sample(min(_VERIFIED, space.size), rng):
        row, traced = space.indices([subnet])[0], tracer(subnet)
        keys_of_row = {
            name: place.keys.get(tuple(int(row[j]) for j in place.at), "?")
            for name, place in places.items()
        }
        if {name: key for name, key in keys_of_row.items() if key} != traced:
            return None
    return list(places.values())


def _keys_of(
    tracer: Tracer,
    ats: Mapping[str, tuple[int, ...]],
    sizes: Sequence[int],
    bases: Sequence[Indices],
) -> dict[str, dict[tuple[int, ...], str]]:
    """Return the keys of each place by combination, from the few subnets of a greedy cover."""
    space = tracer.space
    waiting: dict[str, dict[tuple[int, ...], Indices]] = {}
    for place, at in ats.items():
        waiting[place] = {}
        for combination in product(*(range(sizes[j]) for j in at)):
            for base in bases:
                row = base.copy()
                row[list(at)] = combination
                row = space.canonical(row[None])[0]
                if tuple(row[list(at)]) == combination:  # else a choice among them does not exist
                    waiting[place].setdefault(combination, row)
    keys: dict[str, dict[tuple[int, ...], str]] = {place: {} for place in ats}
    while any(waiting.values()):
        first = next(place for place in waiting if waiting[place])
        alone = next(iter(waiting[first].values()))
        row, fixed = alone.copy(), set(ats[first])
        for place, left in waiting.items():
            for combination in left:
                if all(
                    row[j] == v or j not in fixed
                    for j, v in zip(ats[place], combination, strict=True)
                ):
                    row[list(ats[place])] = combination
                    fixed |= set(ats[place])
                    break
        for attempt in (space.canonical(row[None]), alone[None]):
            traced = tracer(space.from_indices(attempt)[0])
            for place, at in ats.items():
                combination = tuple(int(attempt[0, j]) for j in at)
                keys[place][combination] = traced.get(place, "")
                waiting[place].pop(combination, None)
            if next(iter(waiting[first].values()), None) is not alone:
                break
    return keys


def trace_sample(tracer: Tracer, *, rng: np.random.Generator) -> int:
    """Trace random subnets until they show no new block; return how many were traced."""
    space, same, n_traced = tracer.space, 0, 0
    for subnet in [
        space.largest,
        space.smallest,
        *space.sample(min(_MOST_TRACED, space.size), rng),
    ]:
        before = len(tracer.kinds)
        tracer(subnet)
        n_traced += 1
        same = 0 if len(tracer.kinds) > before else same + 1
        if same >= _SAME_FOR:
            break
    return n_traced
