# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.costs.counts import MACS, PARAMS, SIZE_MB, Count
from lightning_subnet.elasticity.protocol import elastic
from lightning_subnet.errors import MeasurementError
from lightning_subnet.testing import MeasureContract
from tests._torch.test_macs import project
from tests.networks import Digits, ElasticMlp, LitMlp, quiet_trainer, search


def test_convolutions_and_linear_layers_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)
    )
    assert count_macs(net, torch.zeros(1, 3, 4, 4)) == 16 * 8 * 3 * 9 + 8 * 16 * 10
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert count_macs(depthwise, torch.zeros(1, 8, 5, 5)) == 9 * 8 * 9


def test_attention_is_counted_although_torch_has_a_fast_path() -> None:
    d, n = 16, 5
    layer = nn.TransformerEncoderLayer(d, 4, dim_feedforward=32, batch_first=True).eval()
    projections = 4 * n * d * d + 2 * n * d * 32
    scores = 2 * n * n * d
    assert count_macs(layer, torch.zeros(1, n, d)) == projections + scores
    assert torch.backends.mha.get_fastpath_enabled()


def test_counting_changes_no_flag_and_no_statistic() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4))
    net[1].eval()
    count_macs(net, torch.randn(8, 4))
    assert [m.training for m in net] == [True, False, True]
    assert net[0].running_mean.abs().sum() == 0


def test_a_super_network_is_counted_subnet_by_subnet() -> None:
    net = ElasticMlp()
    macs = MACS.bind(net, torch.zeros(1, 64))
    space = net.search_space()
    assert macs(list(space)) == [74.0 * s["width"] for s in space]
    assert macs.exact
    assert not macs.vectorised


def test_what_cannot_be_counted() -> None:
    with pytest.raises(MeasurementError, match=r"failed on an input of \[\(1, 3\)\]"):
        count_macs(nn.Linear(4, 4), torch.zeros(1, 3))
    with pytest.raises(MeasurementError, match="No multiplication was counted in ReLU"):
        count_macs(nn.ReLU(), torch.zeros(1, 3))


def test_one_subnet_that_cannot_run_is_its_own_failure() -> None:
    class Odd(ElasticMlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.width == 4:
                raise ValueError("too narrow")
            return super().forward(x)

    net = Odd()
    space = net.search_space()
    macs = MACS.bind(net, torch.zeros(1, 64))
    with pytest.raises(MeasurementError, match="too narrow"):
        macs([space.smallest])
    assert macs([space.largest]) == [74.0 * 32]
    with pytest.raises(RuntimeError, match="too narrow"):
        macs([space.smallest])


def test_macs_are_those_of_what_is_extracted() -> None:
    class Mixing(SubnetMixin, nn.Module):
        """Multiplies two matrices at each pass; what is extracted has their product."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.mix = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.eye(8))

        def search_space(self) -> SearchSpace:
            return SearchSpace(width=[2, 8])

        def activate(self, subnet: Subnet) -> None:
            self.width = subnet["width"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.mix[: self.width] @ self.weight).T

        def extract(self, subnet: Subnet) -> nn.Module:
            plain = nn.Linear(4, subnet["width"], bias=False)
            with torch.no_grad():
                plain.weight.copy_(self.mix[: subnet["width"]] @ self.weight)
            return plain

    class Lit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = Mixing(), nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.net(x).sum(-1, keepdim=True))

    model, x = Lit(), torch.randn(1, 4)
    space = model.net.search_space()
    macs = MACS.bind(model, x)
    counted = macs.evaluate(space, space.indices([space.smallest, space.largest]))[0]
    assert counted.tolist() == [4 * 2 + 1, 4 * 8 + 1]
    assert count_macs(model, x) == 4 * 8 + 8 * 8 * 4 + 1  # the super-network itself, as it was
    assert "forward" not in vars(model.net)


class Recurrent(SubnetMixin, nn.Module):
    """An LSTM in front of a linear layer, chosen among three."""

    def __init__(self) -> None:
        super().__init__()
        self.rnns = nn.ModuleList([nn.LSTM(8, n, batch_first=True) for n in (16, 32, 48)])
        self.last, self.at = nn.Linear(8, 16), 0

    def search_space(self) -> SearchSpace:
        return SearchSpace(at=[0, 1, 2])

    def activate(self, subnet: Subnet) -> None:
        self.at = subnet["at"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnns[self.at](x)[0].sum(-1) + self.last(x).sum(-1)


def test_an_lstm_beside_a_linear_layer_counts() -> None:
    net, steps = Recurrent(), 5
    macs = MACS.bind(net, torch.zeros(1, steps, 8))
    expected = [steps * (8 * 16 + 4 * n * (8 + n)) for n in (16, 32, 48)]
    assert macs(list(net.search_space())) == expected


def test_products_in_an_extracted_network_are_looked_at_too() -> None:
    class Plain(nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(8, 8), nn.Parameter(weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return project(self.first(x), self.weight)

    net = elastic(
        nn.Linear(8, 8), space=SearchSpace(width=[4, 8]), activate=lambda net, subnet: None,
        extract=lambda net, subnet: Plain(net.weight[: subnet["width"]].detach().clone()),
    )  # fmt: skip
    with pytest.raises(MeasurementError, match=r"lightning_subnet_tests::project in Linear"):
        MACS.bind(net, torch.zeros(1, 8))([net.search_space().largest])


def test_shared_weights_count_once_and_extra_state_is_no_trouble() -> None:
    class Shared(ElasticMlp):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(64, 32)
            self.again.weight = self.first.weight

        def get_extra_state(self) -> dict[str, Any]:
            return {"epochs": 3, "names": ["a"]}

        def set_extra_state(self, state: Any) -> None: ...

    def frozen(net: nn.Module, subnet: Subnet) -> nn.Module:
        return copy.deepcopy(net)

    params = 2 * 64 + 64 * 32 + 32 + 32 * 10 + 10 + 32  # with the other bias
    net = Shared()
    net.extract = lambda subnet: frozen(net, subnet)  # type: ignore[assignment] # on the instance
    largest = [net.search_space().largest]
    assert PARAMS.bind(net, None)(largest) == [params]
    assert SIZE_MB.bind(net, None)(largest) == [(params * 4 + 2 * 64 * 4 + 8) / 1e6]


class Masked(ElasticMlp):
    """Makes a tensor of no stated type in its forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.ones(64))


class NoForward(LitMlp):
    """A LightningModule whose steps call the network."""

    forward = L.LightningModule.forward

    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("kind", [LitMlp, NoForward])
def test_a_search_counts_in_any_precision_without_an_example(precision: Any, kind: Any) -> None:
    model = kind()
    model.net = Masked()
    result = search(
        objectives={"val_loss": "min", "macs": "min"}, budget=2,
        trainer=quiet_trainer(precision=precision, limit_val_batches=1),
    ).fit(model, Digits())  # fmt: skip
    assert [e.values["macs"] for e in result.history] == [
        74.0 * e.subnet["width"] for e in result.history
    ]


class OfCounts(MeasureContract):
    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return ElasticMlp()

    def example_input(self) -> torch.Tensor:
        return torch.zeros(1, 64)


class TestMacs(OfCounts):
    def make(self) -> Count:
        return MACS


class TestParams(OfCounts):
    grows = False  # of a network that cannot be sliced

    def make(self) -> Count:
        return PARAMS


class TestSizeMb(OfCounts):
    grows = False  # as above

    def make(self) -> Count:
        return SIZE_MB
