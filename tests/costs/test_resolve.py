# SPDX-License-Identifier: Apache-2.0
"""Measures by name: which one a name stands for, what it is bound to, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lightning_subnet import Latency, Measure, measure
from lightning_subnet.costs import PeakMemory, closest_subnet, network_measure
from lightning_subnet.costs.resolve import (
    MEASURES,
    make_measure,
    measure_names,
    part_with_sample,
    resolve,
)
from lightning_subnet.errors import MeasurementError, ObjectiveError, PluginError, SearchError
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import ElasticMlp
from tests.plugins import installed, write_package
from tests.problems import assert_clear, cost, grid

ROWS = torch.zeros(1, 64)
TINY = ElasticMobileNetV3.tiny(n_classes=10)


class Flat(nn.Module):
    """A module around a network that prepares its input: images (n, 1, 8, 8) become rows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ElasticMlp()
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.flatten(1))


@network_measure("shape")
def shape(net: nn.Module, example_input: Any) -> float:
    return float(sum(x.numel() for x in example_input)) if example_input is not None else -1.0


def value(bound: Measure, net: Any) -> float:
    space = net.search_space()
    return float(bound.evaluate(space, space.indices([space.largest]))[0][0])


def never() -> Any:
    raise AssertionError("no sample is needed")


def test_the_names_are_those_of_the_table_and_each_is_made() -> None:
    assert measure_names()[: len(MEASURES.table)] == list(MEASURES.table)
    assert [make_measure(name).name for name in measure_names()] == measure_names()


def test_a_name_is_a_measure_that_was_passed_then_a_table_then_a_built_in_one() -> None:
    passed = Measure("params", lambda X: [7.0] * len(X), exact=True, takes="indices")
    assert resolve(TINY, [passed], ["params"])["params"] is passed
    assert resolve(TINY, [passed], ["params"], sample=never)["params"] is passed
    table = resolve(TINY, ["macs"], sample=lambda: torch.zeros(1, 1, 8, 8))["macs"]
    assert table.vectorised
    without = resolve(TINY, ["macs"], sample=lambda: None)["macs"]
    assert value(without, TINY) == value(table, TINY)
    assert resolve(TINY, ["params"], sample=never)["params"].vectorised
    traced = resolve(ElasticMlp(), ["macs"], sample=lambda: ROWS)["macs"]
    assert not traced.vectorised
    assert value(traced, ElasticMlp()) == 74 * 32


def test_bound_measures_come_first_and_exact_names_last() -> None:
    fixed = Measure("fixed", lambda subnets: [1.0 for _ in subnets])
    names = ["macs", "latency_ms", "params", "macs", "fixed"]
    resolved = resolve(TINY, [PeakMemory(), fixed], names, lambda: torch.zeros(1, 1, 8, 8))
    assert list(resolved) == ["fixed", "peak_memory_mb", "latency_ms", "macs", "params"]
    assert [m.name for m in resolved.values()] == list(resolved)


def test_measures_of_networks_get_the_sample_that_the_part_gets_and_counts_the_whole() -> None:
    model = Flat()
    images = model.example_input_array
    resolved = resolve(model, ["macs", shape], sample=lambda: images)
    assert value(resolved["shape"], model.net) == 64
    assert value(resolved["macs"], model.net) == 74 * 32
    assert len(model.net._forward_pre_hooks) == 0
    assert (
        value(resolve(model.net, [shape], sample=lambda: (ROWS, ROWS))["shape"], model.net) == 128
    )


class Keywords(ElasticMlp):
    """A network that takes more than one argument."""

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1
    ) -> Any:
        return super().forward((x if mask is None else x * mask) * scale)


class Calling(nn.Module):
    """A module that calls its network in one of several ways."""

    def __init__(self, call: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.net, self.call = Keywords(), call
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.net, x.flatten(1))


CALLS: list[tuple[Callable[[Any, Any], Any], Any]] = [
    (lambda net, x: net(x), (64,)),
    (lambda net, x: net(x, torch.ones(64)), (64, 64)),
    (lambda net, x: net(x, mask=torch.ones(64)), (64, 64)),
    (lambda net, x: net(x=x, mask=torch.ones(64)), {"x": 64, "mask": 64}),
    (lambda net, x: net(x, None), (64, None)),
    (lambda net, x: net(x * torch.ones(64)), (64,)),
]


@pytest.mark.parametrize(("call", "sizes"), CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sample_of_a_part_is_what_it_is_called_with(
    call: Any, sizes: Any, dtype: torch.dtype
) -> None:
    model = Calling(call).to(dtype)
    part, sample = part_with_sample(model, None)
    assert part is model.net
    assert tree_map_only(torch.Tensor, torch.Tensor.numel, sample) == sizes
    assert part_with_sample(model, ROWS) == (model.net, ROWS)
    assert part_with_sample(model, None, PeakMemory(input=ROWS))[1] is ROWS
    macs = resolve(model, ["macs"], sample=lambda: model.example_input_array)["macs"]
    assert value(macs, model.net) == 74 * 32


def test_a_module_without_a_forward_pass_is_counted_by_its_network() -> None:
    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = ElasticMlp()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ElasticMlp()

    for model in (Lit(), Plain()):
        assert value(resolve(model, ["macs"], sample=lambda: ROWS)["macs"], model.net) == 74 * 32
        model.example_input_array = ROWS
        assert part_with_sample(model, None) == (model.net, ROWS)


def test_a_sample_that_the_model_does_not_take_goes_to_the_measure_as_it_is() -> None:
    model = Flat()
    resolved = resolve(model, [shape], sample=lambda: (torch.zeros(1, 3),))
    assert value(resolved["shape"], model.net) == 3


def test_a_sample_is_asked_for_once_and_only_where_one_is_needed() -> None:
    net, calls = ElasticMlp(), []

    def sample() -> Any:
        calls.append(1)
        return ROWS

    with_input = PeakMemory(input=torch.zeros(1, 1, 8, 8))
    assert set(resolve(TINY, [with_input], ["params", "size_mb"], never)) == {
        "peak_memory_mb", "params", "size_mb",
    }  # fmt: skip
    assert calls == []
    # A network without extract() is sliced to know what a subnet holds.
    resolve(net, [PeakMemory(), shape], ["macs", "latency_ms", "params", "size_mb"], sample)
    assert calls == [1]


def test_an_input_that_does_not_fit_shows_at_once() -> None:
    with pytest.raises(MeasurementError, match=r"failed on an input of \[\(1, 3\)\]"):
        resolve(ElasticMlp(), ["macs"], sample=lambda: torch.zeros(1, 3))


@measure("twice")
def twice(subnets: Any) -> Any:
    return [1.0 for _ in subnets]


BAD: list[tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    (lambda: resolve(TINY, ["mac"]), ObjectiveError,
     ("'mac' is not a measure of ElasticMobileNetV3", "Did you mean 'macs'?", "measures=[...]")),
    (lambda: resolve(TINY, [], ["energy_mj"], error=SearchError, hint="Give Energy()."),
     SearchError, ("'energy_mj'", "Known: 'macs', 'params', 'size_mb', 'latency_ms'",
                   "Give Energy().")),
    (lambda: resolve(grid(2, 2), [cost], ["cots"]), ObjectiveError,
     ("'cots' is not a measure of a space", "Did you mean 'cost'?")),
    (lambda: resolve(grid(2, 2), ["macs"]), ObjectiveError,
     ("'macs' measures networks, and a space has none", "model=")),
    (lambda: resolve(None, [Latency()]), ObjectiveError,
     ("'latency_ms' measures networks, and there is none", "model=")),
    (lambda: resolve(nn.Linear(1, 1), ["params"]), SearchError, ("no elastic part",)),
    (lambda: resolve(ElasticMlp(), ["macs"]), SearchError,
     ("'macs' of ElasticMlp needs one sample", "example_input_array")),
    (lambda: resolve(TINY, [twice, twice]), ObjectiveError, ("two measures",)),
    (lambda: resolve(TINY, ["params", "params"]), ObjectiveError, ("two measures", "'params'")),
    (lambda: resolve(TINY, [3]), ObjectiveError, ("3", "not a measure")),  # type: ignore[list-item] # the point
    (lambda: resolve(TINY, [Latency]), ObjectiveError, ("not a measure",)),  # type: ignore[list-item] # the point
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "parts"), BAD)
def test_what_is_refused(
    call: Callable[[], Any], kind: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert_clear(caught.value, *parts)


PLUGIN = """
from lightning_subnet.costs import network_measure

@network_measure("demo_kb", unit="kB", exact=True)
def flash(net, example_input):
    return sum(p.numel() for p in net.parameters()) / 1000

class Depth:
    name = "depth"
    needs_sample = False
    def bind(self, elastic, example_input):
        assert example_input is None
        return network_measure("depth", exact=True)(
            lambda net, _: len(list(net.parameters()))
        ).bind(elastic, None)

other = Depth
"""
POINTS = """[lightning_subnet.measures]
demo_kb = demo_costs:flash
depth = demo_costs:Depth
other = demo_costs:other
nothing = demo_costs:PLUGIN
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    write_package(tmp_path, "demo_costs", {"demo_costs": PLUGIN + "PLUGIN = 3\n"}, POINTS)
    with installed(MEASURES, tmp_path):
        yield


@pytest.mark.usefixtures("plugin")
def test_another_package_offers_measures_by_name() -> None:
    assert measure_names()[-4:] == ["demo_kb", "depth", "nothing", "other"]
    closest = closest_subnet(TINY, demo_kb=30, depth=60)
    assert set(closest.values) == {"demo_kb", "depth"}
    assert closest.distance < 0.5
    assert resolve(ElasticMlp(), ["depth"], sample=never)["depth"].exact
    with pytest.raises(ObjectiveError, match="Did you mean 'demo_kb'"):
        closest_subnet(TINY, demo=30)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("name", ["other", "nothing"])
def test_an_entry_that_is_not_a_measure_of_its_name_is_refused(name: str) -> None:
    with pytest.raises(PluginError) as caught:
        resolve(TINY, [name])
    assert_clear(caught.value, f"The measure {name!r} of demo_costs", "Repair")
