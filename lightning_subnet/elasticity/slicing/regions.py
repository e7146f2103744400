# SPDX-License-Identifier: Apache-2.0
"""Regions: which elements of which weight a tensor holds, as its place in memory tells.

A view shares the memory of its weight. Operators that only move data (`cat`, `index_select`, ...)
are run once more on the numbers of the elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["parameter", "buffer", "computed"]

_MOVES = frozenset(
    [
        "alias",
        "cat",
        "chunk",
        "clone",
        "concat",
        "concatenate",
        "contiguous",
        "detach",
        "expand",
        "flatten",
        "flip",
        "gather",
        "index",
        "index_select",
        "lift_fresh_copy",
        "movedim",
        "narrow",
        "narrow_copy",
        "permute",
        "permute_copy",
        "pixel_shuffle",
        "pixel_unshuffle",
        "reshape",
        "roll",
        "rot90",
        "select",
        "select_copy",
        "slice",
        "slice_copy",
        "split",
        "split_with_sizes",
        "squeeze",
        "stack",
        "swapaxes",
        "t",
        "take",
        "take_along_dim",
        "transpose",
        "transpose_copy",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_copy",
        "_reshape_alias",
        "_reshape_copy",
        "_unsafe_view",
        "hstack",
        "vstack",
    ]
)  # functions of aten that compute nothing
_INDEXED = frozenset(["index", "index_select", "gather", "take", "take_along_dim"])


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor that a network holds.

    Args:
        name: Its name in the network.
        tensor: The tensor.
        kind: `"computed"`: what `activate` computed of weights and keeps.
        persistent: Whether it is in the state dict.
        number: Its place among the sources.
    """

    name: str
    tensor: torch.Tensor
    kind: Kind
    persistent: bool = True
    number: int = 0


@dataclass(frozen=True)
class Steps:
    """Positions along one dimension: first, first + step, ...; so many."""

    first: int
    step: int
    count: int

    @property
    def positions(self) -> torch.Tensor:
        """The positions (count,)."""
        return self.first + self.step * torch.arange(self.count)


@dataclass(frozen=True, eq=False)
class Region:
    """The elements of a source that a tensor holds, each of them once.

    Args:
        source: The source.
        shape: Of the tensor.
        box: Positions along each dimension of the source, where it is a block of it; else None.
        order: For each dimension of the tensor the one of the source that it runs along; None where
            it is one element wide.
        index: Of a tensor that is no block: the number of each element in the source, (*shape).
    """

    source: Source
    shape: tuple[int, ...]
    box: tuple[Steps, ...] | None
    order: tuple[int | None, ...] = ()
    index: torch.Tensor | None = None

    @cached_property
    def positions(self) -> tuple[torch.Tensor, ...]:
        """Sorted positions along each dimension of the source that hold all elements."""
        if self.box is not None:
            return tuple(steps.positions.sort().values for steps in self.box)
        assert self.index is not None
        along = torch.unravel_index(self.index.flatten(), self.source.tensor.shape)
        return tuple(torch.tensor(sorted(set(dim.tolist()))) for dim in along)

    @cached_property
    def elements(self) -> tuple[Any, ...]:
        """What is equal for regions of the same elements, in whatever order."""
        n = 1
        for dim in self.positions:
            n *= len(dim)
        if n == self.numel:  # a block, also where it was found out element by element
            return tuple(tuple(dim.tolist()) for dim in self.positions)
        assert self.index is not None
        return (self.index.flatten().sort().values.numpy().tobytes(),)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return int(torch.Size(self.shape).numel())


class Part:
    """The part of a source that a subnet reads.

    Attributes:
        regions: Those that were read.
        positions: Along each dimension of the source, those that hold all of them.
    """

    def __init__(self, source: Source, regions: Sequence[Region]) -> None:
        self.source, self.regions = source, list(regions)
        shape = source.tensor.shape
        masks = [torch.zeros(size, dtype=torch.bool) for size in shape]
        for region in self.regions:
            for mask, positions in zip(masks, region.positions, strict=True):
                mask[positions] = True
        self.positions = [mask.nonzero().flatten() for mask in masks]

    @cached_property
    def single(self) -> bool:
        """Whether the same elements are read everywhere."""
        return len({region.elements for region in self.regions}) == 1

    @property
    def block(self) -> tuple[int, ...]:
        """The sizes of the smallest block of the source that holds what is read."""
        return tuple(len(positions) for positions in self.positions)

    @property
    def whole(self) -> bool:
        """Whether that is the source itself."""
        return self.block == tuple(self.source.tensor.shape)

    @property
    def numel(self) -> int:
        """The elements that are stored: those that are read, or the block around all of them."""
        return self.regions[0].numel if self.single else int(torch.Size(self.block).numel())


class Memory:
    """Where the weights of a network, and copies of parts of them, lie.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._places: dict[int, list[tuple[Source, torch.Tensor | None]]] = {}
        self._alive: list[torch.Tensor] = []
        stored = {name: i for i, name in enumerate(net.state_dict(keep_vars=True))}
        for name, parameter in net.named_parameters():
            self.add(Source(name, parameter, "parameter", number=stored.get(name, 0)))
        for name, buffer in net.named_buffers():
            self.add(Source(name, buffer, "buffer", name in stored, stored.get(name, 0)))

    @property
    def sources(self) -> Iterator[Source]:
        """All sources, each once."""
        for places in self._places.values():
            yield from (source for source, numbers in places if numbers is None)

    def add(self, source: Source) -> None:
        """Add a source, unless it lies in one that is there."""
        if _place(source.tensor) is None or self.region(source.tensor) is not None:
            return
        self._put(source, source.tensor, None)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return _place(tensor) in self._places

    def region(self, tensor: torch.Tensor) -> Region | None:
        """Return what a tensor holds; None if it holds nothing of a source, or an element twice."""
        for source, numbers in self._places.get(_place(tensor) or 0, ()):
            if tensor.dtype != source.tensor.dtype:
                continue
            region = (
                _view(source, tensor)
                if numbers is None
                else _numbered(source, _as_view(numbers, tensor))
            )
            if region is not None:
                return region
        return None

    def read(self, tensor: torch.Tensor) -> Region | None:
        """Return what is read of a source by an operator that is given a tensor."""
        first = tuple(
            slice(1) if stride == 0 else slice(None) for stride in tensor.stride()
        )  # what was expanded is read once
        region = self.region(tensor[first] if tensor.ndim else tensor)
        if region is not None or tensor not in self:
            return region
        for source, _ in self._places[_place(tensor) or 0]:  # overlapping, or of another type
            box = tuple(Steps(0, 1, size) for size in source.tensor.shape)
            return Region(source, tuple(source.tensor.shape), box)
        return None

    def moved(self, op: Any, args: Any, kwargs: Any, output: Any) -> bool:
        """Note where the output of an operator lies, if it is a part of a source.

        Args:
            op: An operator of aten.
            args: Its arguments; an index among them must not depend on an input of the network.
            kwargs: As above.
            output: What came out.

        Returns:
            Whether it is one, in the memory of the source or elsewhere.
        """
        outputs = list(tensors_in(output))
        moving = args[:1] if _name(op) in _INDEXED else (args, kwargs)
        inputs = [x for x in tensors_in(moving) if x in self]
        if not outputs or not inputs or changes(op):
            return False
        if all(x in self for x in outputs):
            return all(self.region(x) is not None for x in outputs)
        regions = [self.region(x) for x in inputs]
        sources = {id(region.source): region.source for region in regions if region is not None}
        if _name(op) not in _MOVES or len(outputs) > 1 or len(sources) != 1 or None in regions:
            return False
        (source,) = sources.values()
        (out,) = outputs
        if out.numel() > source.tensor.numel() or out.dtype != source.tensor.dtype:
            return False
        numbered = {id(x): self._numbers(x, source) for x in inputs}
        numbers = op(*_replaced(args, numbered), **_replaced(kwargs, numbered))
        if _numbered(source, numbers) is None:
            return False
        whole = torch.full((out.untyped_storage().nbytes() // out.element_size(),), -1)
        whole.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(numbers)
        self._put(source, out, whole)
        return True

    def _put(self, source: Source, tensor: torch.Tensor, numbers: torch.Tensor | None) -> None:
        self._places.setdefault(_place(tensor) or 0, []).append((source, numbers))
        self._alive.append(tensor)  # or another tensor would be given its memory

    def _numbers(self, tensor: torch.Tensor, source: Source) -> torch.Tensor:
        for other, numbers in self._places[_place(tensor) or 0]:
            if other is source:
                if numbers is not None:
                    return _as_view(numbers, tensor)
                start = int(source.tensor.storage_offset())
                return _as_view(_counted(source.tensor), tensor, start)
        raise AssertionError("its region is of this source")


class WeightReader(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Sees which elements of weights operators read while it is on.

    Args:
        net: The network.

    Attributes:
        memory: Where its weights lie.
        reads: Regions by source.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.memory = Memory(net)
        self.reads: dict[Source, list[Region]] = {}
        self._varying: set[int] = set()
        self._activating = False
        self._computed = 0

    @contextmanager
    def activating(self) -> Iterator[None]:
        """Follow what `activate` takes and computes of weights, which is no read of the subnet."""
        self._activating = True
        try:
            with self:
                yield
        finally:
            self._activating = False

    def vary(self, tensors: Iterable[torch.Tensor]) -> None:
        """Declare tensors as inputs: what is taken by an index of them is not a slice."""
        self._varying.update(_place(x) or 0 for x in tensors)

    def parts(self) -> dict[str, Part]:
        """Return what was read, by the name of the source."""
        return {source.name: Part(source, regions) for source, regions in self.reads.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it reads."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        varying = is_random(func) or any(_place(x) in self._varying for x in inputs)
        held = [x for x in inputs if x in self.memory]
        if held and not varying and self.memory.moved(func, args, kwargs, output):
            return output
        if held and not _is_view(func, held, output):
            self._read(func, held, output)
        for x in tensors_in(output):
            place = _place(x) or 0
            if varying and x not in self.memory:
                self._varying.add(place)
            else:
                self._varying.discard(place)
        return output

    def _read(self, func: Any, tensors: list[torch.Tensor], output: Any) -> None:
        regions = [region for x in tensors if (region := self.memory.read(x)) is not None]
        if not self._activating:
            for region in regions:
                known = self.reads.setdefault(region.source, [])
                if not any(_same(region, other) for other in known):
                    known.append(region)
            return
        kinds = [region.source for region in regions if region.source.kind != "buffer"]
        for x in tensors_in(output):
            if kinds and x.is_floating_point() and not changes(func):
                self._computed += 1
                name = f"{kinds[0].name}_{self._computed}"
                self.memory.add(Source(name, x.detach(), "computed"))


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments or outputs of an operator."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def changes(op: Any) -> bool:
    """Return whether an operator changes an argument in place."""
    schema = getattr(op, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def is_random(op: Any) -> bool:
    """Return whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def _name(op: Any) -> str:
    schema = getattr(op, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _is_view(op: Any, inputs: list[torch.Tensor], output: Any) -> bool:
    places = {_place(x) for x in inputs}
    outputs = list(tensors_in(output))
    return bool(outputs) and not changes(op) and all(_place(x) in places for x in outputs)


def _place(tensor: torch.Tensor) -> int | None:
    """Return a number of the memory in which a tensor lies; None if it has none that is known."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # of a subclass that wraps others
        return None


def _same(one: Region, other: Region) -> bool:
    if one.box is not None and other.box is not None:
        return (one.box, one.order) == (other.box, other.order)
    if one.index is None or other.index is None:
        return False
    return one.shape == other.shape and torch.equal(one.index, other.index)


def _counted(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the elements of a tensor, at their places in its memory, from its own.

    The numbers are those of the elements in the order of its dimensions.
    """
    span = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    numbers = torch.full((span,), -1)
    order = torch.arange(tensor.numel()).view(tensor.shape)
    numbers.as_strided(tensor.shape, tensor.stride()).copy_(order)
    return numbers


def _as_view(numbers: torch.Tensor, tensor: torch.Tensor, start: int = 0) -> torch.Tensor:
    return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - start)


def _numbered(source: Source, numbers: torch.Tensor) -> Region | None:
    """Return the region of these elements, or None if one of them is in it twice or is none."""
    flat = numbers.flatten()
    present = torch.zeros(source.tensor.numel(), dtype=torch.bool)
    if len(flat) and int(flat.min()) < 0:
        return None
    present[flat] = True
    if int(present.sum()) != len(flat):
        return None
    return Region(source, tuple(numbers.shape), None, (), numbers.contiguous())


def _view(source: Source, tensor: torch.Tensor) -> Region | None:
    """Return the region of a tensor in the memory of a source."""
    offset = int(tensor.storage_offset()) - int(source.tensor.storage_offset())
    pairs = list(zip(tensor.shape, tensor.stride(), strict=True))
    if any(stride == 0 and size > 1 for size, stride in pairs):
        return None
    last = offset + sum((size - 1) * stride for size, stride in pairs)
    whole = zip(source.tensor.shape, source.tensor.stride(), strict=True)
    if offset < 0 or last > sum((size - 1) * stride for size, stride in whole):
        return None
    if (block := _block(source, offset, pairs)) is not None:
        return block
    numbers = _counted(source.tensor).as_strided(tensor.shape, tensor.stride(), offset)
    return _numbered(source, numbers)


def _block(source: Source, offset: int, pairs: Sequence[tuple[int, int]]) -> Region | None:
    """Return the region of a view whose dimensions each run along one of the source."""
    origin = source.tensor
    dims = sorted(
        (d for d in range(origin.ndim) if origin.shape[d] > 1),
        key=origin.stride,
        reverse=True,
    )
    first = [0] * origin.ndim
    for d in dims:
        if origin.stride(d) <= 0:
            return None
        first[d], offset = divmod(offset, origin.stride(d))
    if offset:
        return None
    box = [Steps(at, 1, 1) for at in first]
    order: list[int | None] = []
    for size, stride in pairs:
        if size == 1:
            order.append(None)
            continue
        along = next((d for d in dims if origin.stride(d) <= stride), None)
        if along is None or along in order or stride % origin.stride(along):
            return None
        box[along] = Steps(first[along], stride // origin.stride(along), size)
        order.append(along)
    if any(s.first + s.step * (s.count - 1) >= origin.shape[d] for d, s in enumerate(box)):
        return None
    return Region(source, tuple(size for size, _ in pairs), tuple(box), tuple(order))


def _replaced(tree: Any, by_id: dict[int, torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return by_id.get(id(tree), tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_replaced(item, by_id) for item in tree)
    if isinstance(tree, dict):
        return {key: _replaced(item, by_id) for key, item in tree.items()}
    return tree
