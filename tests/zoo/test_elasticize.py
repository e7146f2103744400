# SPDX-License-Identifier: Apache-2.0
"""Networks of timm and transformers become elastic: what is found, and that subnets are exact."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet._torch.inputs import arguments
from lightning_subnet._torch.outputs import difference
from lightning_subnet.export import onnx_session, to_onnx
from lightning_subnet.space import Subnet
from lightning_subnet.supernets._blocks.skips import SkippedBlock
from lightning_subnet.supernets.elasticizing import elasticize
from tests.zoo.masks import forget, mark, marks, outputs, shaken
from tests.zoo.networks import CASES

CLOSE = 1e-5
PLACEHOLDERS = {SkippedBlock, nn.Identity}  # of blocks that were left out
ALL = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES]
)


def assert_close(expected: Any, value: Any, tolerance: float = CLOSE) -> None:
    gap = difference(expected, value)
    assert gap.relative <= tolerance, str(gap)


def main(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return outputs but the states of an encoder, whose channels are sorted as its stream is."""
    return {
        n: x for n, x in named.items() if not n.startswith(("encoder_last", "vision_", "text_"))
    }


@cache
def network(name: str) -> tuple[Any, Any, nn.Module]:
    """Return an elastic network, its example, and the network that it was."""
    torch.manual_seed(0)
    original = shaken(CASES[name].build())
    example = CASES[name].inputs(2)
    net = elasticize(copy.deepcopy(original), example, widths=(0.5, 1), divisor=2, streams=True)
    return net, example, original


def subnets(net: Any) -> list[Subnet]:
    space = net.search_space()
    return [space.smallest, *space.sample(2, 0)]


def without_streams(net: Any, subnet: Subnet) -> Subnet:
    space = net.search_space()
    whole = {n: v[-1] for n, v in space.values.items() if n.startswith("stream")}
    return space.subnet({**subnet.to_json(), **whole})


def of_kind(subnet: Subnet, kind: str) -> dict[str, Any]:
    return {n: v for n, v in subnet.to_json().items() if n.startswith(kind)}


def places(net: Any, subnet: Subnet) -> dict[str, list[torch.Tensor]]:
    """Return which indices of each dimension of each parameter a subnet has."""
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    mark(net)
    part = net.extract(subnet)
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.copy_(before[n])
    return marks(part, net)


@contextmanager
def masked(net: Any, subnet: Subnet) -> Iterator[None]:
    """Let nothing in the whole network read what a subnet lacks; blocks are left out as in it."""
    space = net.search_space()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    whole = space.subnet({**space.largest.to_json(), **of_kind(subnet, "keep")})
    widths = {n: v for n, v in subnet.to_json().items() if not n.startswith("keep")}
    kept = places(net, space.subnet({**space.largest.to_json(), **widths}))
    tensors = dict(net.named_parameters())
    forget(net, kept)
    net.activate(whole)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                tensors[name].copy_(value)


@ALL
def test_groups_are_those_of_the_architecture_and_are_proved(name: str) -> None:
    net, _, _ = network(name)
    report = net.elastic_report
    kinds = Counter(row.kind for row in report.elastic)
    case = CASES[name]
    assert (kinds["width"], kinds["heads"], kinds["stream"]) == (
        case.width,
        case.heads,
        case.stream,
    ), str(report)
    assert all(row.verified for row in report.elastic)
    refused = {row.name for row in report.refused if row.kind != "depth" and row.units}
    assert refused == set(case.refused), str(report)
    assert (kinds["depth"] > 0) == case.depth, str(report)


@ALL
def test_the_whole_network_stays_the_same_function_with_the_same_state(name: str) -> None:
    net, example, original = network(name)
    net.activate(net.search_space().largest)
    shapes = {key: value.shape for key, value in original.state_dict().items()}
    assert {key: value.shape for key, value in net.state_dict().items()} == shapes
    expected = main(outputs(original, example))
    assert_close(expected, main(outputs(net, example)))
    assert_close(expected, main(outputs(net.extract(net.search_space().largest), example)))


@ALL
def test_active_is_extracted_is_masked(name: str) -> None:
    net, example, original = network(name)
    for subnet in subnets(net):
        net.activate(subnet)
        part = net.extract(subnet)
        assert type(part) is type(original)
        assert {type(m) for m in part.modules()} <= {
            type(m) for m in original.modules()
        } | PLACEHOLDERS
        if any(name.startswith("stream") for name in subnet):
            assert_close(outputs(net, example), outputs(part, example))
        inner = without_streams(net, subnet)
        net.activate(inner)
        active = outputs(net, example)
        assert_close(active, outputs(net.extract(inner), example))
        with masked(net, inner):
            assert_close(active, outputs(net, example))


@ALL
def test_an_extracted_network_converts(name: str) -> None:
    net, example, _ = network(name)
    if CASES[name].not_onnx:
        pytest.skip(CASES[name].not_onnx)
    part = net.extract(net.search_space().smallest).eval()
    session = onnx_session(to_onnx(part, example, dynamic_batch=False), threads=1)
    args, kwargs = arguments(part, example)
    tensors = [*args, *kwargs.values()]
    feeds = {node.name: x.numpy() for node, x in zip(session.get_inputs(), tensors, strict=True)}
    values = [torch.from_numpy(y) for y in session.run(None, feeds)]
    [expected] = [
        x
        for n, x in outputs(part, example).items()
        if n in ("output", "logits", "logits_per_image")
    ]
    gaps = [difference(expected, y).relative for y in values if y.shape == expected.shape]
    assert min(gaps) <= 1e-4


# What is particular to some


def part_of(name: str, **kinds: Any) -> Any:
    """Return a subnet whose choices of some kinds are their smallest, and the others whole."""
    net, _, _ = network(name)
    space = net.search_space()
    small = {n: v[0] for n, v in space.values.items() if n.partition(".")[0] in kinds}
    return net.extract(space.subnet({**space.largest.to_json(), **small}))


def test_attributes_count_what_they_mean() -> None:
    heads = part_of("bert", heads=True).bert.encoder.layer[0].attention.self
    assert (heads.num_attention_heads, heads.all_head_size, heads.attention_head_size) == (
        2,
        32,
        16,
    )
    stream = part_of("bert", stream=True).bert.encoder.layer[0].attention.self
    assert (stream.num_attention_heads, stream.all_head_size) == (4, 64)
    assert stream.query.weight.shape == (64, 32)

    block = part_of("gpt2", heads=True).transformer.h[0].attn
    assert (block.num_heads, block.split_size, block.head_dim) == (2, 32, 16)
    for layer in (block.c_attn, block.c_proj):
        assert (layer.nx, layer.nf) == tuple(layer.weight.shape)

    attention = part_of("llama", heads=True).model.layers[0].self_attn
    assert attention.k_proj.out_features == 16  # one key-value head with its two queries
    assert attention.q_proj.out_features == 32
    assert (attention.num_key_value_groups, attention.head_dim) == (2, 16)


def test_heads_that_share_a_bias_over_layers_vary_together() -> None:
    net, _, _ = network("t5")
    layers = {row.name: row.layers for row in net.elastic_report.elastic if row.kind == "heads"}
    assert len(layers) == 3
    for parts in layers.values():
        assert {name.split(".")[2] for name in parts if ".block." in name} == {"0", "1"}


def test_labels_and_a_cache_change_nothing() -> None:
    for name, more in (("bert", {"labels": torch.tensor([0, 1])}), ("gpt2", {"use_cache": False})):
        net, example, original = network(name)
        other = elasticize(
            copy.deepcopy(original), {**example, **more}, widths=(0.5, 1), divisor=2, streams=True
        )
        assert other.search_space() == net.search_space()
