# SPDX-License-Identifier: Apache-2.0
"""Latency tables: sums of blocks, calibration, files, refusals, and a search with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subnet import Latency, SubnetSearch
from lightning_subnet.costs import LatencyTable, closest_subnet
from lightning_subnet.costs.device import describe_device
from lightning_subnet.costs.tables.blocks import Tracer
from lightning_subnet.costs.tables.files import Agreement
from lightning_subnet.costs.tables.latency_table import BlockTime
from lightning_subnet.costs.tables.places import layout
from lightning_subnet.errors import MeasurementError, ObjectiveError, StorageError, SubnetError
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.costs.tables.test_blocks import Entangled
from tests.networks import ElasticMlp
from tests.problems import assert_clear

IMAGE = torch.zeros(1, 1, 8, 8)
QUICK = Latency(repeats=15, seconds=0.0)


def small(**changes: Any) -> ElasticMobileNetV3:
    sizes = {"n_classes": 3, "depths": (1, 2), "expansions": (1, 2), "kernels": (3,), **changes}
    return ElasticMobileNetV3.tiny(**sizes)


@cache
def weighed() -> tuple[Any, Any]:
    tracer = Tracer(small(), IMAGE)
    places = layout(tracer, rng=np.random.default_rng(0))
    return places, {
        key: BlockTime(c.text, sum(p.numel() for p in c.module.parameters()) / 1000, 0.0)
        for key, c in tracer.blocks().items()
    }


def by_weights(device: str | None = None) -> LatencyTable:
    """Return a table whose milliseconds are thousands of parameters: a known sum."""
    places, blocks = weighed()
    return LatencyTable(
        name="latency_ms", device=device or describe_device("cpu"), conditions={},
        space=small().search_space(), blocks=blocks, places=places,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built() -> tuple[Any, LatencyTable]:
    net = small()
    return net, LatencyTable.build(net, IMAGE, latency=QUICK, calibrate=4, check=3)


def test_what_was_built(built: tuple[Any, LatencyTable], tmp_path: Path) -> None:
    net, table = built
    assert table.space == net.search_space()
    assert table.places is not None
    assert all(block.ms > 0 for block in table.blocks.values())
    assert any("MBConv" in block.text and "(1, 16, 8, 8)" in block.text
               for block in table.blocks.values())  # fmt: skip
    assert table.scale > 0
    assert table.report is not None
    assert table.report.n == 3
    assert str(table.report) in repr(table)
    assert table.device == describe_device("cpu")
    assert (table.conditions["threads"], table.conditions["batch_size"]) == (1, 1)
    space = table.space
    assert (table.predict(space.sample(30, rng=0)) > 0).all()
    again = table.check(net, IMAGE, latency=QUICK, n=2)
    assert again.n == 2
    # Read back, it says the same without the network.
    table.save(tmp_path / "t.json")
    loaded = LatencyTable.load(tmp_path / "t.json")
    some = space.sample(30, rng=1)
    assert loaded.predict(some).tolist() == table.predict(some).tolist()
    assert loaded.report == table.report
    assert loaded.fingerprint == table.fingerprint
    assert loaded.bind(net, IMAGE).vectorised


def test_a_sum_of_known_times_is_found_and_calibrated() -> None:
    net = small()
    table = by_weights()
    space = table.space
    params = next(m for m in net.exact_measures() if m.name == "params")
    X = np.concatenate(list(space.index_blocks()))
    exact = params.evaluate(space, X)[0] / 1000
    assert table.predict(space) == pytest.approx(exact)
    # Whole subnets are half as fast again, and begin with 2 ms.
    slower = type(params)("latency_ms", lambda X: 1.5 * params(X) / 1000 + 2, takes="indices")
    table._calibrate(slower, 6, np.random.default_rng(0))
    assert (table.scale, table.constant) == (pytest.approx(1.5), pytest.approx(2.0))
    report = table._agreement(slower, 20, np.random.default_rng(0))
    assert (report.tau, report.mape) == (1.0, pytest.approx(0, abs=1e-9))


@pytest.mark.slow
def test_a_network_without_a_lookup_is_traced() -> None:
    net, x = Entangled(), torch.zeros(1, 4)
    table = LatencyTable.build(net, x, latency=QUICK, calibrate=0, check=0)
    assert table.places is None
    measure = table.bind(net, x)
    assert (measure.exact, measure.vectorised) == (True, False)
    top = net.search_space().largest
    assert measure([top])[0] == pytest.approx(sum(
        table.blocks[key].ms for key in Tracer(net, x)(top).values()))  # fmt: skip
    with pytest.raises(MeasurementError, match="traces networks"):
        _ = table.measure


def test_a_block_that_was_never_timed_is_a_failure_of_its_subnet(tmp_path: Path) -> None:
    net, x = Entangled(), torch.zeros(1, 4)
    table = LatencyTable.build(net, x, latency=QUICK, calibrate=0, check=0)
    middle = net.search_space().subnet({f"w.{i}": 1 for i in range(7)})
    del table._ms[Tracer(net, x)(middle)["layer"]]
    measure = table.bind(net, x)
    assert measure([net.search_space().largest])[0] > 0
    with pytest.raises(RuntimeError, match=r"The block layer of Subnet.* was never timed"):
        measure([middle])
    table.save(tmp_path / "t.json")
    with pytest.raises(MeasurementError, match="bind"):
        LatencyTable.load(tmp_path / "t.json").predict([middle])


def test_a_search_by_table_spends_its_budget_on_the_rest(tmp_path: Path) -> None:
    net = small()
    by_weights().save(tmp_path / "t.json")
    table = LatencyTable.load(tmp_path / "t.json")
    search = SubnetSearch(
        space=net.search_space(), objectives={"error": "min", "latency_ms": "min"},
        constraints={"latency_ms": "<= 90%"}, measures=[table.measure], strategy="random",
        budget=5, storage=None,
    )  # fmt: skip
    profile = search.profile()
    assert profile.complete
    assert profile.satisfiable
    for subnet in search.ask(5):
        evaluation = search.tell(subnet, error=1.0)
        assert evaluation.values["latency_ms"] <= 0.9 * profile.ranges["latency_ms"].largest
    tight = search.replace(constraints={"latency_ms": "<= 1"}).profile()
    assert not tight.satisfiable
    assert tight.nearest == net.search_space().smallest
    closest = closest_subnet(net, IMAGE, latency_ms=20, measures=table)
    values = table.predict(net.search_space())
    assert closest.evaluations == 0
    assert closest.distance == pytest.approx(np.abs(values / 20 - 1).min())


def stored(tmp_path: Path, table: LatencyTable) -> Path:
    table.save(tmp_path / "t.json")
    return tmp_path / "t.json"


def test_a_table_of_another_device_must_be_meant(tmp_path: Path) -> None:
    net = small()
    path = stored(tmp_path, by_weights("Cortex-A72 (cpu), torch 2.4.0"))
    here = LatencyTable.load(path)
    for use in (lambda: here.bind(net, IMAGE), lambda: here.measure):
        with pytest.raises(MeasurementError) as caught:
            use()
        assert_clear(caught.value, "Cortex-A72", describe_device("cpu"), "device='any'")
    for meant in ("any", "Cortex"):
        assert LatencyTable.load(path, device=meant).bind(net, IMAGE).exact
    with pytest.raises(MeasurementError) as caught:
        LatencyTable.load(path, device="iPhone")
    assert_clear(caught.value, "Cortex-A72", "device='iPhone' was asked")


def test_a_table_of_another_space_or_network_is_refused_with_the_difference() -> None:
    table = by_weights()
    with pytest.raises(MeasurementError) as caught:
        table.bind(small(expansions=(1, 2, 4)), IMAGE)
    assert_clear(caught.value, "another space", "e.0", "build")
    other_classes = small(n_classes=7)
    with pytest.raises(MeasurementError) as caught:
        table.bind(other_classes, IMAGE)
    assert_clear(caught.value, "another network", "classifier")
    with pytest.raises(MeasurementError) as caught:
        table.bind(small(image_size=16), torch.zeros(1, 1, 16, 16))
    assert_clear(caught.value, "another input", "was never timed")


BAD: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    (lambda: LatencyTable.build(small(), IMAGE, latency="fast"), ("'fast'", "Latency")),  # type: ignore[arg-type] # the point
    (lambda: LatencyTable.build(small(), IMAGE, calibrate=2), ("calibrate=2", "3")),
    (lambda: LatencyTable.build(small(), IMAGE, check=-1), ("check=-1",)),
    (lambda: LatencyTable.build("net", IMAGE), ("'net'", "super-network")),  # type: ignore[arg-type] # the point
    (lambda: LatencyTable.build(small()), ("None is not a batch", "input=")),
    (lambda: LatencyTable.build(ElasticMlp(), torch.zeros(1, 64)), ("extract(subnet)",)),
    (lambda: LatencyTable.build(small(), torch.zeros(1, 3, 8, 8)), ("forward() takes",)),
]


@pytest.mark.parametrize(("call", "parts"), BAD)
def test_bad_input_fails_before_anything_is_timed(
    call: Callable[[], Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises((ObjectiveError, SubnetError)) as caught:
        call()
    assert_clear(caught.value, *parts)


@pytest.mark.parametrize("change", [{"format": "x"}, {"space": {}}, {"blocks": {"a": {}}}, None])
def test_a_file_that_is_no_table(change: dict[str, Any] | None, tmp_path: Path) -> None:
    path = stored(tmp_path, by_weights())
    data = json.loads(path.read_text())
    path.write_text("no json" if change is None else json.dumps({**data, **change}))
    with pytest.raises(StorageError) as caught:
        LatencyTable.load(path)
    assert_clear(caught.value, "holds no LatencyTable", "save")
    with pytest.raises(StorageError):
        LatencyTable.load(tmp_path / "nowhere.json")


def test_agreement() -> None:
    measured = np.array([1.0, 2.0, 4.0])
    agreement = Agreement.of(np.array([1.1, 2.0, 3.0]), measured)
    assert (agreement.n, agreement.tau) == (3, 1.0)
    assert (agreement.mape, agreement.worst) == (pytest.approx(35 / 3), pytest.approx(25))
    assert Agreement(**agreement.to_json()) == agreement


class Raw(nn.Module):
    """A module around a network that prepares its input: bytes (n, 64) become images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.example_input_array = torch.zeros(1, 64, dtype=torch.uint8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.view(-1, 1, 8, 8) / 255)


def test_a_module_that_prepares_its_input_is_timed_on_what_the_network_gets() -> None:
    model = Raw(small())
    table = LatencyTable.build(model, latency=QUICK, calibrate=0, check=2)
    assert table.conditions["input"] == "(1, 1, 8, 8) torch.float32"
    assert any("(1, 16, 8, 8)" in block.text for block in table.blocks.values())
    assert table.check(model, latency=QUICK, n=2).n == 2
    passed = LatencyTable.build(model, IMAGE, latency=QUICK, calibrate=0, check=0)
    assert passed.blocks.keys() == table.blocks.keys()
