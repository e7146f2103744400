# SPDX-License-Identifier: Apache-2.0
"""Forward passes in which operators that mix or normalise channels pass taint only.

A pass runs the network's own code. What mixes channels by weights does not compute: it gives ones,
except for those output channels that are probed, which are NaN. All else is computed, so that NaN
arrives where the channel does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_subnet.elasticity.channels.readers import (
    MATRIX,
    READERS,
    Fixed,
    Mix,
    Recurrence,
    Scale,
)

Axis = tuple[str, int]  # the name of a parameter or buffer, and one of its dimensions


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

    def are_named(self, weights: tuple[Any, ...]) -> bool:
        """Return whether there are tensors, and all are parameters or buffers."""
        return bool(weights) and all(id(w) in self._names for w in weights)

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
                    own = state[step * call.directions + len(y)] if state.ndim > MATRIX else state
                    self._arrived(i, "state", own, own.ndim - 1, 0)
                y.append(self._probed(i, x.new_ones(operator.out_shape), operator.out_dim))
            x = torch.cat(y, -1)
            last += y
        if call.time is None and call.states[0].ndim == MATRIX:  # one step
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


def _any(y: torch.Tensor, call: Recurrence) -> torch.Tensor:
    """Return states (batch, channels) of packed data, whose rows are those of all sequences."""
    end = torch.where(y.isnan().any(0), math.nan, torch.ones_like(y[0]))
    return end.expand(call.states[0].shape[1], -1).clone()


_T = torch.Tensor
_DECISIONS = {_T.__bool__, _T.__int__, _T.__float__, _T.__index__, _T.item, _T.tolist}


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
