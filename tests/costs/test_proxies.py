# SPDX-License-Identifier: Apache-2.0
"""Synaptic flow against its definition, on the networks of the package, and in a search."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet import SubnetSearch, measure
from lightning_subnet.costs import SynFlow
from lightning_subnet.costs.proxies import log_flow
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.strategies import NSGA2
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import Digits, ElasticMlp, LitMlp, quiet_trainer
from tests.problems import assert_clear


def by_paths(*weights: torch.Tensor) -> float:
    """Return the flow of linear layers with relu: each layer passes on the sum over all paths."""
    flows = torch.ones(weights[0].shape[1], dtype=torch.float64)
    for weight in weights:
        flows = weight.double().abs() @ flows
    return math.log(len(weights) * float(flows.sum()))


def test_it_is_the_sum_over_paths_once_a_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False))
    weights = [p.detach().clone() for p in net.parameters()]
    assert log_flow(net, (torch.randn(4, 5),)) == pytest.approx(by_paths(*weights), rel=1e-12)


def test_normalisation_is_passed_by_and_the_input_does_not_matter() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False)
    weights = [first.weight.detach().clone(), last.weight.detach().clone()]
    net = nn.Sequential(first, nn.BatchNorm1d(7), nn.LayerNorm(7), nn.ReLU(), last)
    net[1].running_var.fill_(100.0)
    assert log_flow(net, (torch.randn(1, 5),)) == pytest.approx(by_paths(*weights), rel=1e-12)


class Outputs(nn.Module):
    """Two layers, whose outputs come in some structure."""

    def __init__(self, join: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, n, bias=False) for n in (3, 2)])
        self.join = join

    def forward(self, x: torch.Tensor) -> Any:
        return self.join(*(layer(x) for layer in self.layers))


def test_all_outputs_count_however_they_are_nested() -> None:
    joins = [
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: (a, b),
        lambda a, b: {"logits": a, "hidden": [b]},
        lambda a, b: (a, {"hidden": (b,)}, None),
    ]
    for join in joins:
        net = Outputs(join)
        total = sum(float(p.double().abs().sum()) for p in net.parameters())
        assert log_flow(net, (torch.zeros(1, 4),)) == pytest.approx(math.log(total))


def test_rms_norms_are_passed_by_and_tensors_are_made_in_double_precision() -> None:
    first, last = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
    expected = by_paths(first.weight, last.weight)
    net = nn.Sequential(first, nn.RMSNorm(3), last)
    assert log_flow(net, (torch.zeros(1, 4),)) == pytest.approx(expected)

    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(1, self.in_features) @ self.weight.T

    assert log_flow(Masked(4, 3, bias=False), (torch.zeros(1, 4),))


@pytest.mark.filterwarnings("ignore:.*(torch.ao|quant)")
def test_quantised_layers_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    half = torch.ao.quantization.quantize_dynamic(
        net, {"1": torch.ao.quantization.default_dynamic_qconfig}
    )
    with pytest.raises(ValueError, match="quantised"):
        log_flow(half, (torch.zeros(1, 4),))


def test_a_frozen_copy_counts_what_runs() -> None:
    torch.manual_seed(0)
    net = ElasticMlp()
    space = net.search_space()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flow = SynFlow().bind(net, torch.zeros(1, 64))
    values = flow(list(space))
    for subnet, value in zip(space, values, strict=True):
        w, scale = subnet["width"], subnet["sharpen"]
        first, last = net.first.weight[:w].detach(), net.last.weight[:, :w].detach()
        # Biases are inputs of their own; they enter the sum of outputs, not the sum over weights.
        inner = first.double().abs() @ torch.full((64,), float(scale), dtype=torch.float64)
        bias = net.first.bias[:w].detach().double().abs()
        expected = float((last.double().abs() @ inner).sum())
        expected += float((last.double().abs() @ (inner + bias)).sum())
        assert value == pytest.approx(math.log(expected), rel=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_a_sliced_network_and_its_super_network_agree_on_order() -> None:
    torch.manual_seed(0)
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space = net.search_space()
    flow = SynFlow().bind(net, torch.zeros(1, 1, 8, 8))
    subnets = space.sample(8, rng=0)
    state = torch.get_rng_state()
    values = flow(subnets)
    assert flow(subnets) == values
    assert SynFlow().bind(net, torch.full((3, 1, 8, 8), 2.5))(subnets) == values
    assert torch.equal(torch.get_rng_state(), state)
    smallest, largest = flow([space.smallest, space.largest])
    assert smallest < min(values) < max(values) < largest
    plain = extract(net, subnets[0])
    assert log_flow(plain, (torch.zeros(1, 1, 8, 8),)) == values[0]


def test_errors_say_what_is_wrong() -> None:
    net = ElasticMlp()
    with pytest.raises(ObjectiveError) as caught:
        SynFlow().bind(net, "x")
    assert_clear(caught.value, "'x'", "input=")
    flow = SynFlow().bind(net, torch.zeros(1, 3))
    with pytest.raises(MeasurementError, match="SynFlow of Subnet"):
        flow([net.search_space().largest])
    nn.init.zeros_(net.last.weight)
    with pytest.raises(MeasurementError, match=r"its flow is 0\.0"):
        SynFlow().bind(net, torch.zeros(1, 64))([net.search_space().largest])


def test_a_search_without_validation_metrics_validates_nothing() -> None:
    model = LitMlp()

    @measure("hidden", exact=True)
    def hidden(subnets: Any) -> Any:
        return [float(s["width"]) for s in subnets]

    result = SubnetSearch(
        objectives={"synflow": "max", "hidden": "min"},
        measures=[SynFlow(), hidden],
        strategy=NSGA2(population=4),
        budget=12,
        storage=None,
        trainer=quiet_trainer(),
    ).fit(model, Digits(), progress=False)
    assert model.validated.n == 0
    assert len(result.history) == 12
    assert {e.subnet["sharpen"] for e in result.front} == {3}
    assert [e.subnet["width"] for e in result.front] == [32, 16, 8, 4]


def test_beside_a_metric_it_is_computed_and_not_charged() -> None:
    model = LitMlp()
    result = SubnetSearch(
        objectives={"val_acc": "max", "synflow": "max"},
        measures=[SynFlow()],
        strategy="random",
        budget=4,
        storage=None,
        trainer=quiet_trainer(),
    ).fit(model, Digits(), progress=False)
    assert model.validated.n == 4 + 2  # the first twice, with another in between
    assert all(set(e.values) >= {"val_acc", "synflow"} for e in result.history)
