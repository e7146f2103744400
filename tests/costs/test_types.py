# SPDX-License-Identifier: Apache-2.0
"""Costs of networks that make tensors of no stated type, in the precisions of a Trainer."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import Latency, SearchSpace, Subnet, SubnetMixin
from lightning_subnet.costs import PeakMemory
from lightning_subnet.costs.energy import per_pass
from lightning_subnet.costs.resolve import resolve
from lightning_subnet.errors import MeasurementError


class Making(SubnetMixin, nn.Module):
    """A network that multiplies by an identity of the default type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.width = nn.Linear(8, 32), nn.Linear(32, 4), 32

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=[8, 32])

    def activate(self, subnet: Subnet) -> None:
        self.width = subnet["width"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.first.weight[: self.width], self.first.bias[: self.width])
        return F.linear(x @ torch.eye(self.width), self.last.weight[:, : self.width])


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float64, None), (None, "bf16-true")],
)
def test_tensors_of_no_stated_type_are_in_that_of_the_weights(dtype: Any, precision: Any) -> None:
    net = Making() if dtype is None else Making().to(dtype)
    rows, smallest = torch.zeros(1, 8), net.search_space().smallest
    latency = Latency(seconds=0.01, precision=precision).bind(net, rows)
    ((ms, error),) = latency([smallest])
    assert ms > error > 0
    if dtype is not None:
        assert PeakMemory().bind(net, rows)([smallest])[0] > 0
        assert per_pass(net.eval(), (rows,), time.perf_counter, 0.01, 3)[0] > 0
    assert torch.get_default_dtype() == torch.float32


def test_what_runs_in_no_type_is_an_error() -> None:
    class Mixing(Making):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) @ torch.eye(4, dtype=torch.float64)

    net = Mixing().bfloat16()
    with pytest.raises(MeasurementError, match="dtype"):
        Latency(seconds=0.01).bind(net, torch.zeros(1, 8))([net.search_space().largest])


class Reading(SubnetMixin, nn.Module):
    """A network with a layer more in training, and one more in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.depth = nn.Linear(8, 8), nn.Linear(8, 8), 1

    def search_space(self) -> SearchSpace:
        return SearchSpace(depth=[1, 2])

    def activate(self, subnet: Subnet) -> None:
        self.depth = subnet["depth"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.depth):
            x = self.first(x)
        return self.second(x) if self.training or x.dtype == torch.bfloat16 else x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("dtype", "layers"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_costs_are_those_of_inference_in_the_type_of_the_weights(
    training: bool, dtype: torch.dtype, layers: int
) -> None:
    net = Reading().to(dtype).train(training)
    measures = resolve(net, ["macs", "params", "size_mb"], sample=lambda: torch.zeros(1, 8))
    macs, params, size = (
        measures[name]([net.search_space().smallest])[0] for name in ("macs", "params", "size_mb")
    )
    assert (macs, params) == (64 * layers, 72 * layers)
    assert size == 72 * layers * dtype.itemsize / 1e6
    assert net.training == training
