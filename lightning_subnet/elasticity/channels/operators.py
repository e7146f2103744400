# SPDX-License-Identifier: Apache-2.0
"""Operators that mix or normalise channels, and forward passes in which they pass taint only.

A pass runs the network's own code. What mixes channels by weights does not compute: it gives ones,
except for those output channels that are probed, which are NaN. All else is computed, so that NaN
arrives where the channel does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_MATRIX = 2  # dimensions

Axis = tuple[str, int]  # the name of a parameter or buffer, and one of its dimensions


class Mix(NamedTuple):
    """An operator that computes each output channel of all input channels, with weights.

    Attributes:
        x: The data.
        weight: The weights.
        bias: One number per output channel, or None.
        in_dim: The dimension of the data that channels are.
        out_dim: The dimension of the output that channels are.
        w_in: The dimension of the weights that is read along.
        w_out: The dimension of the weights that output channels are.
        groups: Number of groups of a convolution.
    """

    x: Any
    weight: Any
    bias: Any
    in_dim: int
    out_dim: int
    w_in: int
    w_out: int
    groups: int = 1


class Scale(NamedTuple):
    """An operator that works on each channel, apart from a normalisation over all of them.

    Attributes:
        x: The data.
        weights: Tensors of one number per channel.
        dim: The dimension of the data that channels are.
        over_channels: Whether it normalises over the channels.
    """

    x: Any
    weights: tuple[Any, ...]
    dim: int
    over_channels: bool


class Recurrence(NamedTuple):
    """A recurrent layer, or several on top of one another, as one call of torch.

    Attributes:
        x: The data; its last dimension is channels.
        states: What it begins with, each (layers, batch, channels) or (batch, channels).
        weights: Of each layer, and in each of them of each direction, the tensors of its gates:
            (weight_ih, weight_hh, *biases).
        directions: 2 if it also runs backwards.
        time: The dimension of the data that is time; None: it makes one step, or is packed.
    """

    x: Any
    states: tuple[Any, ...]
    weights: tuple[tuple[Any, ...], ...]
    directions: int
    time: int | None


class Fixed(NamedTuple):
    """An operator whose channels cannot be dropped.

    Attributes:
        xs: The data.
    """

    xs: tuple[Any, ...]


@dataclass
class Operator:
    """One call of an operator, in the order of a forward pass.

    Attributes:
        kind: "mix", "scale" or "fixed".
        n_in: Number of input channels.
        n_out: Number of output channels.
        reads: Axes whose index is that of the input channel.
        gives: Axes whose index is that of the output channel.
        groups: Number of groups of a convolution.
        over_channels: Whether it normalises over the channels.
        derived: The parameters and buffers that its weights are computed of; nothing if they are
            one.
        unused: Whether no data reaches it.
        in_shape: The shape of the data.
        out_shape: The shape of the output.
        in_dim: The dimension of the data that channels are.
        out_dim: The dimension of the output that channels are.
        gates: Axes in which the output channels stand once for each gate.
        reads_back: Axes whose index is that of the output channel, which they read.
        like: The operator whose output channels are as many; None: any.
    """

    kind: str
    n_in: int
    n_out: int
    reads: tuple[Axis, ...] = ()
    gives: tuple[Axis, ...] = ()
    groups: int = 1
    over_channels: bool = False
    derived: tuple[str, ...] = ()
    unused: bool = False
    in_shape: tuple[int, ...] = ()
    out_shape: tuple[int, ...] = ()
    in_dim: int = 0
    out_dim: int = 0
    gates: tuple[Axis, ...] = ()
    reads_back: tuple[Axis, ...] = ()
    like: int | None = None

    @property
    def names(self) -> set[str]:
        """The parameters and buffers that it works with."""
        axes = (*self.reads, *self.gives, *self.gates, *self.reads_back)
        return {name for name, _ in axes} | set(self.derived)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two passes of one network have alike."""
        return self.kind, self.n_in, self.n_out, self.reads, self.gives, self.gates


@dataclass
class Taint:
    """Where NaN arrived in a pass.

    Attributes:
        inputs: By operator and side ("in", "ch", "w_in", "w_out", "state"), a mask (rows,
            channels).
        outputs: By row, whether it reached the outputs of the network.
    """

    inputs: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    outputs: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def row(self, i: int) -> Taint:
        """Return where that of one row arrived."""
        inputs = {key: mask[i : i + 1] for key, mask in self.inputs.items() if mask[i].any()}
        return Taint(inputs, self.outputs[i : i + 1])


class OtherOperatorsError(Exception):
    """A network runs other operators than before, on the same input."""


class DecisionError(Exception):
    """A network decides by the values that its layers give."""


class Pass(TorchFunctionMode):
    """One forward pass of a network.

    Args:
        names: By id, the names of parameters and buffers.
        probes: By operator, pairs of a row of the batch and channels that are NaN in it; row None
            stands for all of them.
        expected: The operators of an earlier pass; nothing: there was none.
        rows: Number of rows of the batch.
        layouts: By operator, the dimensions of data and output that hold the batch; None: none.
        computed: Modules that normalise inside of units: what they do is computed.

    Attributes:
        operators: The operators so far.
        taint: Where NaN arrived.
        free: Parameters that went into other operators.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        probes: Mapping[int, list[tuple[int | None, torch.Tensor]]] | None = None,
        rows: int = 1,
        layouts: Mapping[int, tuple[int | None, int | None]] | None = None,
        computed: frozenset[str] = frozenset(),
        expected: Sequence[Operator] = (),
    ) -> None:
        super().__init__()
        self._expected = expected
        self._names = names
        self._probes = probes or {}
        self._rows = rows
        self._layouts = layouts or {}
        self._computed = computed
        self.operators: list[Operator] = []
        self.taint = Taint()
        self.free: set[str] = set()
        self._n = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator, or only note what it would mix."""
        kwargs = kwargs or {}
        if func in _DECISIONS and hasattr(args[0], "_of_layers"):
            raise DecisionError
        reader = READERS.get(func)
        call = reader(self, args, kwargs) if reader is not None else None
        if isinstance(call, Mix):
            return _mark(self._mix(call, func, args, kwargs))
        if isinstance(call, Scale):
            if not self.is_computed(call.weights):
                return self.scale(call)
        elif isinstance(call, Recurrence):
            return _mark(self._recur(call))
        elif isinstance(call, Fixed):
            return _mark(self._fixed(call, func, args, kwargs))
        return self._other(func, args, kwargs)

    # What is data, and what is weights

    def is_weight(self, x: Any) -> bool:
        """Return whether a tensor is a parameter or buffer, or is computed of them alone."""
        return isinstance(x, torch.Tensor) and (id(x) in self._names or hasattr(x, "_of_weights"))

    def _sources(self, weight: Any) -> tuple[str, ...]:
        """Return the names of the parameters and buffers that weights are computed of."""
        name = self._names.get(id(weight))
        return (name,) if name is not None else weight._of_weights

    def is_computed(self, weights: tuple[Any, ...]) -> bool:
        """Return whether these are the weights of a normalisation inside of units."""
        return any(self._names.get(id(w)) in self._computed for w in weights)

    def _other(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        if not any(isinstance(y, torch.Tensor) for y in _leaves(output)):
            return output
        tensors = [x for x in _leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(hasattr(x, "_of_layers") for x in tensors):
            _mark(output)
        weights = [x for x in tensors if self.is_weight(x)]
        self.free.update(self._names[id(x)] for x in weights if id(x) in self._names)
        if weights and len(weights) == len(tensors):
            of = tuple(dict.fromkeys(name for x in weights for name in self._sources(x)))
            for y in _leaves(output):
                if isinstance(y, torch.Tensor) and id(y) not in self._names:
                    y._of_weights = of  # type: ignore[attr-defined] # a mark on the object
        return output

    # Operators

    def _next(self, operator: Operator) -> int:
        i, self._n = self._n, self._n + 1
        if self._expected and (
            i >= len(self._expected) or operator.signature != self._expected[i].signature
        ):
            raise OtherOperatorsError
        self.operators.append(operator)
        return i

    def _axes(self, tensors: Any) -> tuple[Axis, ...]:
        return tuple(
            (self._names[id(w)], dim)
            for w, dim in tensors
            if w is not None and id(w) in self._names
        )

    def _mix(self, call: Mix, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        x, weight = call.x, call.weight
        shape = _shape_of(func, args, kwargs)
        n_in, n_out = x.shape[call.in_dim] if call.in_dim is not None else 0, shape[call.out_dim]
        direct = id(weight) in self._names
        operator = Operator(
            "mix",
            n_in,
            n_out,
            self._axes([(weight, call.w_in)]) if call.groups == 1 and n_in else (),
            self._axes([(weight, call.w_out), (call.bias, 0)]),
            call.groups,
            derived=() if direct else self._sources(weight),
            unused=x.numel() == 0,
            in_shape=tuple(x.shape),
            out_shape=shape,
            in_dim=call.in_dim % x.ndim if n_in else 0,
            out_dim=call.out_dim % len(shape),
        )
        i = self._next(operator)
        if n_in:
            self._arrived(i, "in", x, operator.in_dim)
        if not direct and torch.isnan(weight).any():
            self._arrived_in_weights(i, weight, call)
        if call.bias is not None and id(call.bias) not in self._names and call.bias.isnan().any():
            self._note(i, "w_out", call.bias.isnan()[None])
        dtype = weight.dtype if not n_in else torch.promote_types(x.dtype, weight.dtype)
        y = torch.ones(shape, dtype=dtype, device=weight.device)
        return self._probed(i, y, operator.out_dim)

    def scale(self, call: Scale) -> torch.Tensor:
        """Pass the taint of each channel on.

        Args:
            call: What works on each channel.
        """
        x = call.x
        operator = Operator(
            "scale", x.shape[call.dim], x.shape[call.dim],
            gives=self._axes([(w, w.ndim - 1) for w in call.weights if w is not None and w.ndim]),
            over_channels=call.over_channels, in_shape=tuple(x.shape), out_shape=tuple(x.shape),
            in_dim=call.dim % x.ndim, out_dim=call.dim % x.ndim,
        )  # fmt: skip
        i = self._next(operator)
        self._arrived(i, "ch", x, operator.in_dim)
        y = torch.where(torch.isnan(x), x, torch.ones_like(x))
        _mark(y)
        return y

    def _recur(self, call: Recurrence) -> Any:
        """Pass on what reads each layer's channels, and give their states the same taint."""
        x, first, last = call.x, self._n, []
        for step, start in enumerate(range(0, len(call.weights), call.directions)):
            y: list[torch.Tensor] = []
            for weights in call.weights[start : start + call.directions]:
                back = weights[1]
                operator = Operator(
                    "mix", x.shape[-1], back.shape[1], self._axes([(weights[0], 1)]),
                    in_shape=tuple(x.shape), out_shape=(*x.shape[:-1], back.shape[1]),
                    in_dim=x.ndim - 1, out_dim=x.ndim - 1, like=first,
                    gates=self._axes((w, 0) for w in weights), reads_back=self._axes([(back, 1)]),
                )  # fmt: skip
                i = self._next(operator)
                self._arrived(i, "in", x, x.ndim - 1)
                for state in call.states:
                    own = state[step * call.directions + len(y)] if state.ndim > _MATRIX else state
                    self._arrived(i, "state", own, own.ndim - 1, 0)
                y.append(self._probed(i, x.new_ones(operator.out_shape), operator.out_dim))
            x = torch.cat(y, -1)
            last += y
        if call.time is None and call.states[0].ndim == _MATRIX:  # one step
            return (x, x.clone()) if len(call.states) > 1 else x
        ends = [y.select(call.time, 0) if call.time is not None else _any(y, call) for y in last]
        states = [torch.stack(ends) for _ in call.states]
        return x, *states

    def _fixed(self, call: Fixed, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        clean = [torch.ones_like(x) if x.is_floating_point() else x for x in call.xs]
        output = func(*clean, *args[len(clean) :], **kwargs)
        y = next(y for y in _leaves(output) if isinstance(y, torch.Tensor))
        names = tuple(self._names[id(w)] for w in _leaves((args, kwargs)) if id(w) in self._names)
        for x in call.xs:
            operator = Operator(
                "fixed", x.shape[-1], y.shape[-1], in_shape=tuple(x.shape),
                out_shape=tuple(y.shape), in_dim=x.ndim - 1, out_dim=y.ndim - 1, derived=names,
            )  # fmt: skip
            i = self._next(operator)
            self._arrived(i, "in", x, x.ndim - 1)
            self._probed(i, y, y.ndim - 1)
        return output

    # Taint

    def _arrived(
        self, i: int, side: str, x: torch.Tensor, dim: int, batch: int | None = None
    ) -> None:
        if not (x.is_floating_point() or x.is_complex()):
            return
        bad = torch.isnan(x)
        if not bad.any():
            return
        if batch is None or i not in self._layouts or self._layouts[i][0] is None:
            batch = self._layouts.get(i, (None, None))[0]
        if self._rows == 1:
            self._note(i, side, bad.movedim(dim, 0).flatten(1).any(1)[None])
        elif batch is None or batch == dim:  # every row reads it
            mask = bad.movedim(dim, 0).flatten(1).any(1)[None].expand(self._rows, -1)
            self._note(i, side, mask)
        else:
            channels_last = bad.movedim((batch, dim), (0, -1))
            self._note(i, side, channels_last.reshape(self._rows, -1, bad.shape[dim]).any(1))

    def _arrived_in_weights(self, i: int, weight: torch.Tensor, call: Mix) -> None:
        """Note input and output channels of which all weights are NaN; else all are tainted."""
        bad = torch.isnan(weight)
        rows = bad.movedim(call.w_out, 0).flatten(1).all(1)
        columns = bad.movedim(call.w_in, 0).flatten(1).all(1)
        if rows.all() or columns.all():  # a part of the kernel, or everything
            rows = torch.ones_like(rows)
        explained = torch.zeros_like(bad).movedim(call.w_out, 0)
        explained[rows] = True
        explained = explained.movedim(0, call.w_out).movedim(call.w_in, 0)
        explained[columns] = True
        if not (bad == explained.movedim(0, call.w_in)).all():
            rows = torch.ones_like(rows)
        if rows.any():
            self._note(i, "w_out", rows[None])
        if columns.any() and call.groups == 1:
            self._note(i, "w_in", columns[None])

    def _note(self, i: int, side: str, mask: torch.Tensor) -> None:
        mask = mask.expand(self._rows, -1).cpu()
        key = (i, side)
        self.taint.inputs[key] = self.taint.inputs[key] | mask if key in self.taint.inputs else mask

    def _probed(self, i: int, y: torch.Tensor, dim: int) -> torch.Tensor:
        if i not in self._probes:
            return y
        batch = self._layouts.get(i, (None, None))[1]
        for row, channels in self._probes[i]:
            part = y
            if row is not None and self._rows > 1:
                assert batch is not None, "only operators with a batch are probed by rows"
                size = y.shape[batch] // self._rows
                part = y.narrow(batch, row * size, size)
            part.index_fill_(dim, channels.to(y.device), math.nan)
        return y


def _mark(output: Any) -> Any:
    """Mark tensors that depend on what a layer gave."""
    for y in _leaves(output):
        if isinstance(y, torch.Tensor):
            y._of_layers = True  # type: ignore[attr-defined] # a mark on the object
    return output


def _leaves(tree: Any) -> list[Any]:
    return tree_leaves(tree)


def _shape_of(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[int, ...]:
    """Return the shape of what an operator gives, without computing it."""

    def meta(x: Any) -> Any:
        return x.detach().to("meta") if isinstance(x, torch.Tensor) else x

    with torch.no_grad():
        output = func(*map(meta, args), **{k: meta(v) for k, v in kwargs.items()})
    return tuple(output.shape)


# How each operator's arguments read

Reader = Callable[[Pass, tuple[Any, ...], dict[str, Any]], Any]


def _named(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _linear(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input weight bias", args, kwargs)
    if not run.is_weight(call["weight"]) or call["weight"].ndim != _MATRIX:
        return None
    return Mix(call["input"], call["weight"], call.get("bias"), -1, -1, 1, 0)


def _addmm(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input mat1 mat2", args, kwargs)
    bias, x, weight = call["input"], call["mat1"], call["mat2"]
    if run.is_weight(weight) and not run.is_weight(x) and bias.ndim == 1 and run.is_weight(bias):
        return Mix(x, weight, bias, -1, -1, 0, 1)
    return None


def _matmul(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _product(run, *list(_named("input other", args, kwargs).values())[:2])


def _rmatmul(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _product(run, args[1], args[0])


def _product(run: Pass, one: Any, other: Any) -> Any:
    if run.is_weight(one) == run.is_weight(other):
        return None
    if run.is_weight(other) and other.ndim >= _MATRIX and one.ndim:
        return Mix(one, other, None, -1, -1, other.ndim - 2, other.ndim - 1)
    if run.is_weight(one) and one.ndim >= _MATRIX and other.ndim > 1:
        return Mix(other, one, None, -2, -2, one.ndim - 1, one.ndim - 2)
    return None


def _einsum(run: Pass, args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    equation, *operands = args
    if not isinstance(equation, str) or len(operands) != len(_PAIR) or "->" not in equation:
        return None
    inputs, _arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    which = [run.is_weight(x) for x in operands]
    if sum(which) != 1:
        return None
    x, of_x = operands[which.index(False)], terms[which.index(False)]
    weight, of_w = operands[which.index(True)], terms[which.index(True)]
    read = [c for c in of_w if c in of_x and c not in out]
    given = [c for c in of_w if c in out and c not in of_x]
    others = [c for c in of_w if c in of_x and c in out]
    if not read or not given or len({*read, *given, *others}) != len(of_w):
        return None
    # Of several dimensions that are read or given, the last is the channels, the others positions.
    return Mix(
        x, weight, None, _position(of_x, read[-1]), _position(out, given[-1]),
        of_w.index(read[-1]), of_w.index(given[-1]),
    )  # fmt: skip


_PAIR = ("input", "other")


def _position(term: str, letter: str) -> int:
    """Return the dimension of a letter, from the end where an ellipsis stands before it."""
    before, _, after = term.partition(letter)
    return -1 - len(after) if "." in before else len(before)


def _conv(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input weight bias stride padding dilation groups", args, kwargs)
    x, weight = call["input"], call["weight"]
    if not run.is_weight(weight):
        return None
    dim = 1 - weight.ndim  # with or without a batch
    return Mix(x, weight, call.get("bias"), dim, dim, 1, 0, call.get("groups", 1))


def _conv_transpose(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = "input weight bias stride padding output_padding groups dilation"
    call = _named(names, args, kwargs)
    x, weight, groups = call["input"], call["weight"], call.get("groups", 1)
    if not run.is_weight(weight) or groups != 1:
        return None
    dim = 1 - weight.ndim
    return Mix(x, weight, call.get("bias"), dim, dim, 0, 1)


def _embedding(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input weight", args, kwargs)
    return _rows_of(run, call["weight"], call["input"])


def _torch_embedding(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("weight indices", args, kwargs)
    return _rows_of(run, call["weight"], call["indices"])


def _rows_of(run: Pass, weight: Any, indices: Any) -> Any:
    if not run.is_weight(weight):
        return None
    return Mix(indices, weight, None, None, -1, 0, 1)  # type: ignore[arg-type] # it reads no channel


def _batch_norm(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input running_mean running_var weight bias", args, kwargs)
    return _statistics(run, call)


def _torch_batch_norm(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _statistics(run, _named("input weight bias running_mean running_var", args, kwargs))


def _statistics(run: Pass, call: dict[str, Any]) -> Any:
    names = ("weight", "bias", "running_mean", "running_var")
    weights = tuple(w for w in map(call.get, names) if w is not None)
    return Scale(call["input"], weights, 1, over_channels=False) if _direct(run, weights) else None


def _layer_norm(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input normalized_shape weight bias", args, kwargs)
    weights = tuple(w for w in (call.get("weight"), call.get("bias")) if torch.is_tensor(w))
    if len(call["normalized_shape"]) != 1 or not (weights and _direct(run, weights)):
        return None
    return Scale(call["input"], weights, -1, over_channels=True)


def _prelu(run: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input weight", args, kwargs)
    weight = call["weight"]
    if weight.numel() == 1 or not _direct(run, (weight,)):
        return None
    return Scale(call["input"], (weight,), 1, over_channels=False)


def _attention(_: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("query key value", args, kwargs)
    return Fixed((call["query"], call["key"], call["value"]))


def _recurrent(run: Pass, args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    x, rest = args[0], [*args[1:]]
    packed = x.ndim == _MATRIX  # the sizes of its steps come next
    states, flat, biased, layers, _dropout, _training, both, *first = rest[1 if packed else 0 :]
    states = tuple(states) if isinstance(states, (tuple, list)) else (states,)
    n = layers * (2 if both else 1)
    each = 4 if biased else 2
    if len(flat) != each * n or not _direct(run, tuple(flat)):  # it has projections, or computes
        return Fixed((x,))
    weights = tuple(tuple(flat[i : i + each]) for i in range(0, len(flat), each))
    time = None if packed else 1 if first[0] else 0
    return Recurrence(x, states, weights, 2 if both else 1, time)


def _cell(run: Pass, args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    x, state, *weights = args
    states = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    own = tuple(w for w in weights if w is not None)
    return Recurrence(x, states, (own,), 1, None) if _direct(run, own) else Fixed((x,))


def _any(y: torch.Tensor, call: Recurrence) -> torch.Tensor:
    """Return states (batch, channels) of packed data, whose rows are those of all sequences."""
    end = torch.where(y.isnan().any(0), math.nan, torch.ones_like(y[0]))
    return end.expand(call.states[0].shape[1], -1).clone()


def _direct(run: Pass, weights: tuple[Any, ...]) -> bool:
    return bool(weights) and all(id(w) in run._names for w in weights)


_VF: Any = torch._VF  # the functions of recurrent layers
_T = torch.Tensor
_DECISIONS = {
    _T.__bool__, _T.__int__, _T.__float__, _T.__index__, _T.item, _T.tolist,
}  # fmt: skip
READERS: dict[Any, Reader] = {
    F.linear: _linear,
    **dict.fromkeys((torch.addmm, _T.addmm), _addmm),
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, _T.matmul, _T.mm, _T.bmm, _T.__matmul__), _matmul
    ),
    _T.__rmatmul__: _rmatmul,
    torch.einsum: _einsum,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _conv_transpose),
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.instance_norm: _batch_norm,
    **dict.fromkeys((F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm), _layer_norm),
    **dict.fromkeys((F.prelu, torch.prelu), _prelu),
    F.multi_head_attention_forward: _attention,
    **dict.fromkeys((_VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu), _recurrent),
    **dict.fromkeys((_VF.lstm_cell, _VF.gru_cell, _VF.rnn_tanh_cell, _VF.rnn_relu_cell), _cell),
}


def is_channelwise(module: nn.Module) -> bool:
    """Return whether a module of somebody's own may work on each channel: its weights are vectors.

    Example:
        >>> class Shift(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bias = nn.Parameter(torch.zeros(8))
        >>> is_channelwise(Shift()), is_channelwise(nn.Linear(8, 8))
        (True, False)
    """
    if type(module).__module__.startswith("torch.") or next(module.children(), None) is not None:
        return False
    sizes = {p.shape for p in module.parameters(recurse=False)}
    return len(sizes) == 1 and all(len(s) == 1 and s[0] > 1 for s in sizes)
