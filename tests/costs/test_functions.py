# SPDX-License-Identifier: Apache-2.0
"""Measures of networks from decorated functions: values, failures, and a search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet import SubnetSearch
from lightning_subnet.costs import network_measure
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.strategies import NSGA2
from lightning_subnet.study.measures import NetworkMeasure
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import Digits, LitMlp, quiet_trainer
from tests.problems import assert_clear

IMAGE = torch.zeros(1, 1, 8, 8)


@network_measure("convs", unit="layers", exact=True)
def convs(net: nn.Module, example_input: Any) -> float:
    return sum(isinstance(layer, nn.Conv2d) for layer in net.modules())


def test_it_gets_the_extracted_network_and_the_sample() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space, met = net.search_space(), []

    @network_measure("seen")
    def seen(plain: nn.Module, example_input: Any) -> float:
        met.append((plain.sliced, plain.training, example_input))
        return plain(example_input).shape[1]

    assert isinstance(seen, NetworkMeasure)
    measure = seen.bind(net, IMAGE)
    assert measure([space.smallest]) == [(10.0, 0.0)]
    assert met == [(True, False, IMAGE)]
    deep, flat = convs.bind(net, IMAGE)([space.largest, space.smallest])
    assert deep > flat
    bound = convs.bind(net, None)
    assert (bound.name, bound.unit, bound.exact) == ("convs", "layers", True)


def test_an_exact_one_is_asked_once_per_subnet_and_another_every_time() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    top, calls = net.search_space().largest, []

    def count(plain: nn.Module, example_input: Any) -> float:
        calls.append(1)
        return len(calls)

    exact = network_measure("n", exact=True)(count).bind(net, IMAGE)
    assert [exact([top]), exact([top])] == [[1.0], [1.0]]
    noisy = network_measure("n", fingerprint="a desk")(count).bind(net, IMAGE)
    assert [noisy([top]), noisy([top])] == [[(2.0, 0.0)], [(3.0, 0.0)]]
    assert noisy.fingerprint == "a desk"


def test_a_pair_is_a_value_with_its_standard_error() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    pair = network_measure("ms")(lambda plain, x: (3, 0.5)).bind(net, IMAGE)
    assert pair([net.search_space().largest]) == [(3.0, 0.5)]


def test_random_states_are_as_before() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    state = torch.get_rng_state()
    network_measure("r")(lambda plain, x: torch.rand(()).item()).bind(net, IMAGE)(
        [net.search_space().smallest]
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("exact", [True, False])
def test_a_failure_of_the_first_ends_it_and_later_ones_are_their_own(exact: bool) -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space, broken = net.search_space(), True

    @network_measure("fragile", exact=exact)
    def fragile(plain: nn.Module, example_input: Any) -> float:
        if broken:
            raise OSError("no cable")
        return 1.0

    measure = fragile.bind(net, IMAGE)
    with pytest.raises(MeasurementError, match=r"fragile of Subnet.* OSError: no cable"):
        measure([space.smallest])
    broken = False
    measure([space.smallest])
    broken = True
    with pytest.raises(RuntimeError, match="no cable") as caught:
        measure([space.largest])
    assert not isinstance(caught.value, MeasurementError)


@pytest.mark.parametrize("returned", [None, "fast", [1, 2], torch.zeros(2)])
def test_what_is_no_number(returned: Any) -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    measure = network_measure("x", exact=True)(lambda plain, x: returned).bind(net, IMAGE)
    with pytest.raises(MeasurementError):
        measure([net.search_space().largest])


def test_in_a_search_with_a_constraint_and_failures() -> None:
    calls = []

    @network_measure("flash_kb", unit="kB", exact=True)
    def flash(net: Any, example_input: Any) -> float:
        return float(net.width)

    @network_measure("shaky")
    def shaky(net: Any, example_input: Any) -> float:
        calls.append(net.width)
        if len(calls) == 3:
            raise OSError("no cable")
        return float(net.width)

    result = SubnetSearch(
        objectives={"val_acc": "max", "flash_kb": "min", "shaky": "min"},
        constraints={"flash_kb": "<= 50%"}, measures=[flash, shaky],
        strategy=NSGA2(population=3), budget=5, storage=None, trainer=quiet_trainer(),
        verify_front=False,
    ).fit(LitMlp(), Digits(), progress=False)  # fmt: skip
    assert [e.status for e in result.history].count("failed") == 1
    assert "no cable" in result.history[2].reason
    assert all(e.values["flash_kb"] <= 16 for e in result.front)


def test_bad_decorations() -> None:
    with pytest.raises(ObjectiveError) as caught:
        network_measure("x")("no function")  # type: ignore[arg-type] # the point
    assert_clear(caught.value, "'no function'", "net, example_input")
    with pytest.raises(ObjectiveError) as caught:
        network_measure("")(lambda net, x: 1.0)
    assert_clear(caught.value, "needs a name")
