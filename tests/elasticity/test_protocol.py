# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin
from lightning_subnet.elasticity.protocol import Elastic, elastic_part
from lightning_subnet.errors import SearchError
from tests.networks import ElasticMlp, LitMlp


def test_the_mixin_records_what_is_in_force() -> None:
    net = ElasticMlp()
    assert net.active_subnet is None
    subnet = net.search_space().smallest
    net.activate(subnet)
    assert (net.active_subnet, net.width) == (subnet, 4)


def test_a_failed_activate_records_nothing() -> None:
    class Picky(ElasticMlp):
        def activate(self, subnet: Subnet) -> None:
            if subnet["width"] == 4:
                raise ValueError("no")
            super().activate(subnet)

    net = Picky()
    net.activate(net.search_space().largest)
    with pytest.raises(ValueError, match="no"):
        net.activate(net.search_space().smallest)
    assert net.active_subnet == net.search_space().largest


def test_both_methods_are_required() -> None:
    class Half(SubnetMixin, nn.Module):
        def search_space(self) -> SearchSpace:
            return SearchSpace(a=[1, 2])

    with pytest.raises(TypeError, match="activate"):
        Half()


def test_the_elastic_part_is_the_module_or_its_only_elastic_descendant() -> None:
    net = ElasticMlp()
    assert elastic_part(net) is net
    model = LitMlp()
    assert elastic_part(model) is model.net
    assert isinstance(model.net, Elastic)

    class Outer(ElasticMlp):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ElasticMlp()

    outer = nn.Sequential(Outer())  # an elastic part inside an elastic part is its own business
    assert elastic_part(outer) is outer[0]
    with pytest.raises(SearchError, match=r"2 elastic parts \(0, 1\)"):
        elastic_part(nn.Sequential(ElasticMlp(), ElasticMlp()))
    with pytest.raises(SearchError, match="Derive it from SubnetMixin"):
        elastic_part(nn.Linear(1, 1))
