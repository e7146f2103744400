# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin, extract
from lightning_subnet.elasticity.parity import check_parity
from lightning_subnet.errors import ParityError
from lightning_subnet.supernets import ElasticMobileNetV3


class Net(SubnetMixin, nn.Module):
    """The first `width` of eight hidden units; its outputs are a dict, its inputs have names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(4, 8), nn.Linear(8, 3), nn.BatchNorm1d(4)
        self.width = 8

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=[2, 4, 8])

    def activate(self, subnet: Subnet) -> None:
        self.width = subnet["width"]

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> Any:
        w = self.width
        x = F.linear(self.norm(x), self.first.weight[:w], self.first.bias[:w]).relu()
        x = F.linear(x, self.last.weight[:, :w], self.last.bias)
        return {"logits": x if scale is None else x * scale, "nothing": None}


class TrainingOnly(Net):
    """Runs in training mode alone, as networks with the BatchNorm of AttentiveNAS do."""

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> Any:
        if not self.training:
            raise ValueError("only supports training")
        return super().forward(x, scale=scale)


class Plain(nn.Module):
    def __init__(self, net: Net, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.last = (
            copy.deepcopy(net.norm),
            nn.Linear(4, width),
            nn.Linear(width, 3),
        )
        with torch.no_grad():
            self.first.weight.copy_(net.first.weight[:width])
            self.first.bias.copy_(net.first.bias[:width])
            self.last.weight.copy_(net.last.weight[:, :width])
            self.last.bias.copy_(net.last.bias)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> Any:
        x = self.last(self.first(self.norm(x)).relu())
        return {"logits": x if scale is None else x * scale, "nothing": None}


CALL = ((torch.randn(6, 4),), {"scale": torch.rand(6, 1)})


@pytest.mark.parametrize("cls", [Net, TrainingOnly])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_the_right_network_passes_whatever_the_structure(cls: type[Net], width: int) -> None:
    net = cls()
    net.activate(net.search_space().largest)
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    subnet = net.search_space().subnet(width=width)
    assert check_parity(net, subnet, Plain(net, width), [CALL]).relative < 1e-5
    assert net.active_subnet == net.search_space().largest
    assert net.training
    assert all(torch.equal(v, buffers[k]) for k, v in net.named_buffers())


@pytest.mark.parametrize("cls", [Net, TrainingOnly])
def test_another_network_is_refused_with_both_numbers(cls: type[Net]) -> None:
    net = cls()
    subnet = net.search_space().smallest
    with pytest.raises(ParityError) as error:
        check_parity(net, subnet, Plain(net, 8), [CALL])
    net.activate(subnet)
    net.train(cls is TrainingOnly)
    expected = net(*CALL[0], **CALL[1])["logits"]
    text = str(error.value)
    assert "width=2" in text
    assert "in logits" in text
    assert "allowed 0.0001" in text
    numbers = [float(word) for word in text.replace(",", " ").split() if _is_number(word)]
    assert any(abs(n - v) < 1e-4 for n in numbers for v in expected.flatten().tolist())


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def test_a_network_that_does_not_take_the_input_is_refused() -> None:
    net = Net()
    with pytest.raises(ParityError, match=r"does not run on what the super-network Net takes"):
        check_parity(net, net.search_space().largest, nn.Linear(5, 3), [CALL])


def test_a_larger_difference_may_be_allowed() -> None:
    net = Net()
    plain = Plain(net, 8)
    with torch.no_grad():
        plain.last.bias += 1e-3
    largest = net.search_space().largest
    with pytest.raises(ParityError):
        check_parity(net, largest, plain, [CALL])
    assert 1e-4 < check_parity(net, largest, plain, [CALL], tolerance=0.1).relative < 0.1


def test_a_network_that_draws_in_eval_mode_is_told_as_such() -> None:
    class Drawing(Net):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> Any:
            return super().forward(F.dropout(x, 0.5, training=True), scale=scale)

    net = Drawing()
    with pytest.raises(ParityError, match="from one run to the next"):
        check_parity(net, net.search_space().largest, Plain(net, 8), [CALL])


def test_weights_of_half_precision_are_compared_by_its_steps() -> None:
    torch.manual_seed(0)
    net = ElasticMobileNetV3.tiny().to(torch.bfloat16)
    subnet = net.search_space().smallest
    call = ((torch.randn(4, 1, 8, 8),), {})
    assert check_parity(net, subnet, extract(net, subnet), [call]).relative < 0.06


def test_own_networks_carry_settings_of_layers_over_and_name_those_with_hooks() -> None:
    net = ElasticMobileNetV3.tiny()
    subnet, call = net.search_space().smallest, ((torch.randn(2, 1, 8, 8),), {})
    norms = {name: x for name, x in net.named_modules() if isinstance(x, nn.BatchNorm2d)}
    for i, norm in enumerate(norms.values()):
        norm.eps, norm.momentum = 0.1 + 0.01 * i, None
    plain = extract(net, subnet)
    assert check_parity(net, subnet, plain, [call]).relative < 1e-5
    own = {name: x for name, x in plain.named_modules() if isinstance(x, nn.BatchNorm2d)}
    assert own
    assert {name: x.eps for name, x in own.items()} == {name: norms[name].eps for name in own}
    assert {x.momentum for x in own.values()} == {None}
    name = next(iter(own))
    norms[name].register_forward_hook(lambda _layer, _args, output: 2 * output)
    with pytest.raises(ParityError, match=rf"leaves out: those on '{name}'\. Remove them"):
        check_parity(net, subnet, extract(net, subnet), [call])
