# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, Subnet, elastic, extract
from lightning_subnet.elasticity.protocol import Elastic, activated, elastic_part
from lightning_subnet.errors import SearchError
from tests.networks import ElasticMlp, LitMlp
from tests.problems import assert_clear

SPACE = SearchSpace(width=[2, 4, 8])


class Theirs(nn.Module):
    """Someone else's super-network: it knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.width = nn.Linear(3, 8), 8

    def set_active(self, width: int) -> None:
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layer.weight[: self.width], self.layer.bias[: self.width])


class LitTheirs(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def activate(net: Any, subnet: Subnet) -> None:
    net.set_active(subnet["width"])


def attached() -> Theirs:
    return elastic(Theirs(), space=SPACE, activate=activate)


def test_it_is_the_same_object_with_the_same_class_and_state() -> None:
    net = Theirs()
    before = {name: (t.data_ptr(), t.clone()) for name, t in net.state_dict().items()}
    modules = list(net.modules())
    given = elastic(net, space=SPACE, activate=activate)
    assert given is net
    assert type(given) is Theirs
    assert list(net.modules()) == modules
    after = net.state_dict()
    assert list(after) == list(before)
    for name, (pointer, value) in before.items():
        assert after[name].data_ptr() == pointer
        assert torch.equal(after[name], value)
    Theirs().load_state_dict(after)
    assert not isinstance(Theirs(), Elastic)  # the class knows nothing


def test_it_follows_the_protocol() -> None:
    net = attached()
    assert isinstance(net, Elastic)
    assert elastic_part(net) is net
    assert net.search_space() == SPACE
    assert net.active_subnet is None
    net.activate(SPACE.smallest)
    assert (net.width, net.active_subnet) == (2, SPACE.smallest)
    assert net(torch.zeros(1, 3)).shape == (1, 2)


def test_a_failed_activate_records_nothing() -> None:
    def picky(net: Theirs, subnet: Subnet) -> None:
        if subnet["width"] == 2:
            raise ValueError("too narrow")
        net.set_active(subnet["width"])

    net = elastic(Theirs(), space=SPACE, activate=picky)
    net.activate(SPACE.largest)
    with pytest.raises(ValueError, match="too narrow"):
        net.activate(SPACE.smallest)
    assert net.active_subnet == SPACE.largest


def test_a_deep_copy_activates_itself() -> None:
    net = attached()
    net.activate(SPACE.largest)
    other = copy.deepcopy(net)
    other.activate(SPACE.smallest)
    assert (net.width, net.active_subnet) == (8, SPACE.largest)
    assert (other.width, other.active_subnet) == (2, SPACE.smallest)
    net.activate(SPACE.subnet(width=4))
    assert (net.width, other.width) == (4, 2)
    assert other.search_space() == SPACE
    third = copy.deepcopy(LitTheirs(net))
    elastic_part(third).activate(SPACE.smallest)
    assert (net.width, third.net.width) == (4, 2)


def test_inside_a_lightning_module_and_as_one() -> None:
    inner = attached()
    model = LitTheirs(inner)
    assert elastic_part(model) is inner
    assert list(model.state_dict()) == ["net.layer.weight", "net.layer.bias"]

    plain = LitTheirs(Theirs())
    model = elastic(plain, space=SPACE, activate=lambda m, s: m.net.set_active(s["width"]))
    assert model is plain
    assert elastic_part(model) is model
    assert not model.hparams
    model.activate(SPACE.smallest)
    assert model.net.width == 2
    assert model(torch.zeros(1, 3)).shape == (1, 2)
    other = copy.deepcopy(model)
    other.activate(SPACE.largest)
    assert (model.net.width, other.net.width) == (2, 8)


def test_attaching_again_replaces_space_and_function() -> None:
    net = attached()
    net.activate(SPACE.smallest)
    other = SearchSpace(width=[4, 8])
    assert elastic(net, space=other, activate=activate) is net
    assert net.search_space() == other
    assert net.active_subnet is None


def test_an_extraction_of_ones_own() -> None:
    def sliced(net: Theirs, subnet: Subnet) -> nn.Module:
        plain = nn.Linear(3, subnet["width"])
        with torch.no_grad():
            plain.weight.copy_(net.layer.weight[: subnet["width"]])
            plain.bias.copy_(net.layer.bias[: subnet["width"]])
        return plain

    net = elastic(Theirs(), space=SPACE, activate=activate, extract=sliced)
    plain, x = extract(net, SPACE.smallest), torch.randn(2, 3)
    assert (type(plain), plain.out_features, plain.sliced) == (nn.Linear, 2, True)
    net.activate(SPACE.smallest)
    assert torch.equal(plain(x), net(x))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.layer.weight.zero_()
    assert extract(other, SPACE.largest).weight.count_nonzero() == 0  # of the copy's own weights
    assert extract(net, SPACE.largest).weight.count_nonzero() > 0
    elastic(net, space=SPACE, activate=activate)  # again, and without it
    assert not extract(net, SPACE.smallest).sliced


def test_bad_input() -> None:
    for arguments, parts in [
        ((3, SPACE, activate), ("of type int", "not an nn.Module")),
        ((Theirs, SPACE, activate), ("of type type", "Pass the network")),
        ((Theirs(), {"width": [2]}, activate), ("space={'width': [2]}", "space=SearchSpace(")),
        ((Theirs(), SPACE, None), ("activate=None", "function of (net, subnet)")),
    ]:
        net, space, function = arguments
        with pytest.raises(SearchError) as caught:
            elastic(net, space=space, activate=function)
        assert_clear(caught.value, *parts)
    with pytest.raises(SearchError) as caught:
        elastic(Theirs(), space=SPACE, activate=activate, extract=3)
    assert_clear(caught.value, "extract=3 cannot be called")


@pytest.mark.parametrize("kind", ["mixin", "attached", "inside"])
def test_activated_puts_back_what_was_in_force(kind: str) -> None:
    model: Any = {"mixin": ElasticMlp, "attached": attached, "inside": LitMlp}[kind]()
    net = elastic_part(model)
    space = net.search_space()
    with activated(model, space.smallest):
        assert net.active_subnet == space.smallest
        assert net.width == space.smallest["width"]
    assert net.active_subnet == space.largest  # nothing was before
    one, other = space.smallest, space.sample(3, 0)[-1]
    net.activate(one)
    with activated(model, other):
        net.activate(space.largest)
    assert (net.active_subnet, net.width) == (one, one["width"])
    with pytest.raises(KeyError, match="within"), activated(model, other):  # noqa: PT012 - the exit is tested
        assert net.active_subnet == other
        raise KeyError("within")
    assert (net.active_subnet, net.width) == (one, one["width"])
    with activated(model, other), activated(model, space.largest):
        assert net.active_subnet == space.largest
    assert net.active_subnet == one


def test_activated_undoes_an_activate_that_failed_half_way() -> None:
    def half_way(net: Theirs, subnet: Subnet) -> None:
        net.set_active(subnet["width"])
        if subnet["width"] == 2:
            raise ValueError("after all")

    net = elastic(Theirs(), space=SPACE, activate=half_way)
    net.activate(SPACE.subnet(width=4))
    with pytest.raises(ValueError, match="after all"), activated(net, SPACE.smallest):
        pass
    assert (net.width, net.active_subnet) == (4, SPACE.subnet(width=4))
