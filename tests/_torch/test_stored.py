# SPDX-License-Identifier: Apache-2.0
"""Numbers and bytes of a network's tensors: what is shared counts once, whatever its form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.mkldnn import to_mkldnn

from lightning_subnet._torch.stored import held, n_bytes, n_elements, stored, weights
from lightning_subnet.errors import MeasurementError

pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.ao|quant|script_method|jit|Sparse CSR)")


def counts(net: nn.Module) -> tuple[int, int]:
    return n_elements(weights(net)), n_bytes(stored(net))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 64), nn.Linear(64, 16, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_count_once() -> None:
    assert counts(Tied()) == (1024, 4096)
    shared = nn.Linear(4, 4)
    assert counts(nn.Sequential(shared, nn.ReLU(), shared)) == (20, 80)
    net = Tied()
    net.head.weight = nn.Parameter(net.embedding.weight.detach())  # another object, same memory
    assert counts(net) == (1024, 4096)
    net.head.weight = nn.Parameter(net.embedding.weight.detach().t())
    assert counts(net) == (1024, 4096)
    with torch.device("meta"):
        assert counts(Tied()) == (1024, 4096)


def test_views_of_one_storage_count_what_they_cover() -> None:
    flat = torch.zeros(100)
    net = nn.ParameterList([flat[:60].view(6, 10), flat[40:80], flat[90:95]])
    assert counts(net) == (85, 340)
    columns = nn.ParameterList([torch.zeros(10, 10)[:, :3]])
    assert counts(columns) == (30, 120)
    spread = nn.ParameterList([torch.zeros(10, 1).expand(10, 10)])
    assert counts(spread) == (10, 40)
    assert n_bytes([flat, flat.view(torch.int32), flat.view(torch.uint8)]) == 400


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5), st.integers(0, 4)), min_size=1))
def test_what_views_cover_is_the_union_of_their_places(views: list[tuple[int, int, int]]) -> None:
    flat = torch.zeros(64)
    tensors = [flat.as_strided([n, 2], [step, 1], offset) for offset, n, step in views]
    places = {offset + i * step + j for offset, n, step in views for i in range(n) for j in (0, 1)}
    if all(step != 1 for _, _, step in views):  # else a view overlaps with itself
        assert n_elements(tensors) == len(places)
        assert n_bytes(tensors) == 4 * len(places)


def test_buffers_count_in_bytes_where_a_checkpoint_has_them() -> None:
    net = nn.BatchNorm1d(3)
    net.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert counts(net) == (6, 4 * 12 + 8)


def test_extra_state_of_any_kind() -> None:
    class Extra(nn.Linear):
        state: Any = None

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None:
            self.state = state

    net = Extra(2, 3)
    for state, more in [
        ({"steps": 3, "name": "x"}, 0), (None, 0), (b"123", 0), (torch.zeros(5), 20),
        ({"a": [torch.zeros(2), torch.zeros(1).double()]}, 16), ({"again": net.weight}, 0),
    ]:  # fmt: skip
        net.state = state
        assert counts(net) == (9, 36 + more)


@pytest.mark.parametrize(("dtype", "size"), [(torch.qint8, 1), (torch.float16, 4)])
def test_quantised_layers_count_what_they_pack(dtype: torch.dtype, size: int) -> None:
    linear = quantize_dynamic(nn.Sequential(nn.Linear(64, 32)), {nn.Linear}, dtype=dtype)
    scale = 4 + 8  # of its output, as the state has them
    assert counts(linear) == (64 * 32 + 32, 64 * 32 * size + 32 * 4 + scale)
    lstm = quantize_dynamic(nn.Sequential(nn.LSTM(4, 6)), {nn.LSTM}, dtype=torch.qint8)
    assert counts(lstm) == (24 * 10 + 48, 24 * 10 + 48 * 4)
    both = nn.Sequential(nn.Linear(8, 8), linear)
    assert counts(both)[0] == 72 + 64 * 32 + 32


def test_scales_of_each_channel_count_in_bytes() -> None:
    net = nn.Module()
    scales, zeros = torch.ones(4), torch.zeros(4, dtype=torch.long)
    weight = torch.quantize_per_channel(torch.ones(4, 8), scales, zeros, 0, torch.qint8)
    net.register_buffer("weight", weight)
    assert n_bytes(stored(net)) == 32 + weight.q_per_channel_scales().numel() * 8 + 4 * 8


def test_sparse_weights_count_what_is_stored() -> None:
    eye = torch.eye(8)
    for weight, indices in [
        (eye.to_sparse(), 2 * 8), (eye.to_sparse_csr(), 9 + 8), (eye.to_sparse_csc(), 9 + 8),
        (eye.to_sparse_bsr((1, 1)), 9 + 8),
    ]:  # fmt: skip
        assert counts(nn.ParameterList([nn.Parameter(weight)])) == (8, 8 * 4 + indices * 8)


def test_what_other_libraries_and_torchscript_hold() -> None:
    layer = nn.Linear(8, 4).eval()
    assert counts(to_mkldnn(nn.Sequential(layer)))[0] == 36
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(layer).eval()))
    assert counts(nn.Sequential(frozen, nn.Linear(4, 2))) == (36 + 10, 46 * 4)
    assert counts(nn.Sequential(torch.jit.script(layer))) == (36, 36 * 4)


class Halves(torch.Tensor):
    """A tensor in a class of its own, as those of torchao: bytes with a scale, read as floats."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Halves:
        return Halves(inner["data_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        new = cls(args[0].data_.detach(), args[0].scale.detach())
        return return_and_correct_aliasing(func, args, kwargs or {}, new)


def test_a_tensor_of_a_class_of_its_own_counts_what_it_holds() -> None:
    net = nn.Module()
    tensor = Halves(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4))
    net.weight = nn.Parameter(tensor, requires_grad=False)
    assert counts(net) == (32, 32 + 16)


def test_parametrised_weights_are_no_trouble() -> None:
    assert counts(parametrizations.weight_norm(nn.Linear(8, 4))) == (32 + 4 + 4, 40 * 4)
    assert counts(parametrizations.orthogonal(nn.Linear(8, 8)))[0] == 64 + 8


def test_what_has_no_size_is_refused() -> None:
    with pytest.raises(MeasurementError, match=r"0\.weight of Sequential has no shape before"):
        weights(nn.Sequential(nn.LazyLinear(3)))

    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            raise ValueError("no state today")

    with pytest.raises(MeasurementError, match=r"state_dict\(\) of Odd .*no state today"):
        stored(Odd(2, 3))


def test_what_is_held_in_memory() -> None:
    net = nn.Linear(4, 2)
    net.mask, net.example_input_array = torch.ones(7), torch.ones(100)
    net.register_buffer("scratch", torch.zeros(5), persistent=False)
    assert [x.numel() for x in held(net)] == [8, 2, 5, 7]
    quantised = quantize_dynamic(nn.Sequential(nn.Linear(4, 2)), {nn.Linear})
    assert n_bytes(held(quantised)) == 8 + 2 * 4
    assert [x.numel() for x in held(nn.ParameterList([torch.eye(3).to_sparse()]))] == [3, 6]
    assert n_bytes(held(to_mkldnn(nn.Sequential(nn.Linear(4, 2).eval())))) == 40
