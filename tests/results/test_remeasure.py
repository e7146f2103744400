# SPDX-License-Identifier: Apache-2.0
"""Fronts measured again: by measures, by functions, by values from elsewhere; and what follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from lightning_subnet import FunctionEvaluator, SearchResult, SubnetError, SubnetSearch, measure
from lightning_subnet.costs import PeakMemory, network_measure
from lightning_subnet.errors import MeasurementError
from lightning_subnet.strategies import NSGA2
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import ElasticMlp
from tests.problems import assert_clear, grid


def searched(**settings: Any) -> SearchResult:
    default: dict[str, Any] = {"space": grid(2, 5), "strategy": NSGA2(population=8), "budget": 20}
    default |= {"objectives": {"error": "min", "latency_ms": "min"}, "storage": None}
    search = SubnetSearch(**{**default, "name": "server", **settings})
    return search.run(FunctionEvaluator(server), progress=False)


def server(subnet: Any) -> dict[str, float]:
    a, b = subnet["x.0"], subnet["x.1"]
    return {"error": 10.0 - a - b, "latency_ms": (1.0 + a + 3 * b, 0.1)}


def phone(subnet: Any) -> float:
    """There the other choice is the dear one."""
    return float(2 + 6 * subnet["x.0"] + subnet["x.1"])


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return searched()


def check(again: SearchResult, before: SearchResult) -> None:
    assert [e.subnet for e in again.history] == [e.subnet for e in before.front]
    for old, new in zip(before.front, again.history, strict=True):
        assert new.values["latency_ms"] == phone(new.subnet)
        assert new.values["latency_ms_before"] == old.values["latency_ms"]
        assert new.values["error"] == old.values["error"]


def test_a_function_a_mapping_and_a_measure_give_the_same(result: SearchResult) -> None:
    check(result.remeasure(phone, name="latency_ms"), result)
    values = {e.subnet: phone(e.subnet) for e in result.front}
    check(result.remeasure(values, name="latency_ms"), result)
    latency = measure("latency_ms")(lambda subnets: [phone(s) for s in subnets])
    again = result.remeasure(latency)
    check(again, result)
    assert again.name == "server remeasured"
    assert set(again.to_dataframe()) >= {"latency_ms", "latency_ms_before", "error", "front"}


def test_the_front_and_the_best_go_by_the_new_values(result: SearchResult) -> None:
    again = result.remeasure(phone, name="latency_ms")
    assert 0 < len(again.front) <= len(result.front)
    for one in again.front:
        assert not any(
            other.values["error"] <= one.values["error"]
            and other.values["latency_ms"] < one.values["latency_ms"]
            for other in again.history
        )
    best = again.best("error", where={"latency_ms": "<= 10"})
    assert phone(best.subnet) <= 10
    assert best.values["error"] == min(
        e.values["error"] for e in again.history if phone(e.subnet) <= 10
    )


def test_pairs_failures_and_what_is_missing(result: SearchResult, tmp_path: Path) -> None:
    front = [e.subnet for e in result.front]
    values: dict[Any, Any] = {s: (phone(s), 0.5) for s in front[1:]}
    values[front[-1]] = float("nan")
    again = result.remeasure(values, name="latency_ms")
    assert [e.ok for e in again.history] == [False, *[True] * (len(front) - 2), False]
    assert "no value came for it" in again.history[0].reason
    assert again.history[-1].reason == "latency_ms is nan"
    assert again.history[1].errors["latency_ms"] == 0.5
    assert all(e.ok for e in again.front)
    again.save(tmp_path / "r.json")
    read = SearchResult.load(tmp_path / "r.json")
    assert [e.values for e in read.history] == [e.values for e in again.history]


def test_a_new_name_is_recorded_beside_the_rest(result: SearchResult) -> None:
    again = result.remeasure(phone, name="phone_ms")
    assert "phone_ms_before" not in again.history[0].values
    assert [e.subnet for e in again.front] == [e.subnet for e in result.front]
    assert again.best("phone_ms").values["phone_ms"] == min(map(phone, [
        e.subnet for e in result.front]))  # fmt: skip


def test_bounds_hold_for_the_new_values() -> None:
    absolute = searched(constraints={"latency_ms": "<= 12"}).remeasure(phone, name="latency_ms")
    assert all(phone(e.subnet) <= 12 for e in absolute.front)
    assert any(phone(e.subnet) > 12 for e in absolute.history)
    before = searched(constraints={"latency_ms": "<= 60%"})
    relative = before.remeasure(phone, name="latency_ms")
    space = before.history.space
    assert relative.history.get(space.largest) is not None, "what the bound refers to"
    with pytest.raises(SubnetError, match=r"relative to the largest subnet.*no value came"):
        before.remeasure({e.subnet: phone(e.subnet) for e in before.front}, name="latency_ms")
    most = 0.6 * phone(space.largest)
    assert {e.subnet for e in relative.front} <= {
        e.subnet for e in before.front if phone(e.subnet) <= most
    }


def test_an_exact_cost_can_be_measured_again() -> None:
    exact = measure("macs", exact=True, takes="indices")(lambda X: 1.0 + X.sum(axis=1))
    search = SubnetSearch(
        space=grid(2, 5), objectives={"error": "min", "macs": "min"}, measures=[exact],
        constraints={"macs": "<= 80%"}, strategy="random", budget=15, storage=None,
    )  # fmt: skip
    before = search.run(FunctionEvaluator(lambda s: {"error": 10.0 - s["x.0"]}), progress=False)
    again = before.remeasure(lambda s: 100.0 + s["x.0"], name="macs")
    assert all(e.values["macs"] >= 100 for e in again.history)
    # The largest came along for the bound, 80 % of 104: nothing of 100 and more satisfies it.
    assert again.history.get(grid(2, 5).largest).values["macs"] == 104
    assert len(again.front) == 0
    feasible = before.remeasure(lambda s: 1.0 + 2 * sum(s.indices), name="macs")
    assert {e.subnet for e in feasible.front} <= {e.subnet for e in before.front}
    assert len(feasible.front) > 0
    assert all(e.values["macs"] <= 0.8 * 17 for e in feasible.front)


def test_a_measure_of_networks_takes_the_model() -> None:
    net = ElasticMlp()
    search = SubnetSearch(space=net.search_space(), objectives={"error": "min", "cost": "min"},
                          storage=None, budget=6, strategy="random")  # fmt: skip
    before = search.run(
        FunctionEvaluator(lambda s: {"error": 1 / s["width"], "cost": s["width"]}), progress=False
    )

    @network_measure("cost")
    def cost(plain: Any, example_input: Any) -> float:
        return 3.0 * plain.width + len(example_input)

    again = before.remeasure(cost, model=net, example_input=torch.zeros(2, 64))
    assert [e.values["cost"] for e in again.history] == [
        3.0 * e.subnet["width"] + 2 for e in before.front
    ]
    with pytest.raises(SubnetError, match="model="):
        before.remeasure(cost)


def test_it_starts_a_search_on_the_other_machine(result: SearchResult) -> None:
    """The same objectives, a changed measure: first the old front, then what is new."""
    again = result.remeasure(phone, name="latency_ms")
    latency = measure("latency_ms")(lambda subnets: [phone(s) for s in subnets])
    for start in (again, result):
        other: Any = SubnetSearch(
            space=grid(2, 5), objectives={"error": "min", "latency_ms": "min"}, measures=[latency],
            strategy=NSGA2(population=4), budget=5 * len(start.front), storage=None, seed=1,
            warm_start=start,
        )  # fmt: skip
        evaluator = FunctionEvaluator(lambda s: {"error": server(s)["error"]})
        other = other.run(evaluator, progress=False)
        n = len(start.front)
        assert [e.subnet for e in other.history[:n]] == [e.subnet for e in start.front]
        assert [e.values["latency_ms"] for e in other.history] == [
            phone(e.subnet) for e in other.history
        ]
        reference = {"error": 11.0, "latency_ms": 40.0}
        assert other.hypervolume(reference) >= again.hypervolume(reference)


def broken(subnet: Any) -> float:
    raise MeasurementError("the phone is gone")


BAD: list[tuple[Callable[[SearchResult], Any], tuple[str, ...]]] = [
    (lambda r: r.remeasure(phone), ("name='latency_ms'",)),
    (lambda r: r.remeasure({}, name="latency_ms"), ("failed", "no value came")),
    (lambda r: r.remeasure({"a": 1.0}, name="latency_ms"), ("'a'", "subnets")),
    (lambda r: r.remeasure(3, name="latency_ms"), ("3", "mapping")),
    (lambda r: r.remeasure(lambda s: "fast", name="latency_ms"), ("failed", "'fast'")),
    (lambda r: r.remeasure(broken, name="latency_ms"), ("the phone is gone",)),
    (lambda r: r.remeasure(lambda s: 1 / 0, name="latency_ms"), ("All", "ZeroDivisionError")),
]


@pytest.mark.parametrize(("call", "parts"), BAD)
def test_bad_input(
    call: Callable[[SearchResult], Any], parts: tuple[str, ...], result: SearchResult
) -> None:
    with pytest.raises(SubnetError) as caught:
        call(result)
    assert_clear(caught.value, *parts)
    assert np.isfinite(result.front.column("latency_ms")).all()


class Upsampled(L.LightningModule):
    """A super-network behind a step that makes its images four times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ElasticMobileNetV3.tiny(n_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(torch.nn.functional.interpolate(x, scale_factor=4.0))


def test_a_sample_that_is_passed_is_for_the_super_network_itself() -> None:
    model, image = Upsampled(), torch.zeros(1, 1, 8, 8)
    values = FunctionEvaluator(lambda subnet: {"error": float(subnet.indices.sum())})
    search = SubnetSearch(
        space=model.net.search_space(),
        objectives={"error": "min"},
        strategy="random",
        budget=3,
        storage=None,
    )
    front = search.run(values, progress=False)
    subnet = front.front[0].subnet

    def peak(again: SearchResult) -> float:
        return again.history[0].values["peak_memory_mb"]

    bound = PeakMemory().bind(model.net, image)
    space = model.net.search_space()
    (expected,), _ = bound.evaluate(space, space.indices([subnet]))
    given = front.remeasure(PeakMemory(), model=model, example_input=image)
    assert peak(given) == expected
    model.example_input_array = image  # as the module takes it
    assert peak(front.remeasure(PeakMemory(), model=model)) > 2 * expected
