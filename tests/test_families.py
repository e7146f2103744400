# SPDX-License-Identifier: Apache-2.0
"""The matrix: families of super-networks, written as their projects have them, by properties."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lightning_subnet import SearchSpace, Subnet, elastic
from tests.families import residual
from tests.families.checks import PROPERTIES, Checked
from tests.families.family import CLASSES, Family, Lit, images, seeded
from tests.families.registry import FAMILIES, LIMITS, SLICED, SLOW

# Those of a search are tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore::lightning_subnet.errors.SubnetWarning")


@functools.cache
def checked(name: str) -> Checked:
    return Checked(FAMILIES[name], shipped=3 if name in SLICED else 5)


def cells() -> list[Any]:
    return [
        pytest.param(name, key, marks=[pytest.mark.slow] if (name, key) in SLOW else [])
        for name in FAMILIES
        for key in PROPERTIES
    ]


@pytest.mark.parametrize(("name", "key"), cells())
def test_matrix(name: str, key: str) -> None:
    cell = checked(name).cell(key)
    limit = LIMITS.get((name, key))
    if limit is None:
        assert cell.ok, cell.value
    else:
        assert not cell.ok, "it holds: take it out of LIMITS"
        assert limit.value in cell.value


def test_all_families_of_the_matrix_are_there() -> None:
    assert len(FAMILIES) == 19
    assert set(LIMITS) <= {(name, key) for name in FAMILIES for key in PROPERTIES}
    assert set(SLOW) <= {(name, key) for name in FAMILIES for key in PROPERTIES}
    for family in FAMILIES.values():
        assert 1 <= len(family.code.splitlines()) <= 3, family.name


# The properties fail where they should: networks with one fault each


class Slim(nn.Module):
    """64 -> width -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, CLASSES)
        self.width = 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.width
        x = nn.functional.linear(x.flatten(1), self.first.weight[:w], self.first.bias[:w]).relu()
        return nn.functional.linear(x, self.last.weight[:, :w], self.last.bias)


class Plain(nn.Sequential):
    """What Slim's subnets are."""

    def __init__(self, net: Slim, width: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, CLASSES))
        self[1].weight.data.copy_(net.first.weight.data[:width])
        self[1].bias.data.copy_(net.first.bias.data[:width])
        self[3].weight.data.copy_(net.last.weight.data[:, :width])
        self[3].bias.data.copy_(net.last.bias.data)


def activate(net: Slim, subnet: Subnet) -> None:
    net.width = subnet["width"]


def extract(net: Slim, subnet: Subnet) -> nn.Module:
    return Plain(net, subnet["width"])


def network(cls: type[Slim] = Slim, activate: Any = activate, extract: Any = None) -> Lit:
    space = SearchSpace(width=[2, 4, 8, 12, 16])
    return Lit(elastic(seeded(cls), space=space, activate=activate, extract=extract))


def slim(activate: Any = activate, extract: Any = extract) -> Family:
    return Family("slim", lambda: network(Slim, activate, extract), images, "", "")


def failing(family: Family, key: str) -> str:
    cell = Checked(family, shipped=2).cell(key)
    assert not cell.ok
    return cell.value


def test_a_network_without_a_fault_has_all_properties() -> None:
    family = Checked(slim())
    for key in PROPERTIES:
        assert family.cell(key).ok, (key, family.cell(key))


class Leaky(Slim):
    """Goes by the width that ran before, which it keeps where no search looks."""

    ran: ClassVar = [16]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 1 + 0.01 * self.ran[-1]
        self.ran.append(self.width)
        return super().forward(x) * scale


def test_a_leak_between_subnets_is_not_isolated() -> None:
    value = failing(replace(slim(), build=lambda: network(Leaky)), "isolated")
    assert "of one subnet is" in value or "difference 0.0" in value


class Scaled(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.001


class Decides(Plain):
    """Goes by the values of its input, which a file cannot."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 if x.sum().item() < 1e9 else 2)


class Wasteful(Plain):
    """Has weights that it does not use."""

    def __init__(self, net: Slim, width: int) -> None:
        super().__init__(net, width)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(4):
            x = self[i](x)
        return x


def of(plain: type[Plain]) -> Family:
    return slim(extract=lambda net, subnet: plain(net, subnet["width"]))


def test_another_network_is_not_what_was_scored() -> None:
    assert failing(of(Scaled), "extracted").startswith("ParityError")


def test_a_network_that_decides_by_values_does_not_convert() -> None:
    assert failing(of(Decides), "onnx").startswith("ExportError")


def test_weights_that_do_not_run_are_not_real() -> None:
    assert "12 weights do not run" in failing(of(Wasteful), "params")  # 2 subnets, 6 each


class Undecided(Slim):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 if x.sum().item() < 1e9 else 2)


def test_a_network_that_cannot_be_sliced_has_no_params_of_its_own() -> None:
    assert Checked(slim(extract=None), shipped=2).cell("params").ok  # torch.export follows it
    undecided = replace(slim(), build=lambda: network(Undecided))
    assert "2 of 2 not sliced" in failing(undecided, "params")


def test_a_cost_that_does_not_change_is_not_a_cost() -> None:
    def dead(net: Slim, subnet: Subnet) -> None:
        net.width = 4

    checked = Checked(slim(dead, extract=lambda net, subnet: Plain(net, 4)))
    assert not checked.cell("macs").ok
    assert not checked.cell("isolated").ok, "all scores are the same"


class Forgetful(nn.BatchNorm2d):
    """Trains by its batch and gathers nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.running_mean[:, None, None], self.running_var[:, None, None]
        if self.training:
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
        y = (x - mean) / (var + self.eps).sqrt()
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def test_statistics_that_stay_are_not_renewed() -> None:
    def build() -> Lit:
        net = residual.ResNet18()
        net.bn1 = Forgetful(8)
        return Lit(residual.skippable_blocks(seeded(lambda: net), residual.EXAMPLE))

    assert failing(Family("forgetful", build, images, "", ""), "renewed")
