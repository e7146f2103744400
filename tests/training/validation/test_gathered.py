# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_subnet.training.validation.gathered import GatheredState, attributes_digest


class Meter:
    """An average, as people write it."""

    def __init__(self) -> None:
        self.total, self.n, self.values = 0.0, 0, [1.0]


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[Any] = []


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.holder, self.part, self.mean = Holder(), Holder(), MeanMetric()
        self.hidden_metrics = [MeanMetric()]
        self.outputs, self.by_loader = [1], {"a": [2], "b": {"c": [3]}}
        self.number, self.text, self.nothing, self.flag = 0, "a", None, False
        self.seen, self.last, self.order = {1}, deque([1, 2], maxlen=3), OrderedDict(x=1)
        self.lists: Any = defaultdict(list, x=[1])
        self.confusion, self.meter = torch.zeros(2, 2), Meter()


CHANGES = {
    "holder.features": lambda m: m.holder.features.append(torch.ones(2)),
    "outputs": lambda m: m.outputs.append(torch.ones(1)),
    "by_loader": lambda m: m.by_loader["b"]["c"].append(1),
    "number": lambda m: setattr(m, "number", m.number + 1),
    "text": lambda m: setattr(m, "text", "b"),
    "nothing": lambda m: setattr(m, "nothing", [1]),
    "flag": lambda m: setattr(m, "flag", True),
    "seen": lambda m: m.seen.add(2),
    "last": lambda m: m.last.append(5),
    "order": lambda m: m.order.update(y=2),
    "lists": lambda m: m.lists["y"].append(2),
    "confusion": lambda m: m.confusion.add_(1),
    "meter": lambda m: setattr(m.meter, "total", 3.0) or m.meter.values.append(2),
    "new": lambda m: setattr(m, "new", 1),
}


def content(module: Module) -> Any:
    return {
        name: str(sorted(vars(v).items())) if isinstance(v, Meter) else str(v)
        for name, v in [*vars(module).items(), ("features", module.holder.features)]
        if not name.startswith("_") or name == "_new"
    }


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_step_gathers_is_named_and_put_back_in_place(name: str) -> None:
    module = Module()
    before, outputs, meter = content(module), module.outputs, module.meter
    state = GatheredState(module)
    assert state.changed() == []
    for _ in range(2):  # what it puts back can be changed again
        CHANGES[name](module)
        assert state.changed() == [name]
        state.restore()
        assert state.changed() == []
        assert content(module) == before
    assert module.outputs is outputs
    assert module.meter is meter


def test_metrics_are_emptied_also_those_in_lists() -> None:
    module = Module()
    state = GatheredState(module)
    for metric in (module.mean, module.hidden_metrics[0]):
        metric.update(3.0)
    state.restore()
    assert module.mean.update_count == module.hidden_metrics[0].update_count == 0


class _Results:
    def __init__(self, metric: torch.nn.Module) -> None:
        self.by_class = {"all": metric}


@pytest.mark.parametrize("place", [
    lambda metric: {"val": {"top": [metric]}},
    lambda metric: ((metric,),),
    _Results,
    lambda metric: {"val": MetricCollection([metric])},
    lambda metric: [torch.nn.ModuleList([metric])],
])  # fmt: skip
def test_metrics_are_emptied_wherever_they_are(place: Any) -> None:
    module, metric = Module(), MeanMetric()
    module.place = place(metric)
    metric.update(3.0)
    state = GatheredState(module)
    state.restore()
    assert metric.update_count == 0
    metric.update(4.0)
    state.restore()
    assert metric.update_count == 0


def test_the_part_that_is_searched_keeps_its_attributes_and_torch_and_lightning_theirs() -> None:
    module = Module()
    state = GatheredState(module, module.part)
    module.part.features.append(1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer = trainer
    module.train(False)
    module.register_buffer("buffer", torch.ones(1))
    assert module.hparams == {}  # reading them makes attributes
    assert state.changed() == []
    state.restore()
    assert module.part.features == [1]
    assert module.trainer is trainer
    assert not module.training
    assert module.buffer == 1


def test_what_is_large_or_shared_is_not_copied() -> None:
    module = Module()
    module.data, module.items = torch.zeros(2_000_000), [torch.zeros(3)] * 4
    data, items = module.data, module.items
    state = GatheredState(module)
    module.data = None
    module.items.append(torch.ones(3))
    state.restore()
    assert module.data is data
    assert module.items is items
    assert len(items) == 4


def changed(change: Callable[[Any], None]) -> bool:
    net = nn.Sequential(nn.BatchNorm1d(2), Meters())
    before = attributes_digest(net)
    assert attributes_digest(net) == before
    change(net)
    return attributes_digest(net) != before


class Meters(nn.Module):
    """Attributes of all kinds that a forward pass may go by."""

    shared = 1

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.act, self.mean = (1, 2), torch.relu, torch.zeros(2)
        self.config = SimpleNamespace(scale=1.0, names=["a"])
        self.itself: list[Any] = []
        self.itself.append(self.itself)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net[0], "eps", 0.5),
        lambda net: setattr(net[0], "momentum", None),
        lambda net: setattr(net[1], "sizes", (1, 3)),
        lambda net: setattr(net[1], "act", torch.sigmoid),
        lambda net: setattr(net[1], "new", "text"),
        lambda net: setattr(net[1], "shared", 2),
        lambda net: setattr(net[1].config, "scale", 2.0),
        lambda net: net[1].config.names.append("b"),
        lambda net: net[1].mean.add_(1),
        lambda net: net[0].eval(),
    ],
)
def test_a_changed_attribute_gives_another_digest(change: Callable[[Any], None]) -> None:
    assert changed(change)


def test_weights_and_buffers_are_not_in_the_digest_of_attributes() -> None:
    assert not changed(lambda net: net[0].running_mean.add_(1))
    assert not changed(lambda net: net[0].weight.data.add_(1))
