# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lightning_subnet import SearchSpace, SubnetMixin, extract, recalibrate
from lightning_subnet.elasticity import sort_channels
from lightning_subnet.elasticity.sorting import Channels, inputs, outputs
from lightning_subnet.errors import ElasticityError, SearchError
from lightning_subnet.supernets import (
    ElasticGPT,
    ElasticMobileNetV3,
    ElasticResNet,
    ElasticTransformer,
    ElasticViT,
)
from tests.networks import ElasticMlp
from tests.supernets.contract import shaken


def images(size: int = 8, channels: int = 1) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, channels, size, size),)


def tokens(*vocabs: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randint(3, vocab, (2, 6)) for vocab in vocabs)


# A network, its input, and what a narrower part of its space keeps.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mobilenet": (partial(ElasticMobileNetV3.tiny, n_classes=10), images, {"e.": [2, 4]}),
    "mobilenet small": (ElasticMobileNetV3.small, partial(images, 32, 3), {"e.": [4, 6]}),
    "resnet": (partial(ElasticResNet.tiny, n_classes=10), images, {"e.": [0.5, 1.0]}),
    "resnet widths": (partial(ElasticResNet.tiny, n_classes=10), images, {"w.": [0.5, 1.0]}),
    "resnet small": (ElasticResNet.small, partial(images, 32, 3), {"w.": [0.75, 1.0]}),
    "vit": (ElasticViT.tiny, images, {"ffn.": [32, 64], "heads.": [2, 4]}),
    "transformer": (ElasticTransformer.tiny, partial(tokens, 20, 20), {"enc_ffn.": [16, 48]}),
    "gpt": (ElasticGPT.tiny, partial(tokens, 65), {"embed": [72, 96], "mlp.": [2, 4]}),
    "gpt with heads": (
        partial(ElasticGPT.tiny, head_dim=24, kv_heads=(), heads=(1, 2, 4)),
        partial(tokens, 65),
        {"heads.": [2, 4]},
    ),
}


def narrowed(space: SearchSpace, keep: dict[str, Any]) -> SearchSpace:
    """Return the part in which choices of these prefixes have these values, and others their most.

    Depths and kernels stay free: no order of channels means anything to them.
    """
    largest, values = space.largest, dict[str, Any]()
    for name in space.names:
        prefix = next((p for p in keep if name.startswith(p)), None)
        if prefix is not None:
            values[name] = keep[prefix]
        elif name.startswith(("e.", "w.", "ffn", "heads", "mlp", "enc_ffn", "dec_ffn", "embed")):
            values[name] = [largest[name]]
    return space.narrowed_to(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_stays_the_same_function(family: str) -> None:
    torch.manual_seed(0)
    build, example, _ = FAMILIES[family]
    net, batch = shaken(build()), example()
    space = net.search_space()
    smaller = [s for s in space.sample(5, rng=0) if s != space.largest]
    with torch.no_grad():
        net.activate(space.largest)
        before, order = net(*batch), copy.deepcopy(net.state_dict())
        net.activate(space.smallest)
        small = net(*batch)
        assert sort_channels(net) > 0
        changed = net(*batch)
        net.activate(space.largest)
        torch.testing.assert_close(net(*batch), before, rtol=1e-5, atol=1e-5)
        assert (changed - small).abs().max() > 1e-3  # the smallest has other channels
        assert any(not torch.equal(v, order[k]) for k, v in net.state_dict().items())
        assert sort_channels(net) == 0  # they are sorted
        for subnet in smaller:
            net.activate(subnet)
            torch.testing.assert_close(extract(net, subnet).eval()(*batch), net(*batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_to_be_kept_stays_the_same_function_too(family: str) -> None:
    torch.manual_seed(0)
    build, example, keep = FAMILIES[family]
    net, batch = shaken(build()), example()
    space = net.search_space()
    part = narrowed(space, keep)
    subnets = [part.smallest, part.largest, *part.sample(6, rng=0)]
    with torch.no_grad():
        before = []
        for subnet in subnets:
            net.activate(subnet)
            before.append(net(*batch))
        assert sort_channels(net, keep=part) > 0
        for subnet, logits in zip(subnets, before, strict=True):
            net.activate(subnet)
            torch.testing.assert_close(net(*batch), logits, rtol=1e-5, atol=1e-5)


def test_channels_are_in_order_of_what_reads_them_within_their_bands() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    block = net.blocks[1]
    space = net.search_space()
    before = block.project[0].weight.detach().abs().sum((0, 2, 3))
    sort_channels(net)
    after = block.project[0].weight.detach().abs().sum((0, 2, 3))
    torch.testing.assert_close(after, before.sort(descending=True).values)
    shuffled(net, seed=1)
    before = block.project[0].weight.detach().abs().sum((0, 2, 3))
    sort_channels(net, keep=space.narrowed_to({"e.1": [2, 4]}))
    after = block.project[0].weight.detach().abs().sum((0, 2, 3))
    first = 2 * block.c_in
    for band in (slice(0, first), slice(first, None)):
        torch.testing.assert_close(after[band], before[band].sort(descending=True).values)


def test_momenta_and_gradients_move_with_their_weights() -> None:
    """A training step after the sorting is the sorted one of a training step without it."""
    torch.manual_seed(0)
    net = ElasticViT.tiny()
    twin = copy.deepcopy(net)
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    optimizers = [torch.optim.AdamW(n.parameters(), lr=1e-2) for n in (net, twin)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    for model, optimizer in zip((net, twin), optimizers, strict=True):
        step(model, optimizer)
        step(model, optimizer)
    assert sort_channels(net, optimizers=[optimizers[0]]) > 0
    for model, optimizer in zip((net, twin), optimizers, strict=True):
        optimizer.step()  # with the gradients that are there
        step(model, optimizer)
    torch.testing.assert_close(net(x), twin(x), rtol=1e-4, atol=1e-5)


def shuffled(net: Any, seed: int) -> None:
    """Put all channels in a random order, by the network's own groups."""
    rng, space = torch.Generator().manual_seed(seed), net.search_space()
    with torch.no_grad():
        for group in net.sortable_channels({name: (space.largest[name],) for name in space.names}):
            order = torch.randperm(group.n // group.unit, generator=rng)
            order = (order[:, None] * group.unit + torch.arange(group.unit)).flatten()
            for tensor, dim in group.axes:
                tensor.copy_(tensor.index_select(dim, order))


@pytest.mark.slow
def test_sorted_channels_keep_more_of_a_trained_network() -> None:
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.images[:, None] / 16 - 0.5, dtype=torch.float32)
    y = torch.tensor(data.target)
    net = ElasticMobileNetV3.tiny(n_classes=10, dropout=0.0, depths=(1, 2))
    space = net.search_space()
    net.activate(space.largest)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    for epoch in range(4):  # the largest alone, as before a width phase
        for rows in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    narrow = space.subnet({**space.largest, **{n: 2 for n in space.names if n.startswith("e.")}})

    def scores(model: Any) -> tuple[float, float]:
        """Return the narrow subnet's accuracy on unseen digits, and its loss."""
        model.activate(narrow)
        recalibrate(model, [x[:512]])
        model.eval()
        with torch.no_grad():
            logits = model(x[1200:])
        right = (logits.argmax(1) == y[1200:]).float().mean().item()
        return right, F.cross_entropy(logits, y[1200:]).item()

    net.eval()
    others = []
    for seed in range(5):
        shuffled(net, seed)
        others.append(scores(copy.deepcopy(net)))
    sort_channels(net)
    accuracy, loss = scores(net)
    assert accuracy > np.median([a for a, _ in others])  # of 86 % and 77 %, say
    assert loss < np.median([value for _, value in others])


class Foreign(SubnetMixin, nn.Module):
    """Someone else's: 6 -> width -> 2, which says itself what can be sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.width = nn.Linear(6, 8), nn.Linear(8, 2), 8

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=[2, 4, 8])

    def activate(self, subnet: Any) -> None:
        self.width = subnet["width"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.width
        x = F.linear(x, self.first.weight[:w], self.first.bias[:w]).relu()
        return F.linear(x, self.last.weight[:, :w], self.last.bias)

    def sortable_channels(self, keep: Any) -> list[Channels]:
        read = inputs(self.last)
        return [Channels([*outputs(self.first), *read], read, keep["width"])]


def test_a_foreign_network_offers_the_same() -> None:
    net, x = Foreign(), torch.randn(4, 6)
    before = net(x)
    assert sort_channels(nn.Sequential(net)) == 1
    torch.testing.assert_close(net(x), before)
    scores = net.last.weight.abs().sum(0)
    assert (scores[:-1] >= scores[1:]).all()


def test_what_cannot_be_sorted_is_refused() -> None:
    with pytest.raises(SearchError, match="ElasticMlp does not say which channels can be sorted"):
        sort_channels(ElasticMlp())
    a, b = nn.Linear(3, 8), nn.Linear(8, 2)
    for arguments in (
        ([*outputs(a), *inputs(b)], inputs(a)),  # 8 and 3
        (outputs(a), ()),
        ([*outputs(a), *inputs(b)], inputs(b), (9,)),
        ([*outputs(a), *inputs(b)], inputs(b), (4,), 3),
    ):
        with pytest.raises(ElasticityError, match="All tensors need one size"):
            Channels(*arguments)
