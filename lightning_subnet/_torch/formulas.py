# SPDX-License-Identifier: Apache-2.0
"""Formulas of matrix products, convolutions and attention that torch's FLOP counter leaves out.

They are in addition to, or in place of, those of `torch.utils.flop_counter`, for one counter only:
nothing is registered in the process. Each gets the arguments of an operator and its output, and
returns multiply-accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache, wraps
from typing import Any

import torch

from lightning_subnet.errors import MeasurementError

Formula = Callable[..., Any]

_OF_COMPLEX = 4  # real multiplications in a complex one
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def formulas() -> dict[Any, Formula]:
    """Return FLOP formulas by operator, as `FlopCounterMode(custom_mapping=...)` takes them.

    Example:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        ...     _ = torch.zeros(3, 4) @ torch.zeros(4)
        >>> counter.get_total_flops() // 2
        12
    """
    late = {name: formula for name, formula in _OF_OTHERS.items() if _operator(name) is not None}
    return {**_of_torch(), **{_operator(name): _flops(f) for name, f in late.items()}}


@cache
def _of_torch() -> dict[Any, Formula]:
    named = {_operator(name): formula for name, formula in _FORMULAS.items()}
    named.pop(None, None)  # operators that this build of torch does not have
    return {operator: _flops(formula) for operator, formula in named.items()}


def _operator(name: str) -> Any:
    """Return an operator by its name, such as `aten::mv`, or None."""
    namespace, _, rest = name.partition("::")
    return getattr(getattr(torch.ops, namespace), rest, None)


def _flops(formula: Formula) -> Formula:
    """Return a formula as the counter calls it: with the tensors themselves, for FLOPs."""

    @wraps(formula)
    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        first = next((x for x in _tensors(args)), None)
        factor = _OF_COMPLEX if first is not None and first.is_complex() else 1
        macs: int = formula(*args, **{**kwargs, "out": out_val})
        return 2 * factor * macs

    flops._get_raw = True  # type: ignore[attr-defined] # else the counter passes shapes
    return flops


def _tensors(items: Iterable[Any]) -> Iterator[torch.Tensor]:
    return (x for x in items if isinstance(x, torch.Tensor))


def _values(matrix: torch.Tensor) -> int:
    """Return how many values a matrix stores."""
    if matrix.layout is torch.sparse_coo:
        return matrix._values().numel()
    return matrix.values().numel() if matrix.layout in _COMPRESSED else matrix.numel()


def _mm(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return the products of (..., m, k) and (..., k, n), zeros that are not stored left out."""
    sparse = [x.layout in (torch.sparse_coo, *_COMPRESSED) for x in (a, b)]
    if all(sparse):
        msg = (
            "The multiply-accumulates of a product of two sparse matrices depend on where their "
            "zeros are, and are not counted. Give the measure as a network_measure of your own."
        )
        raise MeasurementError(msg)
    return a.shape[-2] * _values(b) if sparse[1] else _values(a) * b.shape[-1]


def _addmm(_: Any, a: torch.Tensor, b: torch.Tensor, *__: Any, **___: Any) -> int:
    return _mm(a, b)


def _mv(matrix: torch.Tensor, *_: Any, **__: Any) -> int:
    return _values(matrix)


def _addmv(_: Any, matrix: torch.Tensor, *__: Any, **___: Any) -> int:
    return _values(matrix)


def _addr(_: Any, a: torch.Tensor, b: torch.Tensor, *__: Any, **___: Any) -> int:
    return a.numel() * b.numel()


def _linear(x: torch.Tensor, *_: Any, out: torch.Tensor, **__: Any) -> int:
    """Return the products of rows of x, whose weight is packed in some way, by the output."""
    return x.numel() * out.shape[-1]


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, *_: Any, out: torch.Tensor, **__: Any) -> int:
    """Return the products of groups of matrices, where a and b are (g, m, k) or stacked to 2-D."""
    over_columns = a.ndim > b.ndim  # each column of b meets the matrix of its own group
    return out.numel() * a.shape[-1] if over_columns else a.numel() * out.shape[-1]


def _foreach_mm(a: list[torch.Tensor], b: list[torch.Tensor], *_: Any, **__: Any) -> int:
    return sum(_mm(x, y) for x, y in zip(a, b, strict=True))


def _trilinear(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor,
    expand1: list[int], expand2: list[int], expand3: list[int], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Return the size of the product of three expanded tensors, before it is summed."""
    shapes = []
    for tensor, dims in ((a, expand1), (b, expand2), (c, expand3)):
        shape = list(tensor.shape)
        for dim in sorted(dims):
            shape.insert(dim, 1)
        shapes.append(shape)
    return math.prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _distances(a: torch.Tensor, b: torch.Tensor, p: float = 2.0, *_: Any, **__: Any) -> int:
    """Return the squares of distances between all rows of a and of b; other norms have none."""
    return a.numel() * b.shape[-2] if p == 2 else 0  # noqa: PLR2004 - the Euclidean norm


def _conv(x: torch.Tensor, weight: Any, *_: Any, out: torch.Tensor, **__: Any) -> int:
    """Return the products of a convolution: all weights once at each place of the output."""
    return out.numel() // out.shape[1] * _values(weight)


def _conv_transpose(x: torch.Tensor, weight: Any, *_: Any, **__: Any) -> int:
    """Return the products of a transposed convolution: all weights at each place of the input."""
    return x.numel() // x.shape[1] * _values(weight)


def _conv_tbc(x: torch.Tensor, weight: torch.Tensor, *_: Any, out: torch.Tensor, **__: Any) -> int:
    return out.numel() // out.shape[-1] * weight.numel()


def _packed_conv(x: torch.Tensor, *args: Any, out: torch.Tensor, **_: Any) -> int:
    """Return the products of a convolution whose quantised weight is packed."""
    packed: Any = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    weight = next(_tensors(packed.unpack()))
    return _conv_transpose(x, weight) if packed.transpose() else _conv(x, weight, out=out)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    """Return the products of queries (..., l, d) with keys (..., s, d), and of those with values.

    A mask spares none of them.
    """
    rows = query.numel() // query.shape[-1]
    return rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _rnn(x: torch.Tensor, weights: list[torch.Tensor], *_: Any, **__: Any) -> int:
    """Return the products of all layers of an RNN: each matrix once per sample and step."""
    return x.numel() // x.shape[-1] * sum(w.numel() for w in weights if w.ndim > 1)


def _rnn_of_params(x: torch.Tensor, _: Any, weights: list[Any], *__: Any, **___: Any) -> int:
    return _rnn(x, weights)


def _mkldnn_rnn(x: torch.Tensor, w_x: torch.Tensor, w_h: torch.Tensor, *_: Any, **__: Any) -> int:
    return _rnn(x, [w_x, w_h])


def _quantized_rnn(gates: int) -> Formula:
    """Return the formula of a dynamically quantised LSTM or GRU, padded or packed."""

    def formula(x: torch.Tensor, *args: Any, **_: Any) -> int:
        # (hx, params, has_biases, layers, ...), or for a packed sequence (batch sizes, hx, ...)
        at = next(i for i, arg in enumerate(args) if isinstance(arg, bool))
        state, layers = args[at - 2], args[at + 1]
        both = 2 if args[at + 4] else 1  # directions
        hidden: int = (state[0] if isinstance(state, (list, tuple)) else state).shape[-1]
        inputs = [x.shape[-1], *[both * hidden] * (layers - 1)]
        return x.numel() // x.shape[-1] * both * sum(gates * hidden * (n + hidden) for n in inputs)

    return formula


def _quantized_cell(gates: int) -> Formula:
    """Return the formula of one step of a dynamically quantised cell."""

    def formula(x: torch.Tensor, state: Any, *_: Any, **__: Any) -> int:
        h: torch.Tensor = state[0] if isinstance(state, (list, tuple)) else state
        return gates * h.shape[-1] * (x.numel() + h.numel())

    return formula


def _each(namespace: str, names: str, formula: Formula) -> dict[str, Formula]:
    return {f"{namespace}::{name}": formula for name in names.split()}


_FORMULAS: dict[str, Formula] = {
    **_each("aten", "mm bmm _sparse_mm hspmm", _mm),
    **_each("aten", "addmm addmm_ _addmm_activation baddbmm baddbmm_ addbmm addbmm_", _addmm),
    **_each("aten", "_sparse_addmm sspaddmm", _addmm),
    **_each("aten", "mv dot vdot", _mv),
    **_each("aten", "addmv addmv_", _addmv),
    **_each("aten", "addr addr_", _addr),
    **_each("aten", "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2", _grouped_mm),
    **_each("aten", "_foreach_mm", _foreach_mm),
    **_each("aten", "linear mkldnn_linear _mixed_dtypes_linear _int_mm", _linear),
    **_each("aten", "_scaled_mm _scaled_mm_v2 _dyn_quant_matmul_4bit", _linear),
    **_each("aten", "_weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu", _linear),
    **_each("aten", "_weight_int4pack_mm_with_scales_and_zeros", _linear),
    **_each("mkl", "_mkl_linear", _linear),
    **_each("mkldnn", "_linear_pointwise", _linear),
    **_each("onednn", "linear_dynamic_fp16 linear_relu_dynamic_fp16", _linear),
    **_each("quantized", "matmul linear linear_relu linear_leaky_relu linear_tanh", _linear),
    **_each("quantized", "linear_dynamic linear_relu_dynamic", _linear),
    **_each("quantized", "linear_dynamic_fp16 linear_relu_dynamic_fp16", _linear),
    **_each("quantized", "linear_with_input_q_dq_qweight_dq_output_fp32", _linear),
    **_each("quantized", "linear_with_input_q_dq_qweight_dq_relu_output_fp32", _linear),
    **_each("aten", "_trilinear", _trilinear),
    **_each("aten", "_cdist_forward _euclidean_dist", _distances),
    **_each("aten", "_conv_depthwise2d conv_depthwise3d slow_conv3d_forward", _conv),
    **_each("aten", "slow_conv_dilated2d slow_conv_dilated3d mkldnn_convolution", _conv),
    **_each("aten", "cudnn_convolution_relu cudnn_convolution_add_relu", _conv),
    **_each("aten", "miopen_convolution miopen_convolution_relu", _conv),
    **_each("aten", "miopen_convolution_add_relu miopen_depthwise_convolution", _conv),
    **_each("aten", "_mps_convolution _nnpack_spatial_convolution", _conv),
    **_each("aten", "slow_conv_transpose2d slow_conv_transpose3d", _conv_transpose),
    **_each("aten", "cudnn_convolution_transpose miopen_convolution_transpose", _conv_transpose),
    **_each("aten", "_mps_convolution_transpose", _conv_transpose),
    **_each("aten", "conv_tbc", _conv_tbc),
    **{
        f"quantized::{kind}{dims}d{suffix}": _packed_conv
        for kind in ("conv", "conv_transpose")
        for dims in (1, 2, 3)
        for suffix in ("", "_relu", "_add", "_add_relu", "_dynamic")
    },
    **_each("aten", "_scaled_dot_product_flash_attention_for_cpu", _attention),
    **_each("aten", "_scaled_dot_product_fused_attention_overrideable", _attention),
    **_each("aten", "_scaled_dot_product_attention_math_for_mps", _attention),
    **_each("aten", "_cudnn_rnn miopen_rnn", _rnn),
    **_each("aten", "_lstm_mps", _rnn_of_params),
    **_each("aten", "mkldnn_rnn_layer", _mkldnn_rnn),
    **_each("aten", "quantized_lstm", _quantized_rnn(4)),
    **_each("aten", "quantized_gru", _quantized_rnn(3)),
    **_each("quantized", "quantized_lstm_cell_dynamic", _quantized_cell(4)),
    **_each("quantized", "quantized_gru_cell_dynamic", _quantized_cell(3)),
    **_each("quantized", "quantized_rnn_relu_cell_dynamic", _quantized_cell(1)),
    **_each("quantized", "quantized_rnn_tanh_cell_dynamic", _quantized_cell(1)),
}

_OF_OTHERS: dict[str, Formula] = {"torchvision::deform_conv2d": _conv}
"""Operators of packages that may be imported later."""
