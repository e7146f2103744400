# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin
from lightning_subnet.training.validation.place import Place
from tests.networks import LitMlp


class Itself(SubnetMixin, LitMlp):
    """A LightningModule that is the elastic part itself."""

    def search_space(self) -> SearchSpace:
        return self.net.search_space()

    def activate(self, subnet: Subnet) -> None:
        self.net.activate(subnet)


def test_a_network_stands_in_the_place_of_a_child_wherever_that_is(model: LitMlp) -> None:
    model.alias = nn.Sequential(model.net)
    place, net = Place(model, model.net), nn.Linear(64, 10)
    part, x = model.net, torch.randn(3, 64)
    place.put(net)
    assert model.net is model.alias[0] is place.current is net
    assert torch.equal(model(x), net(x))
    assert place.runs == 2
    assert torch.equal(place.run(x), net(x))
    assert place.root is model
    place.put(other := nn.Linear(64, 10))  # from one to the next
    assert model.net is other
    place.restore()
    place.restore()
    assert model.net is model.alias[0] is place.current is part
    assert not net._forward_pre_hooks
    assert not other._forward_pre_hooks


def test_a_network_runs_in_the_stead_of_the_module_itself() -> None:
    model, net, x = Itself(), nn.Linear(64, 10), torch.randn(3, 64)
    before = model.eval()(x)
    place = Place(model, model)
    place.put(net)
    assert torch.equal(model(x), net(x))
    assert place.root is net
    assert place.runs == 2
    place.restore()
    assert torch.equal(model(x), before)
    assert "forward" not in vars(model)
    assert place.root is model
