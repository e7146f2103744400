# SPDX-License-Identifier: Apache-2.0
"""`params` and `size_mb` of networks that are sliced: those of the slice, without slicing each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin, extract
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.costs.counts import MACS, PARAMS, SIZE_MB
from lightning_subnet.costs.resolve import resolve
from lightning_subnet.costs.weight_counts import WeightCounter, counter_of
from tests.elasticity.slicing.networks import made
from tests.networks import ElasticMlp, LitMlp


@pytest.mark.parametrize("family", ["hat", "whittle", "universally slimmable"])
def test_params_and_size_are_those_of_the_slice(family: str) -> None:
    net, example = made(family)
    space = net.search_space()
    subnets = [space.smallest, space.largest, *space.sample(1, 5)]
    params = PARAMS.bind(net, example)(subnets)
    sizes = SIZE_MB.bind(net, example)(subnets)
    assert counter_of(net, example) is counter_of(net, example)
    for subnet, n, size in zip(subnets, params, sizes, strict=True):
        plain = extract(net, subnet, example, only="inference")
        assert plain.sliced
        assert n == sum(p.numel() for p in plain.parameters())
        state = plain.state_dict().values()
        assert size == pytest.approx(sum(x.numel() * x.element_size() for x in state) / 1e6)


def test_subnets_are_counted_without_slicing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    net, example = made("hat")
    count = counter_of(net, example)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it takes seconds")

    monkeypatch.setattr("lightning_subnet.costs.weight_counts.extract", never)
    for subnet in net.search_space():
        used = count(subnet)
        assert used["positions"].numel == 12 * subnet["width"]  # all, however long the input
        assert used["embed.weight"].numel == 20 * subnet["width"]  # tied with the output


def test_where_passes_and_slices_disagree_each_subnet_is_sliced() -> None:
    class Odd(SubnetMixin, nn.Module):
        """Takes so many rows of half of a weight as the input is long."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.n = nn.Parameter(torch.randn(8, 8)), 8

        def search_space(self) -> SearchSpace:
            return SearchSpace(n=[6, 8])

        def activate(self, subnet: Subnet) -> None:
            self.n = subnet["n"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight[: self.n][: x.shape[1]].sum()

    net, x = Odd().eval(), torch.zeros(2, 3)
    space = net.search_space()
    assert WeightCounter(net, x)(space.smallest)["weight"].numel == 48
    assert PARAMS.bind(net, x)([space.smallest, space.largest]) == [48, 64]


def test_a_network_that_cannot_be_sliced_has_all_its_weights() -> None:
    class Decides(ElasticMlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() < 1 else x

    net, x = Decides(), torch.zeros(1, 64)
    space = net.search_space()
    everything = sum(p.numel() for p in net.parameters())
    assert PARAMS.bind(net, x)([space.smallest, space.largest]) == [everything] * 2
    assert "torch.export" in str(counter_of(net, x).refusal)
    assert PARAMS.bind(ElasticMlp(), None)([space.smallest]) == [everything]  # no sample


def test_the_part_of_a_model_is_counted_on_what_it_gets() -> None:
    model = LitMlp()
    space = model.net.search_space()
    measures = resolve(model, [], ["params", "size_mb"], lambda: torch.zeros(1, 64))
    smallest = space.indices([space.smallest])
    params = 64 * 2 + (64 + 1) * 4 + (4 + 1) * 10
    assert measures["params"].evaluate(space, smallest)[0][0] == params
    size = 4 * (params + 2 * 64) / 1e6
    assert measures["size_mb"].evaluate(space, smallest)[0][0] == pytest.approx(size)


def test_macs_are_those_of_the_slice() -> None:
    net, example = made("dynabert")
    smallest = net.search_space().smallest
    plain = extract(net, smallest, example, only="example")
    assert MACS.bind(net, example)([smallest]) == [count_macs(plain, example)]


def test_counting_changes_nothing() -> None:
    class Counts(ElasticMlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.1, self.training)

    net = Counts().train()
    net.norm.eval()
    space = net.search_space()
    net.activate(space.smallest)
    state = {name: x.clone() for name, x in net.state_dict().items()}
    drawn, flags = torch.get_rng_state(), [child.training for child in net.modules()]
    PARAMS.bind(net, torch.zeros(2, 64))([space.largest])
    assert net.active_subnet == space.smallest
    assert [child.training for child in net.modules()] == flags
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
