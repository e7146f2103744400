# SPDX-License-Identifier: Apache-2.0
"""closest_subnet: the optimum of enumerable spaces, near it elsewhere, and what it refuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_subnet import (
    Latency,
    Measure,
    NoFeasibleSubnet,
    SearchSpace,
    SubnetError,
    extract,
    measure,
)
from lightning_subnet.costs import closest_subnet, network_measure
from lightning_subnet.errors import ObjectiveError
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import ElasticMlp, LitMlp
from tests.problems import assert_clear, cost, grid

IMAGE = torch.zeros(1, 1, 8, 8)


def columns(net: Any, *names: str) -> np.ndarray:
    space = net.search_space()
    X = np.concatenate(list(space.index_blocks()))
    tables = {m.name: m for m in net.exact_measures()}
    return np.stack([tables[name].evaluate(space, X)[0] for name in names])


@pytest.fixture(scope="module")
def net() -> ElasticMobileNetV3:
    return ElasticMobileNetV3.tiny(n_classes=10)


@pytest.mark.parametrize("params", [19_000, 33_333, 47_471, 10**6, 1])
def test_it_is_the_optimum_of_all(net: ElasticMobileNetV3, params: float) -> None:
    (every,) = columns(net, "params")
    closest = closest_subnet(net, params=params)
    assert closest.distance == pytest.approx(np.abs(every / params - 1).min())
    assert closest.evaluations == 0
    plain = extract(net, closest.subnet)
    assert closest.values["params"] == sum(p.numel() for p in plain.parameters())


def test_below_is_the_nearest_that_exceeds_nothing(net: ElasticMobileNetV3) -> None:
    every = columns(net, "params", "macs")
    targets = np.array([40_000, 600_000])
    closest = closest_subnet(net, params=40_000, macs=600_000, below=True)
    fits = (every <= targets[:, None]).all(axis=0)
    distances = np.abs(every / targets[:, None] - 1).max(axis=0)
    assert closest.distance == pytest.approx(distances[fits].min())
    assert closest.values["params"] <= 40_000
    assert closest.values["macs"] <= 600_000
    both = closest_subnet(net, params=40_000, macs=600_000)
    assert both.distance == pytest.approx(distances.min())
    with pytest.raises(NoFeasibleSubnet) as caught:
        closest_subnet(net, params=1000, below=True)
    assert caught.value.nearest.subnet == net.search_space().smallest
    assert "params <= 1000" in str(caught.value)


def test_a_space_of_ten_to_the_nineteenth() -> None:
    big = ElasticMobileNetV3()
    closest = closest_subnet(big, params=5e6, macs=3e8)
    assert closest.distance < 1e-3
    macs = next(m for m in big.exact_measures() if m.name == "macs")
    space = big.search_space()
    assert closest_subnet(space, macs=1, measures=macs).subnet == space.smallest


def test_a_traced_cost_takes_few_traces() -> None:
    mlp = ElasticMlp()
    mlp.activate(mlp.search_space().smallest)
    widths = mlp.search_space().choices["width"].values
    exact = {w: 64 * w + 10 * w for w in widths}
    closest = closest_subnet(mlp, torch.zeros(1, 64), macs=600, tolerance=0)
    assert closest.values["macs"] == min(exact.values(), key=lambda m: abs(m - 600))
    assert 0 < closest.evaluations <= mlp.search_space().size
    assert mlp.active_subnet == mlp.search_space().smallest, "as before"


def test_a_cost_of_networks_by_predictions_in_between(net: ElasticMobileNetV3) -> None:
    calls = []

    @network_measure("product")
    def product(plain: nn.Module, example_input: Any) -> float:
        calls.append(1)
        return float(np.prod([sum(p.numel() for p in s.parameters()) for s in plain.stages]) / 1e6)

    state = torch.get_rng_state()
    closest = closest_subnet(net, IMAGE, product=200, measures=product, evaluations=40)
    assert closest.distance < 0.03
    assert closest.evaluations == len(calls) <= 40
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(NoFeasibleSubnet, match="product <= 1e-05"):
        closest_subnet(net, IMAGE, product=1e-5, measures=product, below=True, evaluations=5)


def test_failures_are_passed_by_unless_all_fail(net: ElasticMobileNetV3) -> None:
    calls = []

    @network_measure("fragile")
    def fragile(plain: nn.Module, example_input: Any) -> float:
        calls.append(1)
        if len(calls) % 3 == 0:
            raise OSError("no cable")
        return sum(p.numel() for p in plain.parameters()) / 1000

    closest = closest_subnet(net, IMAGE, fragile=35, measures=fragile, evaluations=40)
    assert closest.distance < 0.05

    def fails(subnets: list[Any]) -> Any:
        raise OSError("unplugged")

    with pytest.raises(SubnetError) as caught:
        closest_subnet(net, x=3, measures=Measure("x", fails), evaluations=5)
    assert_clear(caught.value, "All 5 subnets failed", "unplugged")


class Naps(ElasticMlp):
    """A pass takes as many milliseconds as the subnet is wide, and half of that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.0015 * self.width)
        return super().forward(x)


@pytest.mark.slow
def test_milliseconds() -> None:
    naps, quick = Naps(), Latency(repeats=15, seconds=0.0)
    closest = closest_subnet(naps, torch.zeros(1, 64), latency_ms=12, measures=quick, evaluations=4)
    assert closest.evaluations <= 4
    assert closest.values["latency_ms"] > 0
    assert closest.errors["latency_ms"] > 0
    assert closest.subnet in naps.search_space()


def test_a_module_around_it_and_a_space_without_a_network() -> None:
    lit = LitMlp()
    lit.example_input_array = torch.zeros(2, 64)
    closest = closest_subnet(lit, macs=600)
    assert closest.values["macs"] in (592, 296, 1184)
    assert isinstance(lit, L.LightningModule)
    bare = closest_subnet(grid(3, 5), cost=7, measures=[cost])
    assert dict(bare.values) == {"cost": 7.0}
    assert str(bare) == f"cost 7 (asked: 7) at {bare.subnet!r}"


@measure("slow")
def slow(subnets: Any) -> Any:
    return [1.0 for _ in subnets]


TINY = ElasticMobileNetV3.tiny(n_classes=10)
BAD: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    (lambda: closest_subnet(TINY), ("no target", "params=1e6")),
    (lambda: closest_subnet(TINY, parms=1e6), ("'parms'", "Did you mean 'params'?", "measures=")),
    (lambda: closest_subnet(TINY, latency=5), ("'latency'", "Did you mean 'latency_ms'?")),
    (lambda: closest_subnet(TINY, params=0), ("params=0", "positive")),
    (lambda: closest_subnet(TINY, params=-1), ("params=-1",)),
    (lambda: closest_subnet(TINY, params=float("nan")), ("params=nan",)),
    (lambda: closest_subnet(TINY, params="1M"), ("params='1M'",)),  # type: ignore[arg-type] # the point
    (lambda: closest_subnet(TINY, params=True), ("params=True",)),
    (lambda: closest_subnet(TINY, latency=Latency()), ("measures=[...]",)),  # type: ignore[arg-type] # the point
    (lambda: closest_subnet(TINY, params=1e4, tolerance=-1), ("tolerance=-1",)),
    (lambda: closest_subnet(TINY, params=1e4, evaluations=0), ("evaluations=0",)),
    (lambda: closest_subnet("net", params=1e4), ("'net'", "super-network")),
    (lambda: closest_subnet(nn.Linear(1, 1), params=1e4), ("no elastic part",)),
    (lambda: closest_subnet(ElasticMlp(), macs=600), ("'macs' of ElasticMlp needs one sample",)),
    (lambda: closest_subnet(SearchSpace(a=[1, 2]), params=1), ("'params'",)),
    (lambda: closest_subnet(SearchSpace(a=[1, 2]), latency_ms=1, measures=Latency()),
     ("a space has none",)),
    (lambda: closest_subnet(TINY, slow=1, measures=[slow, slow]), ("two measures",)),
    (lambda: closest_subnet(TINY, slow=1, measures=[3]), ("not a measure",)),  # type: ignore[list-item] # the point
]  # fmt: skip


@pytest.mark.parametrize(("call", "parts"), BAD)
def test_bad_input(call: Callable[[], Any], parts: tuple[str, ...]) -> None:
    with pytest.raises((ObjectiveError, SubnetError)) as caught:
        call()
    assert_clear(caught.value, *parts)


def test_a_measure_that_was_passed_is_named_where_a_target_is_misspelt() -> None:
    with pytest.raises(ObjectiveError, match="Did you mean 'slow'"):
        closest_subnet(TINY, slwo=1, measures=[slow])
