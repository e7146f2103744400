# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_subnet import SearchSpace, elastic, extract
from lightning_subnet._torch.names import class_name


class Mine(nn.Module):
    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight[: self.width].T


class Named(Mine):
    def __init__(self) -> None:
        super().__init__()
        self.original_name = "an attribute of one's own"


def sliced() -> nn.Module:
    net = elastic(
        Mine(),
        space=SearchSpace(width=[2, 4]),
        activate=lambda net, subnet: setattr(net, "width", subnet["width"]),
    )
    return extract(net, net.search_space().smallest, torch.randn(3, 4), only="example")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_module_is_called_as_what_it_was_made_of() -> None:
    plain = sliced()
    assert plain.sliced
    assert type(plain).__name__ == "SlicedNetwork"
    traced = torch.jit.trace(Mine(), torch.randn(1, 4))
    for module in (Mine(), plain, torch.compile(Mine()), torch.compile(plain), traced):
        assert class_name(module) == "Mine"
    assert class_name(Named()) == "Named"
    assert (class_name(Mine), class_name(None)) == ("type", "NoneType")
