# SPDX-License-Identifier: Apache-2.0
"""Operators that mix or normalise channels, and how their arguments read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

MATRIX = 2  # dimensions


class Weights(Protocol):
    """Knows the weights of a network."""

    def is_weight(self, x: Any) -> bool:
        """Return whether a tensor is a parameter or buffer, or is computed of them alone."""
        ...

    def are_named(self, weights: tuple[Any, ...]) -> bool:
        """Return whether there are tensors, and all are parameters or buffers."""
        ...


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


# How each operator's arguments read

Reader = Callable[[Weights, tuple[Any, ...], dict[str, Any]], Any]


def _named(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _linear(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input weight bias", args, kwargs)
    if not run.is_weight(call["weight"]) or call["weight"].ndim != MATRIX:
        return None
    return Mix(call["input"], call["weight"], call.get("bias"), -1, -1, 1, 0)


def _addmm(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input mat1 mat2", args, kwargs)
    bias, x, weight = call["input"], call["mat1"], call["mat2"]
    if run.is_weight(weight) and not run.is_weight(x) and bias.ndim == 1 and run.is_weight(bias):
        return Mix(x, weight, bias, -1, -1, 0, 1)
    return None


def _matmul(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _product(run, *list(_named("input other", args, kwargs).values())[:2])


def _rmatmul(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _product(run, args[1], args[0])


def _product(run: Weights, one: Any, other: Any) -> Any:
    if run.is_weight(one) == run.is_weight(other):
        return None
    if run.is_weight(other) and other.ndim >= MATRIX and one.ndim:
        return Mix(one, other, None, -1, -1, other.ndim - 2, other.ndim - 1)
    if run.is_weight(one) and one.ndim >= MATRIX and other.ndim > 1:
        return Mix(other, one, None, -2, -2, one.ndim - 1, one.ndim - 2)
    return None


def _einsum(run: Weights, args: tuple[Any, ...], _: dict[str, Any]) -> Any:
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


def _conv(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input weight bias stride padding dilation groups", args, kwargs)
    x, weight = call["input"], call["weight"]
    if not run.is_weight(weight):
        return None
    dim = 1 - weight.ndim  # with or without a batch
    return Mix(x, weight, call.get("bias"), dim, dim, 1, 0, call.get("groups", 1))


def _conv_transpose(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = "input weight bias stride padding output_padding groups dilation"
    call = _named(names, args, kwargs)
    x, weight, groups = call["input"], call["weight"], call.get("groups", 1)
    if not run.is_weight(weight) or groups != 1:
        return None
    dim = 1 - weight.ndim
    return Mix(x, weight, call.get("bias"), dim, dim, 0, 1)


def _embedding(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input weight", args, kwargs)
    return _rows_of(run, call["weight"], call["input"])


def _torch_embedding(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("weight indices", args, kwargs)
    return _rows_of(run, call["weight"], call["indices"])


def _rows_of(run: Weights, weight: Any, indices: Any) -> Any:
    if not run.is_weight(weight):
        return None
    return Mix(indices, weight, None, None, -1, 0, 1)  # type: ignore[arg-type] # it reads no channel


def _batch_norm(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input running_mean running_var weight bias", args, kwargs)
    return _statistics(run, call)


def _torch_batch_norm(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _statistics(run, _named("input weight bias running_mean running_var", args, kwargs))


def _statistics(run: Weights, call: dict[str, Any]) -> Any:
    names = ("weight", "bias", "running_mean", "running_var")
    weights = tuple(w for w in map(call.get, names) if w is not None)
    return Scale(call["input"], weights, 1, over_channels=False) if run.are_named(weights) else None


def _layer_norm(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input normalized_shape weight bias", args, kwargs)
    weights = tuple(w for w in (call.get("weight"), call.get("bias")) if torch.is_tensor(w))
    if len(call["normalized_shape"]) != 1 or not (weights and run.are_named(weights)):
        return None
    return Scale(call["input"], weights, -1, over_channels=True)


def _prelu(run: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("input weight", args, kwargs)
    weight = call["weight"]
    if weight.numel() == 1 or not run.are_named((weight,)):
        return None
    return Scale(call["input"], (weight,), 1, over_channels=False)


def _attention(_: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named("query key value", args, kwargs)
    return Fixed((call["query"], call["key"], call["value"]))


def _recurrent(run: Weights, args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    x, rest = args[0], [*args[1:]]
    packed = x.ndim == MATRIX  # the sizes of its steps come next
    states, flat, biased, layers, _dropout, _training, both, *first = rest[1 if packed else 0 :]
    states = tuple(states) if isinstance(states, (tuple, list)) else (states,)
    n = layers * (2 if both else 1)
    each = 4 if biased else 2
    if len(flat) != each * n or not run.are_named(tuple(flat)):  # it has projections, or computes
        return Fixed((x,))
    weights = tuple(tuple(flat[i : i + each]) for i in range(0, len(flat), each))
    time = None if packed else 1 if first[0] else 0
    return Recurrence(x, states, weights, 2 if both else 1, time)


def _cell(run: Weights, args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    x, state, *weights = args
    states = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    own = tuple(w for w in weights if w is not None)
    return Recurrence(x, states, (own,), 1, None) if run.are_named(own) else Fixed((x,))


_VF: Any = torch._VF  # the functions of recurrent layers
_T = torch.Tensor
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
