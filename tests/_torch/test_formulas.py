# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of each operator that torch's counter leaves out, against sums by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.mkldnn import to_mkldnn

from lightning_subnet._torch.formulas import formulas
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.errors import MeasurementError

# Quantisation by torch.ao is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.ao|quant|oneDNN|script_method|Sparse CSR)")

small = st.integers(1, 6)


class Applied(nn.Module):
    """A function of a weight and an input, as a network."""

    def __init__(self, fn: Callable[..., Any], *shape: int, weight: Any = None) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.randn(*shape) if weight is None else weight)

    def forward(self, *inputs: Any) -> Any:
        return self.fn(self.weight, *inputs)


def gates_of(kind: type[nn.Module]) -> int:
    return {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}[kind]


def by_hand(
    kind: type[nn.Module], n_in: int, hidden: int, layers: int, both: bool, projection: int = 0
) -> int:
    """Return the products of one step of one sample: g h (in + out) and the projection's h out."""
    directions, out = 1 + both, projection or hidden
    inputs = [n_in, *[directions * out] * (layers - 1)]
    gates = sum(gates_of(kind) * hidden * (n + out) for n in inputs)
    return directions * (gates + layers * hidden * projection)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    sizes=st.tuples(small, small, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    both=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_recurrent_layers(
    kind: Any, sizes: Any, both: bool, bias: bool, batch_first: bool, dtype: torch.dtype
) -> None:
    n_in, hidden, layers, steps, n = sizes
    net = kind(
        n_in, hidden, layers, bias=bias, bidirectional=both, batch_first=batch_first, dtype=dtype
    )
    x = torch.randn(n, steps, n_in) if batch_first else torch.randn(steps, n, n_in)
    assert count_macs(net, x) == n * steps * by_hand(kind, n_in, hidden, layers, both)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU]),
    sizes=st.tuples(small, st.integers(2, 6), st.integers(1, 2)),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    both=st.booleans(),
)
def test_packed_sequences_count_their_own_steps(
    kind: Any, sizes: Any, lengths: list[int], both: bool
) -> None:
    n_in, hidden, layers = sizes
    x = torch.randn(max(lengths), len(lengths), n_in)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(n_in, hidden, layers, bidirectional=both)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(packed)[0].data

    net = Packed()
    expected = sum(lengths) * by_hand(kind, n_in, hidden, layers, both)
    assert count_macs(net, x) == expected
    quantised = quantize_dynamic(net, {nn.LSTM, nn.GRU}, dtype=torch.qint8)
    assert count_macs(quantised, x) == expected


def test_projections_and_cells() -> None:
    x = torch.randn(5, 2, 8)
    assert count_macs(nn.LSTM(8, 16, proj_size=4), x) == 10 * by_hand(nn.LSTM, 8, 16, 1, False, 4)
    for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        expected = 2 * gates_of(kind) * 16 * (8 + 16)
        cell = kind(8, 16)
        assert count_macs(cell, x[0]) == expected
        quantised = quantize_dynamic(nn.Sequential(cell), {kind}, dtype=torch.qint8)
        assert count_macs(quantised, x[0]) == expected


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (3, True)])
def test_quantised_recurrent_layers(kind: Any, layers: int, both: bool) -> None:
    net = nn.Sequential(kind(4, 6, layers, bidirectional=both))
    x = torch.randn(5, 2, 4)
    for dtype in (torch.qint8, torch.float16):
        quantised = quantize_dynamic(net, {kind}, dtype=dtype)
        assert count_macs(quantised, x) == 10 * by_hand(kind, 4, 6, layers, both)


@settings(max_examples=20, deadline=None)
@given(a=small, b=small, out=small, n=small, steps=small)
def test_bilinear_uses_each_weight_once_a_sample(
    a: int, b: int, out: int, n: int, steps: int
) -> None:
    inputs = torch.randn(n, steps, a), torch.randn(n, steps, b)
    assert count_macs(nn.Bilinear(a, b, out), inputs) == n * steps * a * b * out


V, M = torch.randn(8), torch.randn(8, 8)
SPARSE = torch.diag(torch.arange(1.0, 9))
WITH_A_VECTOR: dict[str, tuple[nn.Module, Any, int]] = {
    "mv": (Applied(lambda w, x: w @ x, 6, 8), V, 48),
    "mv of a slice": (Applied(lambda w, x: w[:3, :4] @ x[:4], 6, 8), V, 12),
    "dot": (Applied(torch.dot, 8), V, 8),
    "vdot": (Applied(torch.vdot, 8), V, 8),
    "addmv": (Applied(lambda w, x: torch.addmv(x, w, x), 8, 8), V, 64),
    "addmv_": (Applied(lambda w, x: torch.zeros(8).addmv_(w, x), 8, 8), V, 64),
    "addr": (Applied(lambda w, x: torch.addr(M, w, x), 8), V, 64),
    "inner": (Applied(torch.inner, 6, 8), V, 48),
    "einsum": (Applied(lambda w, x: torch.einsum("oi,i->o", w, x), 6, 8), V, 48),
    "einsum of three": (
        Applied(lambda w, x: torch.einsum("i,oij,j->o", x, w, x), 3, 8, 8), V, 3 * 8 * 8 + 3 * 8,
    ),
    "linear of one row": (nn.Linear(8, 6), V, 48),
}  # fmt: skip
WITH_A_MATRIX: dict[str, tuple[nn.Module, Any, int]] = {
    "addmm_": (Applied(lambda w, x: torch.zeros(8, 8).addmm_(w, x), 8, 8), M, 512),
    "baddbmm_": (Applied(lambda w, x: torch.zeros(2, 3, 8).baddbmm_(w, x), 2, 3, 8),
                 torch.randn(2, 8, 8), 2 * 3 * 64),
    "addbmm": (Applied(lambda w, x: torch.addbmm(torch.zeros(3, 8), w, x), 2, 3, 8),
               torch.randn(2, 8, 8), 2 * 3 * 64),
    "out": (Applied(lambda w, x: torch.mm(w.detach(), x, out=torch.empty(8, 8)), 8, 8), M, 512),
    "cdist": (Applied(lambda w, x: torch.cdist(x, w), 5, 8), M, 8 * 5 * 8),
    "cdist of many": (Applied(lambda w, x: torch.cdist(x, w), 30, 8), M, 8 * 30 * 8),
    "cdist without squares": (
        Applied(lambda w, x: torch.cdist(x, w, p=1) @ w, 8, 8), M, 512),
    "coo": (Applied(lambda w, x: torch.sparse.mm(w.to_sparse(), x), weight=SPARSE), M, 64),
    "csr": (Applied(lambda w, x: F.linear(x, w), weight=SPARSE.to_sparse_csr()), M, 64),
    "complex": (Applied(lambda w, x: w @ x.cfloat(), weight=M.cfloat()), M, 4 * 512),
    "grouped": (Applied(lambda w, x: torch._grouped_mm(
        x, w, offs=torch.tensor([8, 16], dtype=torch.int32)),
        weight=torch.randn(2, 32, 16).bfloat16()), torch.randn(16, 32), 16 * 32 * 16),
    "int8": (Applied(lambda w, x: torch._weight_int8pack_mm(
        x, w.to(torch.int8), torch.ones(16, dtype=torch.bfloat16)),
        weight=torch.ones(16, 32).bfloat16()), torch.randn(4, 32), 4 * 32 * 16),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_A_VECTOR | WITH_A_MATRIX)
def test_matrix_products(name: str) -> None:
    net, x, macs = (WITH_A_VECTOR | WITH_A_MATRIX)[name]
    assert count_macs(net, x) == macs


def test_convolutions_of_other_kinds() -> None:
    images = torch.randn(2, 4, 6, 6)
    grouped = nn.ConvTranspose2d(4, 6, 3, groups=2)
    assert count_macs(grouped, images) == 2 * 36 * 4 * 3 * 9
    tbc = Applied(lambda w, x: torch.conv_tbc(x, w, torch.zeros(4)), 3, 8, 4)
    assert count_macs(tbc, torch.randn(5, 2, 8)) == 3 * 2 * 3 * 8 * 4
    ready = to_mkldnn(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU()).eval())

    class Mkldnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ready

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x.to_mkldnn()).to_dense()

    assert count_macs(Mkldnn(), images) == 2 * 16 * 8 * 2 * 9


def test_quantised_networks_count_as_before() -> None:
    linear = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    for dtype in (torch.qint8, torch.float16):
        quantised = quantize_dynamic(linear, {nn.Linear}, dtype=dtype)
        assert count_macs(quantised, torch.randn(5, 8)) == 5 * (32 + 12)


class Static(nn.Module):
    """A network that is quantised as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.back = (
            torch.ao.quantization.QuantStub(),
            torch.ao.quantization.DeQuantStub(),
        )
        self.conv, self.relu = nn.Conv2d(4, 8, 3, groups=2), nn.ReLU()
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2), nn.Linear(4 * 25, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.relu(self.conv(self.quant(x))))
        return self.back(self.last(x.flatten(1)))


def test_a_statically_quantised_network_counts_as_before() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no quantised kernels")
    net, x = Static().eval(), torch.randn(2, 4, 6, 6)
    before = count_macs(net, x)
    assert before == 2 * (16 * 8 * 2 * 9 + 16 * 8 * 4 * 4 + 100 * 5)
    net.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")  # type: ignore[assignment] # its way
    net.up.qconfig = torch.ao.quantization.default_qconfig  # per tensor, as it must be
    prepared = torch.ao.quantization.prepare(net)
    prepared(x)
    assert count_macs(torch.ao.quantization.convert(prepared), x) == before


def attention(**options: Any) -> Callable[..., torch.Tensor]:
    return lambda w, q, k, v: F.scaled_dot_product_attention(q * w, k, v, **options)


@pytest.mark.parametrize("mask", [False, True])
def test_attention_with_fewer_keys_than_queries_and_a_mask(mask: bool) -> None:
    q, k = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 7, 8)
    v = torch.randn(2, 2, 7, 6)
    options = {"attn_mask": torch.ones(10, 7, dtype=torch.bool)} if mask else {}
    grouped = Applied(attention(enable_gqa=True, **options), 1)
    assert count_macs(grouped, (q, k, v)) == 2 * 4 * 10 * 7 * (8 + 6)


def test_fused_attention_that_a_network_asks_for_counts_too() -> None:
    def fused(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(x * w, x, x)

    assert count_macs(Applied(fused, 1), torch.randn(1, 2, 10, 4)) == 2 * 2 * 10 * 10 * 4


def test_two_sparse_matrices_are_refused() -> None:
    net = Applied(lambda w, x: torch.mm(w.to_sparse_csr(), x.to_sparse_csr()), weight=SPARSE)
    with pytest.raises(MeasurementError, match=r"two sparse matrices .* network_measure"):
        count_macs(net, M)


def test_nothing_is_registered_in_the_process() -> None:
    before = dict(flop_registry)
    count_macs(nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3)))
    assert flop_registry == before
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        M @ V
    assert counter.get_total_flops() == 0
    assert torch.ops.aten.mv in formulas()
