# SPDX-License-Identifier: Apache-2.0
"""A decision diagram over the choices: exact count, uniform draws and numbering of subnets.

The choices are placed one after the other, parents before children. All that the rest of a
placement depends on is which of the unplaced choices are already ruled out by others, so that set
is the state of a layer. For OFA's MobileNetV3 no layer has more than three states.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Indices
from lightning_subnet.errors import SpaceError
from lightning_subnet.space.choices import Choices

_MAX_STATES = 100_000
_MAX_RANK = 2**62
_NOTHING_RULED_OUT: frozenset[int] = frozenset()


class Diagram:
    """All distinct subnets of a space, as paths through a layered graph.

    Args:
        choices: The resolved choices.

    Attributes:
        order: The positions of the choices, as they are placed.
        transitions: By layer, the next state by state and value; -1 where there is no such value.
        size: The exact number of subnets.

    Raises:
        SpaceError: The dependencies are too entangled to be counted exactly.
    """

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self._children: list[list[int]] = [[] for _ in choices.names]
        for j, dependencies in enumerate(choices.dependencies):
            for parent, _ in dependencies:
                self._children[parent].append(j)
        self.order = self._placement()
        self.transitions = self._transitions()
        self._counts = self._completions()
        self.size: int = self._counts[0][0]
        self._cumulative = self._probabilities()
        self._offsets = self._numbering() if self.size < _MAX_RANK else None

    def _placement(self) -> list[int]:
        """Order the choices so that as few dependencies as possible stay open between layers."""
        parents = [{parent for parent, _ in some} for some in self._choices.dependencies]
        left = set(range(len(parents)))
        order: list[int] = []
        awaited: set[int] = set()  # choices with a placed parent
        while left:
            ready = [j for j in left if not parents[j] & left]
            blocking = {p for j in awaited & left for p in parents[j]}
            best = min(
                ready,
                key=lambda j: (
                    0 if j in awaited else 1 if j in blocking else 2,
                    len(self._children[j]),
                    j,
                ),
            )
            order.append(best)
            left.remove(best)
            awaited |= set(self._children[best])
        return order

    def _transitions(self) -> list[Indices]:
        """Return by layer the next state, (states, values); -1 where there is no such value."""
        layers = []
        states = {_NOTHING_RULED_OUT: 0}
        for j in self.order:
            values = self._choices.distinct[j]
            table = np.full((len(states), len(values)), -1, dtype=np.int64)
            after: dict[frozenset[int], int] = {}
            rules = [
                (child, allowed)
                for child in self._children[j]
                for parent, allowed in self._choices.dependencies[child]
                if parent == j
            ]
            for state, row in states.items():
                rest = state - {j}
                if j in state:  # does not exist: one way on, and its own children do not exist
                    ruled_out = rest | {child for child, _ in rules}
                    table[row, 0] = after.setdefault(ruled_out, len(after))
                    continue
                for v, value in enumerate(values):
                    ruled_out = rest | {child for child, allowed in rules if not allowed[value]}
                    table[row, v] = after.setdefault(ruled_out, len(after))
            if len(after) > _MAX_STATES:
                msg = (
                    f"The choices of this space are too entangled to count its subnets (over "
                    f"{_MAX_STATES} open cases at {self._choices.names[j]!r}). "
                    "Let choices depend on fewer others."
                )
                raise SpaceError(msg)
            layers.append(table)
            states = after
        return layers

    def _completions(self) -> list[list[int]]:
        """Return by layer and state the exact number of paths to the end."""
        counts: list[list[int]] = [[]] * (len(self.order) + 1)
        counts[-1] = [1] * (int(self.transitions[-1].max()) + 1)
        for k in range(len(self.order) - 1, -1, -1):
            after = counts[k + 1]
            counts[k] = [
                sum(after[s] for s in row if s >= 0) for row in self.transitions[k].tolist()
            ]
        return counts

    def _probabilities(self) -> list[npt.NDArray[np.float64]]:
        """Return by layer, state and value the share of paths up to it, for `draw`."""
        tables = []
        for k, layer in enumerate(self.transitions):
            table = np.zeros(layer.shape)
            for row, states in enumerate(layer.tolist()):
                paths = 0
                for v, s in enumerate(states):
                    paths += self._counts[k + 1][s] if s >= 0 else 0
                    table[row, v] = paths / self._counts[k][row]
            tables.append(table)
        return tables

    def _numbering(self) -> list[Indices]:
        """Return by layer, state and value the subnets up to it, for `unrank`."""
        tables = []
        for k, layer in enumerate(self.transitions):
            counts = np.append(np.array(self._counts[k + 1], dtype=np.int64), 0)
            tables.append(np.cumsum(counts[layer], axis=1))
        return tables

    def draw(self, n: int, rng: np.random.Generator) -> Indices:
        """Return n uniform draws with replacement, canonical indices (n, n_choices)."""
        X = np.zeros((n, len(self.order)), dtype=np.int64)
        state = np.zeros(n, dtype=np.int64)
        for k, j in enumerate(self.order):
            below = self._cumulative[k][state, :-1]
            v = (rng.random(n)[:, None] >= below).sum(axis=1)
            X[:, j] = self._choices.distinct[j][v]
            state = self.transitions[k][state, v]
        return X

    def unrank(self, ranks: Indices) -> Indices:
        """Return the subnets of these numbers (n,) in 0..size-1 as indices (n, n_choices)."""
        assert self._offsets is not None, "numbering needs a space of fewer than 2**62 subnets"
        X = np.zeros((len(ranks), len(self.order)), dtype=np.int64)
        left = np.array(ranks, dtype=np.int64)
        state = np.zeros(len(left), dtype=np.int64)
        for k, j in enumerate(self.order):
            before = self._offsets[k][state]
            v = (left[:, None] >= before[:, :-1]).sum(axis=1)
            left -= np.where(v > 0, before[np.arange(len(v)), np.maximum(v - 1, 0)], 0)
            X[:, j] = self._choices.distinct[j][v]
            state = self.transitions[k][state, v]
        return X

    @property
    def is_numbered(self) -> bool:
        """Whether `unrank` works: the space has fewer than 2**62 subnets."""
        return self._offsets is not None
