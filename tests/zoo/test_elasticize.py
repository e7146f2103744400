# SPDX-License-Identifier: Apache-2.0
"""Networks of timm and transformers become elastic: what is found, and that subnets are exact."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet._torch.inputs import arguments
from lightning_subnet._torch.outputs import difference, named_outputs
from lightning_subnet.export import onnx_session, to_onnx
from lightning_subnet.space import Subnet
from lightning_subnet.supernets._blocks.skips import SkippedBlock
from lightning_subnet.supernets.elasticizing import elasticize
from tests.zoo.networks import CASES

CLOSE = 1e-5
PLACEHOLDERS = {SkippedBlock, nn.Identity}  # of blocks that were left out
ALL = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES]
)


def outputs(net: nn.Module, example: Any) -> dict[str, torch.Tensor]:
    args, kwargs = arguments(net, example)
    with torch.no_grad():
        output = net.eval()(*args, **kwargs)
    return {n: x for n, x in named_outputs(output).items() if "past_key_values" not in n}


def assert_close(expected: Any, value: Any, tolerance: float = CLOSE) -> None:
    gap = difference(expected, value)
    assert gap.relative <= tolerance, str(gap)


def shaken(net: nn.Module) -> nn.Module:
    """Return a network without weights that are zero, which would hide what they multiply."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p) * (1 if p.ndim == 1 else p[0].numel() ** -0.5))
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return net.eval()


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


# Masks that are told by the places of weights alone


def readers(net: nn.Module) -> dict[str, int]:
    """Return the weights that read channels, with the dimension that they read along."""
    dims = {}
    for name, module in net.named_modules():
        is_conv = isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1
        if isinstance(module, nn.Linear) or is_conv:
            dims[f"{name}.weight"] = 1
        elif type(module).__name__ == "Conv1D":
            dims[f"{name}.weight"] = 0
        for own, p in module.named_parameters(recurse=False):
            if p.ndim == 3 and own in ("gate_up_proj", "down_proj"):  # all experts of a layer
                dims[f"{name}.{own}"] = 2
    return {name.removeprefix("."): dim for name, dim in dims.items()}


def places(net: Any, subnet: Subnet) -> dict[str, list[torch.Tensor]]:
    """Return which indices of each dimension of each parameter a subnet has.

    They are read off a subnet that is cut out while each number says its own place.
    """
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    assert all(p.numel() < 2**24 for p in before.values()), "float32 counts no further"
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.arange(p.numel()).view_as(p))
    part = net.extract(subnet)
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.copy_(before[n])
    result = {}
    for n, p in part.named_parameters():
        whole = before[n].shape if n in before else p.shape
        steps = [prod(whole[d + 1 :]) for d in range(len(whole))]
        result[n] = [
            (p.long() // step % size).unique() for step, size in zip(steps, whole, strict=True)
        ]
    return result


@contextmanager
def masked(net: Any, subnet: Subnet) -> Iterator[None]:
    """Let nothing in the whole network read what a subnet lacks; blocks are left out as in it."""
    space = net.search_space()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    whole = space.subnet({**space.largest.to_json(), **of_kind(subnet, "keep")})
    widths = {n: v for n, v in subnet.to_json().items() if not n.startswith("keep")}
    kept = places(net, space.subnet({**space.largest.to_json(), **widths}))
    tensors = dict(net.named_parameters())
    with torch.no_grad():
        for name, dim in readers(net).items():
            if name in kept:
                away = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                away[kept[name][dim]] = False
                tensors[name].index_fill_(dim, away.nonzero().flatten(), 0.0)
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
    refused = {row.name for row in report.refused if row.kind != "depth"}
    assert refused == set(case.refused), str(report)
    assert (kinds["depth"] > 0) == case.depth, str(report)


@ALL
def test_the_whole_network_stays_the_same_function_with_the_same_state(name: str) -> None:
    net, example, original = network(name)
    net.activate(net.search_space().largest)
    shapes = {key: value.shape for key, value in original.state_dict().items()}
    assert {key: value.shape for key, value in net.state_dict().items()} == shapes
    assert_close(outputs(original, example), outputs(net, example))
    assert_close(
        outputs(original, example), outputs(net.extract(net.search_space().largest), example)
    )


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
