# SPDX-License-Identifier: Apache-2.0
"""The costs of the largest and the smallest subnet, for right and for wrong orders of values."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import Choice, SearchSpace, Subnet, elastic
from lightning_subnet.elasticity.ends import Costs, calls_of, check_ends, groups_of
from lightning_subnet.errors import ElasticityError, ElasticityWarning
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import LitMlp
from tests.problems import assert_clear, numpy_state

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ElasticityWarning)  # of the spaces that are meant wrong
        yield


class Net(nn.Module):
    """6 -> width -> 3, `depth` times over the hidden ones; steps of `stride` over the rows."""

    def __init__(self, **choices: Any) -> None:
        super().__init__()
        self.space = SearchSpace(**choices)
        self.first, self.inner, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.values: dict[str, Any] = {}
        self.passes = 0

    def search_space(self) -> SearchSpace:
        return self.space

    def activate(self, subnet: Subnet) -> None:
        self.values = dict(subnet)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.passes += 1
        w = self.values.get("width", 16)
        x = self.drop(self.norm(x))[:: self.values.get("stride", 1)]
        h = F.linear(x, self.first.weight[:w], self.first.bias[:w])
        for _ in range(self.values.get("depth", 0)):
            h = F.linear(h, self.inner.weight[:w, :w])
        return F.linear(h, self.last.weight[:, :w])


def error(net: nn.Module, *inputs: Any, **settings: Any) -> str:
    with pytest.raises(ElasticityError) as caught:
        check_ends(net, *(inputs or (X,)), **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("choices", "parts"),
    [
        # 4 rows x (6 x width + width x 3)
        ({"width": [16, 8, 4]}, ["144 MACs, and 576", "last value of 'width', 4,", "first, 16."]),
        ({"width": [16, 8, 4], "depth": [0, 1]}, ["'width'"]),
        ({"stride": [1, 2, 4]}, ["144 MACs, and 576", "'stride', 4,"]),
        ({"depth": [2, 0], "width": [4, 2]}, ["'width', 2,", "so it is with 'depth'."]),
        ({"width": Choice([16, 4], ordered=True)}, ["'width', 4,"]),
    ],
    ids=str,
)
def test_a_largest_that_is_the_cheaper_one_is_refused(choices: Any, parts: list[str]) -> None:
    text = error(Net(**choices))
    assert_clear(text, "The largest subnet of Net costs less than the smallest: ", *parts)
    assert_clear(text, "Choice([...], ordered=True)", "ordered=False where there is no order")
    assert "'depth'" not in text or "depth" in "".join(parts)


@pytest.mark.parametrize(
    "choices",
    [
        {"width": [4, 8, 16]},
        {"stride": Choice([4, 2, 1], ordered=True)},
        {"width": Choice([16, 8], ordered=False)},
        {"colour": ["red", "green"]},  # both cost the same
        {"colour": [2, 1], "width": [4, 8]},
        {"width": Choice([16, 4], ordered=False), "depth": [0, 1]},
        {"depth": [1, 2], "width": Choice([4, 8], when={"depth": [1]})},  # the largest lacks it
    ],
    ids=str,
)
def test_other_ends_pass(choices: Any) -> None:
    net = Net(**choices)
    check_ends(net, X)
    check_ends(net, (X,))
    check_ends(net, {"x": X})
    check_ends(net, X, {"mask": X})
    check_ends(net, (X,), {"mask": X})


def test_it_takes_two_passes_and_changes_nothing() -> None:
    net = Net(width=[4, 8, 16]).train()
    net.drop.eval()
    net.activate(net.space.sample(1, 0)[0])
    state = copy.deepcopy(net.state_dict())
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    before, net.passes = X.clone(), 0
    check_ends(net, X)
    assert net.passes == 2
    assert net.training
    assert not net.drop.training
    assert (random.getstate(), numpy_state()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(before, X)
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert net.values == dict(net.space.largest)  # it does not tell what was in force
    net.active_subnet = net.space.smallest
    check_ends(net, X)
    assert net.values == dict(net.space.smallest)
    wrong = Net(width=[16, 4])
    wrong.active_subnet = wrong.space.subnet(width=16)
    assert error(wrong)
    assert wrong.values == {"width": 16}


def test_buffers_that_count_in_eval_mode_come_back() -> None:
    class Counting(Net):
        def __init__(self, **choices: Any) -> None:
            super().__init__(**choices)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return super().forward(x)

    net = Counting(width=[4, 8])
    check_ends(net, X)
    assert net.count == 0


def test_where_nothing_is_multiplied_parameters_count() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bias, self.d = nn.Embedding(10, 16), nn.Parameter(torch.ones(16)), 16

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = self.bias[: self.d].expand(len(x), self.d)
            return F.embedding(x, self.table.weight[:, : self.d]) + bias

    def net(values: list[int]) -> nn.Module:
        return elastic(
            Lookup(), space=SearchSpace(d=values), activate=lambda n, s: setattr(n, "d", s["d"])
        )

    x = torch.zeros(3, dtype=torch.long)
    check_ends(net([4, 16]), x)
    assert_clear(error(net([16, 4]), x), "44 parameters, and 176", "'d', 4,")


class Transforming(Net):
    """Makes narrow weights by a product, as OFA makes small kernels: its extraction does not."""

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.values.get("width", 16) < 16:
            x = x + 0 * (torch.eye(64) @ torch.ones(64, 6))[: len(x)]
        return super().forward(x)

    def extract(self, subnet: Subnet) -> nn.Module:
        plain = Net(width=[4, 16])
        plain.values = dict(subnet)
        return plain


class Masked(Net):
    """Does all of the work for each subnet, which its extraction does not."""

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        on = (torch.arange(16) < self.values["width"]).float()
        return self.last(self.first(x) * on)

    def extract(self, subnet: Subnet) -> nn.Module:
        w = subnet["width"]
        return nn.Sequential(nn.Linear(6, w), nn.Linear(w, 3))


class Broken(Masked):
    def extract(self, subnet: Subnet) -> nn.Module:
        raise RuntimeError("not today")


def test_the_cost_is_that_of_what_is_extracted() -> None:
    check_ends(Transforming(width=[4, 16]), X)
    assert "144 MACs, and 576" in error(Transforming(width=[16, 4]))
    check_ends(Masked(width=[4, 16]), X)
    assert "144 MACs, and 576" in error(Masked(width=[16, 4]))
    check_ends(Broken(width=[16, 4]), X)  # all cost the same; what is wrong there is another check


def test_a_network_that_does_not_run_in_eval_mode_is_left_to_others() -> None:
    class Training(Net):
        def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
            assert self.training
            return super().forward(x)

    check_ends(Training(width=[16, 4]), X)


def test_parts_of_a_space() -> None:
    net = Net(width=[16, 8, 4], depth=[0, 1, 2])
    space = net.space
    narrow = space.narrowed_to({"width": [8, 4]})
    assert_clear(error(net, space=space.narrowed_to({"width": [8, 4], "depth": [0]})), "144", "288")
    assert_clear(error(net, space=narrow), "'width', 4, is cheaper than its first, 8")
    check_ends(net, X, space=space.narrowed_to({"width": [4]}))
    ends = [space.largest, space.smallest]
    assert "They differ in 'width', 'depth'." in error(net, space=space.restricted_to(ends))
    middle = [space.subnet(width=16, depth=1), space.subnet(width=8, depth=1)]
    check_ends(net, X, space=space.restricted_to(middle))  # it lacks the ends: nothing to mend


def test_conditions_that_hide_choices_from_the_largest() -> None:
    skipped = {"skip": [False, True], "depth": Choice([1, 2], when={"skip": [False]})}

    class Skipping(Net):
        def activate(self, subnet: Subnet) -> None:
            self.values = {"depth": 0 if subnet["skip"] else subnet["depth"]}

    text = error(Skipping(**skipped))
    assert_clear(text, "'skip', True, is cheaper than its first, False")
    right = {"skip": [True, False], "depth": Choice([1, 2], when={"skip": [False]})}
    check_ends(Skipping(**right), X)


def test_modules_around_and_networks_of_the_package() -> None:
    check_ends(LitMlp(), torch.randn(2, 64))
    check_ends(ElasticMobileNetV3.tiny(), torch.randn(1, 1, 8, 8))


def test_reads_of_an_lstm_are_all_its_weights() -> None:
    net = elastic(nn.LSTM(5, 4), space=SearchSpace(a=[1, 2]), activate=lambda n, s: None)
    costs = Costs(net, net, torch.zeros(3, 1, 5))
    subnet = net.search_space().largest
    assert costs._in_use(subnet) == sum(p.numel() for p in net.parameters()) == 176


def test_lists_of_choices_go_together() -> None:
    space = SearchSpace({"d": [1, 2], "k.0": [1, 2], "e": [1, 2], "k.1": [1, 2], "k.x": [1, 2]})
    assert groups_of(space) == [(0,), (1, 3), (2,), (4,)]


def test_the_last_call_is_kept_without_its_graph() -> None:
    net = nn.Linear(2, 2)
    x = torch.ones(1, 2, requires_grad=True) * 2
    with calls_of(net) as calls:
        net(torch.zeros(1, 2))
        net(input=x)
    ((args, named),) = calls
    assert args == ()
    assert torch.equal(named["input"], x)
    assert not named["input"].requires_grad
    with calls_of(net) as calls:
        pass
    assert calls == []
