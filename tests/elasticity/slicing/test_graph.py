# SPDX-License-Identifier: Apache-2.0
"""Operators of a slice: regions of code, devices, and what tracing and exporting make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, extract
from lightning_subnet.elasticity.protocol import elastic
from tests.elasticity.slicing.networks import ROWS, made


class Regions(nn.Module):
    """Computes under `no_grad`, under autocast, and on its device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.other = nn.Parameter(torch.randn(8, 8))
        self.n = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            fixed = F.linear(x, self.weight[: self.n])
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            low = F.linear(x, self.other[: self.n])
        rows = torch.arange(self.n, device=x.device)
        return fixed + low.float() * F.linear(x, self.weight[: self.n]) + rows


@pytest.fixture
def sliced() -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = elastic(
        Regions(), space=SearchSpace(n=[3, 8]),
        activate=lambda net, subnet: setattr(net, "n", subnet["n"]),
    ).eval()  # fmt: skip
    smallest = net.search_space().smallest
    plain = extract(net, smallest, ROWS)
    assert plain.sliced
    net.activate(smallest)
    return net, plain


def test_regions_of_code_keep_their_meaning(sliced: tuple[Any, Any]) -> None:
    net, plain = sliced
    assert torch.equal(plain(ROWS), net(ROWS))
    assert not torch.is_autocast_enabled("cpu")
    for each in (net, plain):
        each.train()
        each(ROWS).sum().backward()
    # No gradient goes through what is computed under no_grad.
    assert torch.allclose(plain.weight.grad, net.weight.grad[:3])
    assert torch.allclose(plain.other.grad, net.other.grad[:3])


def test_tensors_are_made_where_the_weights_are(sliced: tuple[Any, Any]) -> None:
    _, plain = sliced
    plain.to("meta")
    assert plain(ROWS.to("meta")).device.type == "meta"


def test_a_slice_is_sliced_again_and_compiled(sliced: tuple[Any, Any]) -> None:
    net, plain = sliced
    program = torch.export.export(plain, (ROWS,), strict=False)
    assert torch.equal(program.module()(ROWS), plain(ROWS))
    compiled = torch.compile(plain, backend="eager", fullgraph=False)
    with torch.no_grad():
        assert torch.allclose(compiled(ROWS), net(ROWS))


def test_normalisations_follow_the_flag_of_their_module() -> None:
    net, example = made("slimmable")
    plain = extract(net, net.search_space().smallest, example).train()
    holder = dict(plain.named_modules())["norm.bn.0"]
    before = holder.running_mean.clone()
    holder.eval()  # frozen, as one does it
    plain(example)
    assert torch.equal(holder.running_mean, before)
    holder.train()
    plain(example)
    assert not torch.equal(holder.running_mean, before)
    holder.eval()
    plain.eval()
    assert torch.equal(plain(example)[0], plain(example)[0])
