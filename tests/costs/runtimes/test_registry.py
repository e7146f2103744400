# SPDX-License-Identifier: Apache-2.0
"""Runtimes by name: those of the package, and one of another package that is timed like them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_subnet import Latency
from lightning_subnet.costs.runtimes.base import Conditions, Runtime
from lightning_subnet.costs.runtimes.registry import RUNTIMES, make, names
from lightning_subnet.errors import ObjectiveError, PluginError
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.plugins import installed, write_package
from tests.problems import assert_clear

IMAGE = torch.zeros(1, 1, 8, 8)
CPU = torch.device("cpu")
PLUGIN = """
from lightning_subnet.costs.runtimes.base import ForwardPass, Runtime
from lightning_subnet.errors import ObjectiveError

class Plain(Runtime):
    name = "plain"
    precisions = ("32-true", "bf16-true")
    devices = ("cpu",)

    def make(self, net, inputs, conditions):
        return ForwardPass(lambda: net(*inputs))

    def describe(self, conditions):
        return "plain 1.0"

    def check(self, device, precision):
        if precision == "bf16-true":
            raise ObjectiveError("precision='bf16-true': not on this processor.")
"""
POINTS = "[lightning_subnet.runtimes]\nplain = demo_runtime:Plain\nthree = demo_runtime:three\n"


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    write_package(tmp_path, "demo_runtime", {"demo_runtime": PLUGIN + "three = 3\n"}, POINTS)
    with installed(RUNTIMES, tmp_path):
        yield


@pytest.mark.parametrize("name", names())
def test_each_runtime_keeps_the_contract(name: str) -> None:
    runtime = make(name)
    assert isinstance(runtime, Runtime)
    assert runtime.name == name
    assert runtime.accept(None) is None
    precision = runtime.precision_on(CPU, None, torch.float32)
    assert precision == "32-true"
    assert runtime.describe(Conditions(CPU, 1, precision)).strip()


def test_runtimes_describe_themselves_in_different_words() -> None:
    texts = {make(name).describe(Conditions(CPU, 1, "32-true")) for name in names()}
    assert len(texts) == len(names())


@pytest.mark.usefixtures("plugin")
def test_a_runtime_of_another_package_is_timed() -> None:
    assert names()[-2:] == ["plain", "three"]
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space = net.search_space()
    measure = Latency(runtime="plain", seconds=0.0).bind(net, IMAGE)
    (small, _), (large, _) = measure([space.smallest, space.largest])
    assert 0 < small < large
    assert measure.fingerprint is not None
    assert "plain 1.0, 32-true, 1 threads" in measure.fingerprint


@pytest.mark.usefixtures("plugin")
def test_what_a_runtime_of_another_package_cannot_do_is_refused() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    with pytest.raises(ObjectiveError, match="Latency: precision='bf16-true': not on this"):
        Latency(runtime="plain", precision="bf16-true").bind(net, IMAGE)
    with pytest.raises(ObjectiveError, match=r"'16-true', in which runtime='plain' does not"):
        Latency(runtime="plain", precision="16-true")
    with pytest.raises(ObjectiveError, match="runtime='plain' replays no graph"):
        Latency(runtime="plain", cuda_graph=True)
    with pytest.raises(ObjectiveError, match="runtime='plain' does not run on 'cuda' here"):
        make("plain").precision_on(torch.device("cuda"), "32-true", None)
    with pytest.raises(PluginError) as caught:
        make("three")
    assert_clear(caught.value, "The runtime 'three' of ", "is 3", "Repair")
