# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet.elasticity.batchnorm import batch_norms, recalibrate
from lightning_subnet.elasticity.layers import ElasticBatchNorm2d
from lightning_subnet.errors import MeasurementError
from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
from tests.problems import assert_clear


def batches(n: int = 3, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 1, 8, 8, generator=generator) * (i + 1) + i for i in range(n)]


def network() -> ElasticMobileNetV3:
    torch.manual_seed(0)
    return ElasticMobileNetV3.tiny(n_classes=3, dropout=0.5)


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, ElasticBatchNorm2d])
def test_statistics_are_the_average_over_batches_by_hand(kind: Any) -> None:
    layer = kind(1).eval()
    with torch.no_grad():
        layer.running_mean.fill_(99)
        layer.num_batches_tracked.fill_(7)
    data = batches()
    assert recalibrate(layer, data) == 24
    mean = torch.stack([x.mean() for x in data]).mean()
    variance = torch.stack([x.var(correction=1) for x in data]).mean()
    torch.testing.assert_close(layer.running_mean[0], mean)
    torch.testing.assert_close(layer.running_var[0], variance)
    assert layer.num_batches_tracked == 3


def test_every_kind_of_batch_norm_counts_and_no_other_normalisation() -> None:
    kinds = [nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), ElasticBatchNorm2d(2)]
    net = nn.Sequential(*kinds, nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.Linear(2, 2))
    assert batch_norms(net) == kinds


def test_deeper_layers_see_batches_normalised_by_their_own_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    data = batches()
    means = []
    with torch.no_grad():
        for x in data:
            normed = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
            means.append(net[1](normed).relu().mean((0, 2, 3)))
    recalibrate(net, data)
    torch.testing.assert_close(net[3].running_mean, torch.stack(means).mean(0))


def test_what_ran_before_does_not_matter() -> None:
    net = network()
    one, other = net.search_space().sample(2, 1)
    x, found = torch.randn(4, 1, 8, 8), []
    for order in ((one, other), (other, one), (other, other, one)):
        for subnet in order:
            net.activate(subnet)
            recalibrate(net, batches())
            if subnet == one:
                with torch.no_grad():
                    found.append(net.eval()(x))
            net.train()(torch.randn(4, 1, 8, 8) * 50)
            net.eval()
    for logits in found[1:]:
        assert torch.equal(found[0], logits)


def test_layers_that_do_not_run_and_frozen_ones_keep_their_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runs, self.rests, self.frozen = (nn.BatchNorm1d(2) for _ in range(3))

        def train(self, mode: bool = True) -> Net:
            super().train(mode)
            self.frozen.eval()
            return self

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.frozen(self.runs(x))

    net = Net().eval()
    for layer in (net.runs, net.rests, net.frozen):
        layer.running_mean.fill_(7.0)
    assert recalibrate(net, [torch.ones(4, 2)]) == 4
    assert [layer.running_mean[0].item() for layer in (net.runs, net.rests, net.frozen)] == [
        1,
        7,
        7,
    ]
    assert not net.training


@pytest.mark.parametrize(
    ("max_images", "sizes"),
    [(1, [1]), (7, [7]), (8, [8]), (9, [8, 1]), (20, [8, 8, 4]), (24, [8, 8, 8]), (99, [8, 8, 8])],
)
def test_at_most_so_many_images_and_exactly_those(max_images: int, sizes: list[int]) -> None:
    net, seen = nn.BatchNorm2d(1), []
    data = batches()

    def forward(x: torch.Tensor) -> None:
        seen.append(x)
        net(x)

    assert recalibrate(net, data, max_images=max_images, forward=forward) == sum(sizes)
    assert [len(x) for x in seen] == sizes
    for x, batch in zip(seen, data, strict=False):
        assert torch.equal(x, batch[: len(x)])


def test_no_batch_is_drawn_that_is_not_used() -> None:
    drawn = []

    def loader() -> Any:
        for batch in batches(5):
            drawn.append(len(batch))
            yield batch

    assert recalibrate(nn.BatchNorm2d(1), loader(), max_images=16) == 16
    assert drawn == [8, 8]


def test_everything_but_the_statistics_comes_back() -> None:
    net = network()
    net.train()
    net.first.eval()
    net.stages[0][0].project[1].momentum = None
    net.stem[1].momentum = 0.7
    net.classifier.weight.requires_grad_(False)
    flags = {name: module.training for name, module in net.named_modules()}
    layers = batch_norms(net)
    momenta = [layer.momentum for layer in layers]
    assert {None, 0.7, 0.1} <= set(momenta)
    tensors = {n: (t.data_ptr(), id(t)) for n, t in net.state_dict(keep_vars=True).items()}
    parameters = copy.deepcopy(dict(net.named_parameters()))
    state = torch.get_rng_state()
    assert recalibrate(net, batches()) == 24
    assert {name: module.training for name, module in net.named_modules()} == flags
    assert [layer.momentum for layer in layers] == momenta
    assert {n: (t.data_ptr(), id(t)) for n, t in net.state_dict(keep_vars=True).items()} == tensors
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
        assert parameter.requires_grad == parameters[name].requires_grad
        assert parameter.grad is None
    assert torch.equal(torch.get_rng_state(), state)  # dropout was off


def test_only_batch_norm_is_in_training_mode_meanwhile() -> None:
    net = network().train()
    during: set[tuple[bool, bool]] = set()

    def forward(x: torch.Tensor) -> torch.Tensor:
        for module in net.modules():
            during.add((isinstance(module, nn.BatchNorm2d), module.training))
        assert not torch.is_grad_enabled()
        return net(x)

    recalibrate(net, batches(), forward=forward)
    assert during == {(True, True), (False, False)}


def test_flags_and_momenta_come_back_after_a_failure() -> None:
    net = network().train()

    def broken(_: torch.Tensor) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        recalibrate(net, batches(), forward=broken)
    assert all(module.training for module in net.modules())
    assert {layer.momentum for layer in batch_norms(net)} == {0.1}


def test_training_goes_on_after_recalibration_in_inference_mode() -> None:
    net, other = network(), network()
    with torch.inference_mode():
        recalibrate(net, batches())
    recalibrate(other, batches())
    assert_same(statistics(net), statistics(other))
    assert not any(buffer.is_inference() for buffer in net.buffers())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.train()(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert net.stem[1].num_batches_tracked == 4
    with torch.inference_mode():  # batches made there
        inside = batches()
    recalibrate(net, inside)


def test_recalibration_makes_up_for_the_statistics_of_another_subnet() -> None:
    net = network()
    space = net.search_space()
    net.activate(space.largest)
    recalibrate(net, batches())
    net.activate(space.smallest)
    x = batches()[0]
    plain = net.extract(space.smallest).train()
    for layer in batch_norms(plain):
        layer.reset_running_stats()
        layer.momentum = None
    plain.dropout.eval()
    with torch.no_grad():
        for batch in batches():
            plain(batch)
        expected = plain.eval()(x)
        before = net.eval()(x)
        recalibrate(net, batches())
        after = net(x)
    torch.testing.assert_close(after, expected)
    assert (before - expected).abs().max() > 100 * (after - expected).abs().max()


def test_without_batch_norm_nothing_is_run() -> None:
    def never(_: Any) -> None:
        raise AssertionError

    for net in (
        nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
        nn.BatchNorm1d(2, track_running_stats=False),
    ):
        assert batch_norms(net) == []
        assert recalibrate(net, [torch.zeros(2, 2)], forward=never) == 0
        assert recalibrate(net, []) == 0


def test_bad_input() -> None:
    net = nn.BatchNorm2d(1)
    for number in (0, -1):
        with pytest.raises(MeasurementError) as caught:
            recalibrate(net, batches(), max_images=number)
        assert_clear(caught.value, f"max_images={number} must be a whole number from 1")
    with pytest.raises(MeasurementError) as caught:
        recalibrate(net.train(), [])
    assert_clear(caught.value, "There are no batches", "Give inputs of training data")
    assert net.training
    assert net.momentum == 0.1
