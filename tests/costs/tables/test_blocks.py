# SPDX-License-Identifier: Apache-2.0
"""Blocks of extracted subnets: found, told apart, and looked up by choices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subnet import Choice, SearchSpace, Subnet, SubnetMixin
from lightning_subnet.costs.tables.blocks import BlockBench, Tracer, blocks_of
from lightning_subnet.costs.tables.places import layout, trace_sample
from lightning_subnet.errors import MeasurementError
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import ElasticMlp

IMAGE = torch.zeros(1, 1, 8, 8)
SMALL = {"depths": (1, 2), "expansions": (1, 2)}


def test_containers_are_entered_and_blocks_are_not() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    plain = net.extract(net.search_space().smallest)
    paths = [path for path, _ in blocks_of(plain)]
    assert paths == ["stem", "first", "stages.0.0", "stages.1.0", "expand", "mix", "dropout",
                     "classifier"]  # fmt: skip
    assert [path for path, _ in blocks_of(nn.ModuleDict({"a": nn.ModuleDict({"b": nn.ReLU()})}))]
    assert blocks_of(nn.Linear(1, 1)) == []


def test_equal_blocks_are_one_kind_and_others_are_not() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space, tracer = net.search_space(), Tracer(net, IMAGE)
    deep = tracer(space.largest)
    assert deep["stages.0.1"] == deep["stages.0.2"], "the same layers on the same shape"
    assert deep["stages.0.0"] == deep["stages.0.1"], "at stride 1 and equal widths"
    assert deep["stages.1.0"] != deep["stages.1.1"], "another stride"
    flat = tracer(space.smallest)
    assert "stages.0.1" not in flat
    assert flat["stages.0.0"] != deep["stages.0.0"]
    assert flat["stem"] == deep["stem"]


class Headed(SubnetMixin, nn.Module):
    """Attention whose heads no shape tells; a call by keyword, a mask, and a block called twice."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.attend, self.act, self.heads = Attend(heads), nn.Tanh(), heads

    def search_space(self) -> SearchSpace:
        return SearchSpace(heads=[1, 2, 4])

    def activate(self, subnet: Subnet) -> None:
        self.heads = self.attend.heads = subnet["heads"]

    def extract(self, subnet: Subnet) -> nn.Module:
        net = Headed(int(str(subnet["heads"])))
        net.load_state_dict(self.state_dict())
        return net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        return self.act(self.attend(self.act(x), mask=mask))


class Attend(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.mix, self.heads = nn.Linear(8, 8), heads

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
        y = self.mix(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


def test_settings_count_that_no_shape_tells() -> None:
    net = Headed()
    tracer = Tracer(net, torch.zeros(1, 5, 8))
    keys = [tracer(subnet) for subnet in net.search_space()]
    assert len({k["attend"] for k in keys}) == 3
    assert len({k["act"] for k in keys} | {k["act#1"] for k in keys}) == 1


def test_blocks_run_alone_as_they_do_inside() -> None:
    net = Headed()
    tracer = Tracer(net, torch.rand(1, 5, 8))
    blocks = tracer.blocks()
    key = tracer(net.search_space().largest)["attend"]
    (x,) = blocks[key].inputs
    assert x.shape == (1, 5, 8), "the mask does not grow with the batch"
    bench = BlockBench(list(blocks.values()))
    place = bench.order.index(list(blocks).index(key))
    alone = bench.extract(bench.search_space().subnet(block=place))
    mask = torch.ones(5, 5, dtype=torch.bool)
    with torch.inference_mode():
        inside = blocks[key].module(x, mask=mask)
        assert torch.equal(alone(*bench.inputs), inside)
        three = [t.repeat_interleave(3, 0) for t in bench.inputs]
        torch.testing.assert_close(alone(*three)[2], inside[0])  # the batch decides how it adds up


@pytest.mark.parametrize(
    "changes", [{}, {"depths": (2, 3), "kernels": (3,)}, {"se": (True, False), "kernels": (5,)}]
)
def test_the_lookup_is_the_trace_for_every_subnet(changes: dict[str, Any]) -> None:
    """With parameters in place of milliseconds the sums are those of the exact table."""
    net = ElasticMobileNetV3.tiny(n_classes=3, **{**SMALL, **changes})
    space, tracer = net.search_space(), Tracer(net, IMAGE)
    places = layout(tracer, rng=np.random.default_rng(0))
    assert places is not None
    weights = {
        key: float(sum(p.numel() for p in block.module.parameters()))
        for key, block in tracer.blocks().items()
    }
    X = np.concatenate(list(space.index_blocks()))
    sizes = [len(choice.values) for choice in space.choices.values()]
    total = sum(place.costs(X, sizes, weights) for place in places)
    params = next(m for m in net.exact_measures() if m.name == "params")
    assert np.array_equal(total, params.evaluate(space, X)[0])
    assert changes or tracer.n_traced < 0.25 * space.size


def test_a_walk_through_samples_finds_the_blocks_too() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=3, **{**SMALL, "kernels": (3,)})
    one, two = Tracer(net, IMAGE), Tracer(net, IMAGE)
    layout(one, rng=np.random.default_rng(0))
    assert 30 < trace_sample(two, rng=np.random.default_rng(0)) <= net.search_space().size + 2
    assert set(two.kinds) == set(one.kinds)


class Entangled(SubnetMixin, nn.Module):
    """One layer whose width is the sum of seven choices."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, width), nn.Linear(width, 2)

    def search_space(self) -> SearchSpace:
        return SearchSpace({f"w.{i}": Choice([0, 1, 2]) for i in range(7)})

    def activate(self, subnet: Subnet) -> None:
        pass

    def extract(self, subnet: Subnet) -> nn.Module:
        return Entangled(1 + sum(int(str(v)) for v in subnet.values()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x))


def test_too_many_choices_for_a_lookup() -> None:
    tracer = Tracer(Entangled(), torch.zeros(1, 4))
    assert layout(tracer, rng=np.random.default_rng(0)) is None


def test_a_network_that_cannot_be_sliced_is_refused() -> None:
    with pytest.raises(MeasurementError, match=r"ElasticMlp has no extract\(subnet\).*Predictor"):
        Tracer(ElasticMlp(), torch.zeros(1, 64))


def test_an_input_that_does_not_fit() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    with pytest.raises(MeasurementError, match="blocks were traced"):
        Tracer(net, torch.zeros(1, 3, 8, 8))
    with pytest.raises(MeasurementError, match="calls none of its blocks"):
        Tracer(net, IMAGE, lambda plain: [])
