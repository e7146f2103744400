# SPDX-License-Identifier: Apache-2.0
"""Peak memory against answers on paper, and in a search."""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin, SubnetSearch, extract
from lightning_subnet.costs import PeakMemory
from lightning_subnet.costs.memory import peak_bytes
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.strategies import NSGA2
from lightning_subnet.study.measures import NetworkMeasure
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import Digits, ElasticMlp, LitMlp, quiet_trainer
from tests.problems import assert_clear

FLOAT = 4


def chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(
    ("widths", "most"),
    [
        ((10, 100, 10), 10 + 100 + 10),  # the input is held by the caller
        ((5, 50, 60, 4), 5 + 50 + 60),
        ((5, 8, 70, 90, 4), 5 + 70 + 90),  # 8 is gone when 90 is made
        ((100, 1), 100 + 1),
    ],
)
def test_a_chain_holds_its_input_and_two_neighbours(
    widths: tuple[int, ...], most: int, rows: int
) -> None:
    weights = sum(a * b for a, b in pairwise(widths))
    got = peak_bytes(chain(*widths), (torch.zeros(rows, widths[0]),))
    assert got == FLOAT * (weights + rows * most)


class Residual(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.wide = nn.Linear(5, 50, bias=False), nn.Linear(50, 200, bias=False)
        self.back, self.relu = nn.Linear(200, 50, bias=False), nn.ReLU(inplace=inplace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + self.back(self.relu(self.wide(x)))


def test_a_residual_connection_keeps_its_tensor_alive() -> None:
    weights = 5 * 50 + 2 * 50 * 200
    x = torch.zeros(3, 5)
    # Input, the kept tensor, and the wide one before and after the activation.
    assert peak_bytes(Residual(), (x,)) == FLOAT * (weights + 3 * (5 + 50 + 200 + 200))
    # In place there is one wide one; the widest moment is then the way back.
    inplace = peak_bytes(Residual(inplace=True), (x,))
    assert inplace == FLOAT * (weights + 3 * (5 + 50 + 200 + 50))


class Views(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(-1, 2).t()[:, :3]  # views of the input
        return y + 1


def test_views_cost_nothing_and_shared_weights_count_once() -> None:
    assert peak_bytes(Views(), (torch.zeros(4, 6),)) == FLOAT * (24 + 6)
    tied = chain(8, 8, 8)
    tied[1].weight = tied[0].weight
    assert peak_bytes(tied, (torch.zeros(1, 8),)) == FLOAT * (64 + 24)


def test_buffers_and_types_count() -> None:
    net = nn.Sequential(nn.BatchNorm1d(10)).eval()
    state = 4 * 10 * FLOAT + 8  # weight, bias, mean, variance, and how many batches
    assert peak_bytes(net, (torch.zeros(2, 10),)) == state + 2 * 20 * FLOAT
    half = chain(10, 20).bfloat16()
    assert peak_bytes(half, (torch.zeros(1, 10),)) == 2 * (200 + 30)


class Weighted(nn.Module):
    """A function of a weight and an input."""

    def __init__(self, fn: Any, weight: torch.Tensor) -> None:
        super().__init__()
        self.fn, self.weight = fn, nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(self.weight, x)


@pytest.mark.filterwarnings("ignore:.*(torch.ao|quant|jit|script_method)")
def test_weights_of_other_forms_count_as_they_are_kept() -> None:
    x = torch.zeros(1, 64)
    io = FLOAT * (64 + 64)
    linear = nn.Sequential(nn.Linear(64, 64)).eval()
    assert peak_bytes(linear, (x,)) == FLOAT * (64 * 64 + 64) + io
    quantised = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear})
    assert peak_bytes(quantised, (x,)) == 64 * 64 + FLOAT * 64 + io
    frozen = torch.jit.freeze(torch.jit.script(linear))
    assert peak_bytes(frozen, (x,)) == FLOAT * (64 * 64 + 64) + io
    sparse = Weighted(lambda w, x: torch.sparse.mm(w, x.t()), torch.eye(64).to_sparse())
    assert peak_bytes(sparse, (x,)) == 64 * FLOAT + 2 * 64 * 8 + io
    masked = Weighted(lambda w, x: x @ w, torch.zeros(64, 64))
    masked.mask = torch.ones(10)
    assert peak_bytes(masked, (x,)) == FLOAT * (64 * 64 + 10) + io


def test_tensors_that_a_network_makes_have_the_type_of_its_weights() -> None:
    net = Weighted(lambda w, x: (x * torch.ones(8)) @ w, torch.zeros(8, 8, dtype=torch.bfloat16))
    assert peak_bytes(net, (torch.zeros(1, 8),)) == 2 * (64 + 8 + 8 + 8)
    assert torch.get_default_dtype() == torch.float32


def test_attention_is_taken_apart_and_the_fast_path_is_left_as_it_was() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    assert torch.backends.mha.get_fastpath_enabled()
    weights = sum(p.numel() for p in layer.parameters())
    got = peak_bytes(layer, (torch.zeros(2, 10, 32),))
    assert torch.backends.mha.get_fastpath_enabled()
    # At least the input, queries, keys and values are alive together.
    assert got >= FLOAT * (weights + 2 * 10 * 32 * 4)


def test_it_is_the_same_every_time_and_leaves_no_trace() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space = net.search_space()
    net.activate(space.smallest)
    state = torch.get_rng_state()
    subnets = [space.smallest, space.largest, *space.sample(3, rng=0)]
    runs = [PeakMemory().bind(net, torch.zeros(3, 1, 8, 8))(subnets) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] == PeakMemory().bind(net, torch.ones(1, 1, 8, 8))(subnets)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.active_subnet == space.smallest
    assert gc.isenabled()
    assert runs[0][0] < runs[0][1]
    large = extract(net, space.largest)
    assert runs[0][1] * 1e6 > FLOAT * sum(p.numel() for p in large.parameters())


def test_activations_grow_with_the_batch_and_weights_do_not() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    x, top = torch.zeros(1, 1, 8, 8), [net.search_space().largest]
    one, two, four = (PeakMemory(batch_size=n).bind(net, x)(top)[0] for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), abs=1e-9)


def test_what_it_is() -> None:
    measure = PeakMemory().bind(ElasticMlp(), torch.zeros(1, 64))
    assert isinstance(PeakMemory(), NetworkMeasure)
    assert (measure.name, measure.unit, measure.exact) == ("peak_memory_mb", "MB", True)


def test_in_a_search_it_is_exact_and_free() -> None:
    result = SubnetSearch(
        objectives={"val_acc": "max", "peak_memory_mb": "min"}, measures=[PeakMemory()],
        constraints={"peak_memory_mb": "<= 100%"}, strategy=NSGA2(population=3), budget=5,
        storage=None, trainer=quiet_trainer(),
    ).fit(LitMlp(), Digits(), progress=False)  # fmt: skip
    assert "peak_memory_mb" in result.problem.exact
    assert all(e.values["peak_memory_mb"] > 0 for e in result.history)


class Picky(SubnetMixin, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.broken = nn.Linear(4, 4), 0

    def search_space(self) -> SearchSpace:
        return SearchSpace(broken=[0, 1])

    def activate(self, subnet: Subnet) -> None:
        self.broken = subnet["broken"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise ValueError("too wide")
        return self.layer(x)


def test_one_that_fails_is_its_own_failure_but_the_first_ends_it() -> None:
    net = Picky()
    fine, broken = list(net.search_space())
    measure = PeakMemory().bind(net, torch.zeros(1, 4))
    with pytest.raises(MeasurementError, match="too wide"):
        measure([broken])
    assert measure([fine])[0] > 0
    with pytest.raises(RuntimeError, match="too wide") as caught:
        measure([broken])
    assert not isinstance(caught.value, MeasurementError)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"batch_size": 0}, ("batch_size=0", "from 1")),
        ({"batch_size": True}, ("batch_size=True",)),
        ({"batch_size": 1.5}, ("batch_size=1.5",)),
        ({"input": [1]}, ("PeakMemory", "not a batch")),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ObjectiveError) as caught:
        PeakMemory(**settings)
    assert_clear(caught.value, *parts)


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ObjectiveError, match=f"'{device}'"):
        PeakMemory(device=device).bind(ElasticMlp(), torch.zeros(1, 64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space = net.search_space()
    measure = PeakMemory(device="cuda").bind(net, torch.zeros(1, 1, 8, 8))
    values = measure([space.smallest, space.largest])
    again = PeakMemory(device="cuda").bind(net, torch.zeros(1, 1, 8, 8))
    assert again([space.largest, space.smallest]) == values[::-1]
    assert values[0] < values[1]
    # A chain: what the allocator gives comes in 512 bytes.
    got = peak_bytes(chain(128, 1280, 128).cuda(), (torch.zeros(8, 128),))
    assert got == FLOAT * (2 * 128 * 1280 + 8 * (128 + 1280 + 128))
