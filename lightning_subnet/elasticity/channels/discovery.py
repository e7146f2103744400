# SPDX-License-Identifier: Apache-2.0
"""Which channels of a network must be dropped together: groups of units, by probing its own code.

An output channel of one operator is NaN, and where NaN arrives tells what reads the channel and
what lies between: all of that is one unit. Many channels are coded in few rows by the bits of their
numbers; where one channel taints several, as in attention, they are probed block by block.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from lightning_subnet.elasticity.channels.operators import Axis, Operator, Taint
from lightning_subnet.elasticity.channels.probing import Probe, Prober

_FEW = 64  # entries of a parameter of its own that are tried one by one

Node = tuple[Hashable, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Units of channels, any of which may be dropped from a network.

    Attributes:
        axes: By parameter or buffer and dimension, the indices of each unit, (units, n).
        sizes: The sizes of these dimensions.
        readers: Those of the axes that read the channels.
        norms: Those of the axes whose layer normalises over the channels.
        spreads: Whether channels of a unit depend on one another, as those of a head do.
    """

    axes: Mapping[Axis, torch.Tensor]
    sizes: Mapping[Axis, int]
    readers: tuple[Axis, ...]
    norms: tuple[Axis, ...] = ()
    spreads: bool = False

    @property
    def units(self) -> int:
        """Number of units."""
        return len(next(iter(self.axes.values())))


@dataclass
class Discovery:
    """What probing shows of a network.

    Attributes:
        groups: The groups of channels, in the order in which the network runs.
        refused: By axis, why its channels cannot be dropped.
        macs: By the name of a weight, the multiply-accumulates of the operators that use it, for
            the example.
        passes: Number of forward passes that it took.
    """

    groups: list[ChannelGroup] = field(default_factory=list)
    refused: dict[Axis, str] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    passes: int = 0


def discover(net: nn.Module, example_input: Any) -> Discovery:
    """Return the groups of channels of a network.

    Args:
        net: The network, which is left as it was.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        ElasticityError: The network does not take the input, or does not run alike twice.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [group] = discover(net, torch.zeros(1, 4)).groups
        >>> group.units, sorted(group.axes)
        (8, [('0.bias', 0), ('0.weight', 0), ('2.weight', 1)])
    """
    inner: frozenset[str] = frozenset()
    passes = 0
    while True:
        search = _Search(Prober(net, example_input, inner))
        search.run()
        passes += search.prober.passes
        if not search.inner - inner:
            discovery = search.result()
            discovery.passes = passes
            return discovery
        inner |= search.inner  # these work inside of units, on each of them alike


class _Units:
    """Nodes that belong together, and why some cannot be dropped."""

    def __init__(self) -> None:
        self._parents: dict[Node, Node] = {}
        self.reasons: dict[Node, str] = {}
        self.spread: set[Node] = set()

    def find(self, node: Node) -> Node:
        """Return the node that stands for all that belong to one."""
        root = self._parents.setdefault(node, node)
        while root != self._parents[root]:
            root = self._parents[root]
        while node != root:
            self._parents[node], node = root, self._parents[node]
        return root

    def join(self, one: Node, other: Node) -> None:
        """Note that two belong together."""
        a, b = self.find(one), self.find(other)
        if a == b:
            return
        self._parents[a] = b
        if a in self.reasons:
            self.reasons.setdefault(b, self.reasons.pop(a))
        if a in self.spread:
            self.spread.add(b)

    def refuse(self, node: Node, reason: str) -> None:
        """Note that one cannot be dropped."""
        self.reasons.setdefault(self.find(node), reason)

    def sets(self) -> dict[Node, list[Node]]:
        """Return all nodes by the one that stands for them."""
        sets = defaultdict(list)
        for node in list(self._parents):
            sets[self.find(node)].append(node)
        return sets


class _Search:
    """One search for groups.

    Args:
        prober: Runs the network.

    Attributes:
        inner: Parameters of normalisations that turned out to work inside of units.
    """

    def __init__(self, prober: Prober) -> None:
        self.prober = prober
        self.operators = prober.operators
        self.units = _Units()
        self.inner: set[str] = set()
        self._first: dict[Axis, int] = {}  # the first operator that uses an axis
        self._readers: set[Axis] = set()
        self._norms: set[Axis] = set()
        self._sources_at: dict[Node, dict[int, Node]] = defaultdict(dict)

    def run(self) -> None:
        """Probe everything."""
        for i, operator in enumerate(self.operators):
            self._join_tensors(i, operator)
        sources = [i for i, op in enumerate(self.operators) if op.kind != "scale"]
        for i in self._coded(sources):
            self._by_blocks(i)
        for name in sorted(self.prober.free - self.prober.computed):
            for dim, size in enumerate(self.prober.tensors[name].shape):
                if size > 1:
                    self._by_entries(name, dim, size)

    def result(self) -> Discovery:
        """Return the groups."""
        by_signature: dict[Any, list[tuple[Node, dict[Axis, list[int]]]]] = defaultdict(list)
        refused: dict[Axis, str] = {}
        hidden: set[Node] = set()  # what is read by weights that are computed
        for root, nodes in self.units.sets().items():
            axes: dict[Axis, list[int]] = defaultdict(list)
            for node in nodes:
                if node[0] == "w":
                    axes[node[1], node[2]].append(node[3])  # type: ignore[index,arg-type]
                elif node[0] == "in" and self._is_hidden(node):
                    hidden.add(root)
            if not axes:
                continue
            if root in self.units.reasons:
                for axis in axes:
                    refused.setdefault(axis, self.units.reasons[root])
                continue
            signature = tuple(sorted((axis, len(indices)) for axis, indices in axes.items()))
            by_signature[signature].append((root, axes))
        groups = []
        for signature, units in by_signature.items():
            names = [axis for axis, _ in signature]
            readers = tuple(axis for axis in names if axis in self._readers)
            computed = any(root in hidden for root, _ in units)
            reason = self._why_no_group(names, readers, len(units), computed=computed)
            if not reason:
                groups.append(self._group(names, readers, units))
            for axis in names if reason else ():
                refused.setdefault(axis, reason)
        groups.sort(key=lambda group: min(map(self._place, group.axes)))
        refused = {**self._out_of_reach(), **refused}
        # Of a layer that reads the input, what becomes of its output says more.
        refused = dict(sorted(refused.items(), key=lambda item: item[1] == _INPUT))
        return Discovery(groups, refused, self._macs())

    def _why_no_group(
        self, names: list[Axis], readers: tuple[Axis, ...], n_units: int, *, computed: bool
    ) -> str:
        """Return why axes that belong together are no group; an empty string if they are."""
        if not readers:
            if computed:
                return "weights that are computed across its channels read it"
            return "no operator that mixes channels reads it"
        if len(readers) == len(names):
            return _INPUT
        return "all of its channels depend on one another" if n_units == 1 else ""

    def _out_of_reach(self) -> dict[Axis, str]:
        """Return parameters that nothing is known of, each with the reason."""
        used = {name for op in self.operators for name in op.names} | self.prober.free
        fixed = {n for op in self.operators if op.kind == "fixed" for n in op.derived}
        unused = {n for n in dict(self.prober.net.named_parameters()) if n not in used}
        return {(n, 0): _FIXED for n in sorted(fixed)} | {(n, 0): _UNUSED for n in sorted(unused)}

    def _is_hidden(self, node: Node) -> bool:
        """Return whether an operator reads channels by weights of no known name."""
        i: int = node[1]  # type: ignore[assignment]
        operator = self.operators[i]
        return operator.kind == "mix" and operator.groups == 1 and not operator.reads

    def _place(self, axis: Axis) -> int:
        return self._first.get(axis, len(self.operators))

    def _macs(self) -> dict[str, int]:
        macs: dict[str, int] = defaultdict(int)
        for operator in self.operators:
            if operator.kind == "mix" and operator.n_in:
                positions = prod(operator.out_shape) // max(operator.n_out, 1)
                names = [*operator.derived, *(n for n, _ in (*operator.gives, *operator.gates))]
                sizes = {n: self.prober.tensors[n].numel() for n in names}
                if operator.derived:  # the largest is what the others scale or add to
                    sizes = {n: sizes[n] for n in sorted(sizes, key=lambda n: -sizes[n])[:1]}
                for name, size in sizes.items():
                    if self.prober.tensors[name].ndim > 1:
                        macs[name] += positions * size
        return dict(macs)

    def _group(
        self, names: list[Axis], readers: tuple[Axis, ...], units: list[Any]
    ) -> ChannelGroup:
        names = sorted(names, key=self._place)
        units = sorted(units, key=lambda unit: [sorted(unit[1][axis]) for axis in names])
        return ChannelGroup(
            {axis: torch.tensor([sorted(axes[axis]) for _, axes in units]) for axis in names},
            {axis: self.prober.tensors[axis[0]].shape[axis[1]] for axis in names},
            readers,
            tuple(axis for axis in names if axis in self._norms),
            any(root in self.units.spread for root, _ in units),
        )

    # What belongs together without probing

    def _join_tensors(self, i: int, operator: Operator) -> None:
        side = "ch" if operator.kind == "scale" else "out"
        for axis in operator.reads:
            self._readers.add(axis)
            self._first.setdefault(axis, i)
            for j in range(operator.n_in):
                self.units.join(("w", *axis, j), ("in", i, j))
        for axis in operator.gives:
            self._first.setdefault(axis, i)
            size = self.prober.tensors[axis[0]].shape[axis[1]]
            if operator.over_channels:
                self._norms.add(axis)
            for c in range(min(size, operator.n_out)):
                self.units.join(("w", *axis, c), (side, i, c))
        self._join_recurrent(i, operator)
        self._join_groups(i, operator)
        reason = _UNUSED if operator.unused else _FIXED if operator.kind == "fixed" else ""
        if reason:
            for j in range(operator.n_in):
                self.units.refuse(("in", i, j), reason)
            for c in range(operator.n_out):
                self.units.refuse(("out", i, c), reason)

    def _join_recurrent(self, i: int, operator: Operator) -> None:
        """Join what stands for one hidden channel in all gates, layers and directions."""
        for axis in (*operator.gates, *operator.reads_back):
            self._first.setdefault(axis, i)
            for c in range(self.prober.tensors[axis[0]].shape[axis[1]]):
                self.units.join(("w", *axis, c), ("out", i, c % operator.n_out))
        self._readers.update(operator.reads_back)
        if operator.like is not None:
            for c in range(operator.n_out):
                self.units.join(("out", i, c), ("out", operator.like, c))

    def _join_groups(self, i: int, operator: Operator) -> None:
        """Join the channels of each group of a convolution."""
        if operator.groups > 1:
            n_in, n_out = operator.n_in // operator.groups, operator.n_out // operator.groups
            for g in range(operator.groups):
                for j in range(g * n_in, (g + 1) * n_in):
                    self.units.join(("in", i, j), ("out", i, g * n_out))
                for c in range(g * n_out, (g + 1) * n_out):
                    self.units.join(("out", i, c), ("out", i, g * n_out))

    # Probing

    def _coded(self, sources: list[int]) -> list[int]:
        """Join what one output channel and nothing else arrives at; return the other operators."""
        rows: list[list[Probe]] = []
        places: list[tuple[int, int, int]] = []
        for i in sources:
            own: list[list[Probe]] = [[(i, some)] for some in _by_bits(self.operators[i].n_out)]
            places.append((i, len(rows), len(rows) + len(own)))
            rows += own
        taints = self.prober.probe(rows)
        return [i for i, start, end in places if not self._decode(i, taints[start:end])]

    def _decode(self, i: int, taints: list[Taint]) -> bool:
        """Join an operator's channels with where they arrive; return False if that is not one."""
        n = self.operators[i].n_out
        if any(bool(taint.outputs.any()) for taint in taints):
            if all(bool(taint.outputs.any()) for taint in taints):
                # All of its channels may reach the outputs of the network, as those of a classifier
                # do: whether some do not is seen where each is probed.
                return self._reaches(i, taints, n)
            return False
        codes = _codes(taints, n)
        if codes is None:
            return False
        for code, sink in codes:
            self._join(("out", i, code), sink)
        for c in range(n):
            self.units.find(("out", i, c))
        return True

    def _reaches(self, i: int, taints: list[Taint], n: int) -> bool:
        """Refuse all channels of an operator if they reach nothing but the outputs."""
        if any(taint.inputs for taint in taints):
            return False
        for c in range(n):
            self.units.refuse(("out", i, c), _OUTPUT)
        return True

    def _by_blocks(self, i: int) -> None:
        """Join blocks of an operator's channels with all that they arrive at."""
        n = self.operators[i].n_out
        size = self._block_size(i, n)
        blocks = torch.split(torch.arange(n), size)
        for block, taint in zip(blocks, self.prober.probe([[(i, b)] for b in blocks]), strict=True):
            source: Node = ("out", i, int(block[0]))
            arrived = list(_nodes(taint))
            for c in block[1:].tolist():
                self.units.join(source, ("out", i, c))
            for sink in arrived:
                self._join(source, sink)
            per_operator = Counter(sink[:2] for sink in arrived)
            if size > 1 or max(per_operator.values(), default=0) > 1:
                self.units.spread.add(self.units.find(source))
            if taint.outputs.any():
                self.units.refuse(source, _OUTPUT)

    def _block_size(self, i: int, n: int) -> int:
        """Return how many channels from the first on arrive at the same places: the size of a head.

        A block that is larger than a unit joins several units, which is as safe.
        """
        divisors = [d for d in range(1, n) if n % d == 0]
        first, *others = self.prober.probe([[(i, torch.tensor([c]))] for c in (0, *divisors)])
        same = frozenset(_nodes(first))
        for divisor, taint in zip(divisors, others, strict=True):
            if frozenset(_nodes(taint)) != same or bool(taint.outputs) != bool(first.outputs):
                return divisor
        return n

    def _by_entries(self, name: str, dim: int, size: int) -> None:
        """Join entries of a parameter that is used in some other way with what they arrive at."""
        ends = [self.prober.probe_tensor(name, dim, torch.tensor([c])) for c in (0, size - 1)]
        arrived = [bool(taint.inputs) or bool(taint.outputs.any()) for taint in ends]
        if _overlap(*ends) or not any(arrived):
            return  # the dimension is not one of channels
        if not all(arrived):  # nor is that of which some entries are used, as rows of a table
            others = torch.arange(1, size) if arrived[0] else torch.arange(size - 1)
            if _overlap(ends[arrived.index(True)], self.prober.probe_tensor(name, dim, others)):
                return
        if size > _FEW:
            coded = [self.prober.probe_tensor(name, dim, some) for some in _by_bits(size)]
            if self._decode_entries(name, dim, size, coded):
                return
        taints = [self.prober.probe_tensor(name, dim, torch.tensor([c])) for c in range(size)]
        self._reads_by(name, dim, taints)
        for c, taint in enumerate(taints):
            source: Node = ("w", name, dim, c)
            for sink in _nodes(taint):
                self._join(source, sink)
            if taint.outputs.any():
                self.units.refuse(source, _OUTPUT)

    def _decode_entries(self, name: str, dim: int, size: int, taints: list[Taint]) -> bool:
        if any(bool(taint.outputs.any()) for taint in taints):
            return False
        codes = _codes(taints, size)
        if codes is None:
            return False
        for code, sink in codes:
            self._join(("w", name, dim, code), sink)
        self._reads_by(name, dim, taints)
        return True

    def _reads_by(self, name: str, dim: int, taints: list[Taint]) -> None:
        """Note that weights which are computed of a parameter read channels along its dimension."""
        if any(side == "w_in" for taint in taints for _, side in taint.inputs):
            self._readers.add((name, dim))

    def _join(self, source: Node, sink: Node) -> None:
        self.units.join(source, sink)
        if sink[0] == "ch" and source[0] == "out":
            i: int = source[1]  # type: ignore[assignment]
            if self._sources_at[sink].setdefault(i, source) != source:
                # Several channels of one operator at one weight: it works inside of their units.
                j: int = sink[1]  # type: ignore[assignment]
                self.inner.update(name for name, _ in self.operators[j].gives)


_FIXED = "attention or recurrence of torch reads or makes it, whose width is fixed"
_UNUSED = "no data of the example reaches it"
_INPUT = "no operator that mixes channels makes it"
_OUTPUT = "it reaches the outputs of the network"
_SIDES = {"in": "in", "ch": "ch", "w_in": "in", "w_out": "out", "state": "out"}


def _by_bits(n: int) -> list[torch.Tensor]:
    """Return by bit those of the numbers below n that have it, and those that do not."""
    numbers = torch.arange(n)
    halves = ((numbers >> b) & 1 == 1 for b in range(max(1, (n - 1).bit_length())))
    return [some for on in halves for some in (numbers[on], numbers[~on])]


def _codes(taints: list[Taint], n: int) -> list[tuple[int, Node]] | None:
    """Return which number arrived where, each at places of its own; None if they do not.

    Args:
        taints: Where those of `_by_bits` arrived.
        n: How many numbers there are.
    """
    codes: list[tuple[int, Node]] = []
    for key in {key for taint in taints for key in taint.inputs}:
        masks = [_mask(taint, key) for taint in taints]
        width = max(map(len, masks))
        one, zero = (
            torch.stack([_padded(m, width) for m in ms]) for ms in (masks[::2], masks[1::2])
        )
        hit = (one | zero).any(0)
        if n > 1 and ((one & zero) | ~(one | zero))[:, hit].any():
            return None
        numbers = (one.long() * (2 ** torch.arange(len(one)))[:, None]).sum(0)
        if (numbers[hit] >= n).any():
            return None
        codes += [
            (int(numbers[j]), (_SIDES[key[1]], key[0], j)) for j in hit.nonzero().flatten().tolist()
        ]
    return codes


def _mask(taint: Taint, key: tuple[int, str]) -> torch.Tensor:
    return taint.inputs[key][0] if key in taint.inputs else torch.zeros(0, dtype=torch.bool)


def _padded(mask: torch.Tensor, size: int) -> torch.Tensor:
    return mask if len(mask) else torch.zeros(size, dtype=torch.bool)


def _nodes(taint: Taint) -> Iterable[Node]:
    for (i, side), mask in taint.inputs.items():
        for j in mask[0].nonzero().flatten().tolist():
            yield _SIDES[side], i, j


def _overlap(one: Taint, other: Taint) -> bool:
    if one.outputs.any() and other.outputs.any():
        return True
    return not frozenset(_nodes(one)).isdisjoint(_nodes(other))
