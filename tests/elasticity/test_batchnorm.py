# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import itertools
import warnings
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_subnet.elasticity.batchnorm import (
    Recalibrator,
    batch_norms,
    frozen_statistics,
    n_samples,
    recalibrate,
)
from lightning_subnet.elasticity.layers import ElasticBatchNorm2d
from lightning_subnet.elasticity.statistics import is_renewable
from lightning_subnet.errors import CalibrationWarning, MeasurementError
from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
from tests.problems import assert_clear


def batches(n: int = 3, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 1, 8, 8, generator=generator) * (i + 1) + i for i in range(n)]


def images(sizes: tuple[int, ...] = (8, 8, 12)) -> list[torch.Tensor]:
    """Return batches of three channels."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(n, 3, 4, 4, generator=generator) * (i + 1) + 4 * i + 1
        for i, n in enumerate(sizes)
    ]


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
    [(1, [1]), (7, [7]), (8, [8]), (9, [8]), (20, [8, 8]), (24, [8, 8, 8]), (99, [8, 8, 8])],
)
def test_at_most_so_many_images_in_batches_as_the_loader_gives_them(
    max_images: int, sizes: list[int]
) -> None:
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
    with pytest.warns(CalibrationWarning, match=r"keep their running statistics.*'first\."):
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
    with pytest.raises(MeasurementError) as caught:
        recalibrate(nn.LazyBatchNorm1d(), [torch.ones(4, 2)])
    assert_clear(caught.value, "has statistics without a shape", "Run one forward pass")


# What the statistics are


def direct(data: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of batches (n, c, ...), by NumPy in double precision."""
    arrays = [x.double().numpy() for x in data]
    axes = (0, *range(2, arrays[0].ndim))
    weights = [len(x) for x in arrays]
    means = [x.mean(axes) for x in arrays]
    variances = [x.var(axes, ddof=1) for x in arrays]
    return np.average(means, 0, weights), np.average(variances, 0, weights)


def assert_statistics(layer: Any, mean: np.ndarray, var: np.ndarray, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(layer.running_mean.float().numpy(), mean, rtol, rtol)
    np.testing.assert_allclose(layer.running_var.float().numpy(), var, rtol, rtol)


@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    momentum=st.sampled_from([0.1, 0.5, 0.0, 1.0, None]),
)
@settings(max_examples=25, deadline=None)
def test_each_batch_weighs_by_its_samples(
    sizes: list[int], seed: int, momentum: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = [
        torch.randn(n, 3, 2, 2, generator=generator) * (i + 1) + 5 * i for i, n in enumerate(sizes)
    ]
    layer = nn.BatchNorm2d(3, momentum=momentum)
    assert recalibrate(layer, data) == sum(sizes)
    assert_statistics(layer, *direct(data))
    everything = torch.cat(data).double().numpy()
    np.testing.assert_allclose(layer.running_mean.numpy(), everything.mean((0, 2, 3)), 1e-5, 1e-5)
    assert layer.num_batches_tracked == len(sizes)
    assert layer.momentum == momentum


def test_two_samples_left_over_count_as_two() -> None:
    data = torch.cat([torch.zeros(510, 1), torch.tensor([[99.0], [101.0]])])
    means = []
    for size in (64, 510):
        layer = nn.BatchNorm1d(1)
        assert recalibrate(layer, data.split(size)) == 512
        means.append(layer.running_mean.item())
    assert means == pytest.approx([200 / 512] * 2, rel=1e-5)


def test_a_layer_that_runs_twice_counts_both_runs_alike() -> None:
    layer = nn.BatchNorm2d(3)
    data = images()
    recalibrate(layer, data, forward=lambda x: (layer(x), layer(x + 6)))
    mean, _ = direct(data)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean + 3, rtol=1e-5)
    assert layer.num_batches_tracked == 2 * len(data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_single_precision(dtype: torch.dtype) -> None:
    layer = nn.BatchNorm2d(3).to(dtype)
    data = [x.to(dtype) for x in images()] * 40
    recalibrate(layer, data)
    assert_statistics(layer, *direct(data), rtol=2 * torch.finfo(dtype).eps)


def test_the_memory_format_does_not_matter() -> None:
    layer = nn.BatchNorm2d(3)
    recalibrate(layer, [x.to(memory_format=torch.channels_last) for x in images()])
    assert_statistics(layer, *direct(images()))


def test_channels_that_the_subnet_has_not_are_as_reset() -> None:
    layer = ElasticBatchNorm2d(5)
    with torch.no_grad():
        layer.running_mean.fill_(7)
        layer.running_var.fill_(7)
    recalibrate(layer, images())
    mean, var = direct(images())
    assert_statistics(layer, np.append(mean, [0, 0]), np.append(var, [1, 1]))


def test_batches_in_structures() -> None:
    class Batch(UserDict[str, Any]):
        """As the tokenizers of transformers give them; torch does not look into it."""

    data = images()
    for batch in ({"x": data[0], "y": 1}, (1, data[0]), Batch(x=data[0]), [data[0].numpy()]):
        assert n_samples(batch) == len(data[0])
    assert n_samples({"a": 1}) == n_samples(torch.tensor(1.0)) == 1
    layer = nn.BatchNorm2d(3)
    batches_ = [Batch(x=x) for x in data]
    run = {"forward": lambda batch: layer(batch["x"])}
    assert recalibrate(layer, batches_, max_images=9, **run) == 16  # they stay whole
    assert recalibrate(layer, batches_, max_images=1, **run) == 8
    assert recalibrate(layer, batches_, **run) == sum(map(len, data))
    assert_statistics(layer, *direct(data))


# Batches too small


def test_a_rest_of_one_sample_is_left_out() -> None:
    layer = nn.BatchNorm1d(3)
    data = torch.randn(512, 3)
    assert recalibrate(layer, data.split(7), max_images=512) == 511  # 73 batches, and one sample
    assert_statistics(layer, *direct([*data.split(7)][:-1]))
    assert recalibrate(layer, torch.cat([data, data]).split(7), max_images=512) == 511
    assert recalibrate(layer, torch.cat([data, data]).split(73), max_images=512) == 511


def test_one_value_per_channel_is_refused() -> None:
    layer = nn.BatchNorm1d(3)
    before = statistics(layer)
    for data in ([torch.ones(1, 3)] * 3, [torch.ones(8, 3)]):
        with pytest.raises(MeasurementError) as caught:
            recalibrate(layer, data, max_images=1)
        assert_clear(caught.value, "one value per channel", "two samples or more")
        assert_same(statistics(layer), before)
    assert recalibrate(nn.BatchNorm2d(1), [torch.ones(1, 1, 2, 2)] * 3) == 3  # it has four values


# Layers of any style


class PassesOn(nn.BatchNorm2d):
    """Passes its momentum on, which must be a number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum + 0.0,
            self.eps,
        )


class Fixed(nn.BatchNorm2d):
    """Has a momentum of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            0.01,
            self.eps,
            False,
        )


class Universal(nn.Module):
    """Uses its own flag with the buffers of a layer that it holds, and drops values as well."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.ModuleList([nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(8, affine=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bn, c = self.bn[0], x.shape[1]
        x = F.dropout(x, 0.9, self.training)
        mean, var = bn.running_mean[:c], bn.running_var[:c]
        return F.batch_norm(x, mean, var, None, None, self.training, 0.1)


class TrainingOnly(nn.Module):
    """Cannot run in eval mode, and moves no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            raise ValueError("only in training")
        bn, c = self.bn, x.shape[1]
        return F.batch_norm(
            x, bn.running_mean[:c], bn.running_var[:c], bn.weight[:c], bn.bias[:c], True, 0.0
        )


class Folded(nn.Module):
    """Normalises by torch's function in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Module()
        self.held.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bn = self.held.bn
        if self.training:
            return F.batch_norm(x, bn.running_mean, bn.running_var, training=True)
        return (x - bn.running_mean[:, None, None]) / bn.running_var[:, None, None].sqrt()


class Parts(nn.BatchNorm2d):
    """Normalises its channels in two parts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [
            F.batch_norm(x[:, c], self.running_mean[c], self.running_var[c], training=self.training)
            for c in (slice(0, 1), slice(1, 3))
        ]
        return torch.cat(parts, 1)


class Demanding(nn.Module):
    """Needs targets in training mode, and has a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor, y: Any = None) -> torch.Tensor:
        if self.training and y is None:
            raise ValueError("no targets")
        return self.bn(x * self.scale)


class ByHand(nn.Module):
    """Averages by arithmetic, in buffers that it holds or that a layer of torch's holds."""

    def __init__(self, mean: str, var: str, holds: bool = False) -> None:
        super().__init__()
        if holds:
            self.bn = nn.BatchNorm2d(3)
        else:
            self.register_buffer(mean, torch.zeros(3))
            self.register_buffer(var, torch.ones(3))
            self.register_buffer("eps", torch.full((1,), 1e-5))  # a constant
            self.register_buffer("steps", torch.tensor(0.0))
        self.names = (mean, var)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        owner = self.bn if hasattr(self, "bn") else self
        mean, var = (getattr(owner, name) for name in self.names)
        if self.training:
            batch = x.mean((0, 2, 3)), x.var((0, 2, 3))
            setattr(owner, self.names[0], 0.9 * mean + 0.1 * batch[0])  # another tensor
            var.lerp_(batch[1], 0.1)
            mean, var = batch
            if owner is self:
                self.steps += 1
        return (x - mean[:, None, None]) / var[:, None, None].sqrt()


def renewed(net: nn.Module, width: int = 3) -> Any:
    """Return an object with the statistics of the one layer of a network that moves."""
    mean, var = [b for _, b in net.named_buffers() if b.ndim and b.numel() > 1][:2]
    return SimpleNamespace(running_mean=mean[:width], running_var=var[:width])


STYLES: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.BatchNorm2d(3),
    "own": lambda: ElasticBatchNorm2d(3),
    "passes on": lambda: PassesOn(3),
    "fixed": lambda: Fixed(3),
    "zero": lambda: nn.BatchNorm2d(3, momentum=0.0),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "sync": lambda: nn.SyncBatchNorm(3),
    "universal": Universal,
    "training only": TrainingOnly,
    "folded": Folded,
    "in parts": lambda: Parts(3),
    "demanding": Demanding,
    "by hand": lambda: ByHand("running_mean", "running_var"),
    "names of its own": lambda: ByHand("mu", "sigma2"),
    "held, by hand": lambda: ByHand("running_mean", "running_var", holds=True),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))),
}


@pytest.mark.parametrize("style", STYLES)
def test_statistics_are_the_same_for_all_styles(style: str) -> None:
    net = STYLES[style]().train()
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.numel() > 1:
                buffer.fill_(9.0)
    state, buffers = torch.get_rng_state(), {n: id(b) for n, b in net.named_buffers()}
    renew = Recalibrator(net)
    for data in (images(), images()[::-1]):  # the second time the layers are known
        assert renew(data) == sum(map(len, data))
        assert_statistics(renewed(net), *direct(data))
    assert torch.equal(torch.get_rng_state(), state)  # dropout was off
    if style != "scripted":  # its buffers are other objects at each look
        assert {n: id(b) for n, b in net.named_buffers()} == buffers
    assert all(module.training for module in net.modules())


def test_a_known_holder_costs_no_more_passes() -> None:
    net, count = Universal(), itertools.count()

    def forward(x: torch.Tensor) -> None:
        next(count)
        net(x)

    renew = Recalibrator(net)
    renew(images(), forward=forward)
    before = next(count)
    renew(images(), forward=forward)
    assert next(count) - before - 1 == len(images())


def test_instance_norm_averages_over_instances() -> None:
    layer = nn.InstanceNorm2d(3, track_running_stats=True).eval()
    data = images()
    assert recalibrate(layer, data) == sum(map(len, data))
    each = torch.cat(data)
    expected = each.mean((2, 3)).mean(0), each.var((2, 3)).mean(0)
    assert_statistics(layer, *(x.numpy() for x in expected))


def test_layers_in_compiled_parts_are_renewed() -> None:
    layer = nn.BatchNorm2d(3)
    recalibrate(torch.compile(layer, backend="eager"), images())
    assert_statistics(layer, *direct(images()))


def test_in_inference_mode_no_buffer_is_replaced() -> None:
    for style in ("universal", "by hand", "held, by hand"):
        net = STYLES[style]()
        with torch.inference_mode():
            recalibrate(net, images())
        assert not any(buffer.is_inference() for buffer in net.buffers())
        assert_statistics(renewed(net), *direct(images()))


class Batches(nn.Module):
    """Adds its batches up instead of averaging them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_sum", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.running_sum += x.sum((0, 2, 3))
        return x + self.running_sum[:, None, None] * 0.0


def test_what_is_no_running_average_is_named_once_and_left_alone() -> None:
    net = nn.Sequential(Batches(), nn.BatchNorm2d(3))
    renew = Recalibrator(net)
    with pytest.warns(CalibrationWarning) as caught:
        assert [renew(images()), renew(images())] == [28, 28]
    assert len(caught) == 1
    assert_clear(
        caught[0].message, "those of '0'", "They stay as they are", 'warnings.simplefilter("ignore"'
    )
    assert net[0].running_sum.tolist() == [0, 0, 0]
    assert_statistics(net[1], *direct(images()))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's: buffers that nothing moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.full((3,), 5.0))
        self.register_buffer("running_var", torch.full((3,), 5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.running_mean[:, None, None]) / self.running_var[:, None, None].sqrt()


class FrozenByCode(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class Centred(nn.Module):
    """Has constants, and drops values in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x - self.mean, 0.5, self.training)


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, lambda: FrozenByCode(3), Centred])
def test_constants_are_left_alone_without_a_word(kind: Any) -> None:
    layer = kind()
    before, state = statistics(layer), torch.get_rng_state()
    recalibrate(layer, images())
    net = nn.Sequential(layer, nn.BatchNorm2d(3))
    assert recalibrate(net, images()) == 28
    assert_same(statistics(layer), before)
    with torch.no_grad():
        assert_statistics(net[1], *direct([layer.eval()(x) for x in images()]))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_layer_that_ran_is_an_error_that_names_them() -> None:
    net = nn.ModuleDict({"one": nn.BatchNorm1d(3), "two": nn.BatchNorm1d(3)}).train()
    before = statistics(net)
    with pytest.raises(MeasurementError) as caught:
        recalibrate(net, [torch.ones(4, 3)], forward=lambda x: x)
    assert_clear(
        caught.value, "No layer with running statistics ran", "'one', 'two'", "Give a forward="
    )
    assert_same(statistics(net), before)
    assert all(module.training for module in net.modules())
    renew = Recalibrator(net)
    renew(images(), forward=lambda x: net["one"](x[:, :, 0, 0]))
    before = statistics(net)
    assert renew(images(), forward=lambda x: x) == 28  # a subnet without them
    assert_same(statistics(net), before)


def test_after_a_failure_all_statistics_are_as_before() -> None:
    for style in ("torch", "passes on", "fixed"):
        layer = STYLES[style]()
        net = nn.Sequential(layer, nn.BatchNorm2d(3)).train()
        recalibrate(net, images())
        before = statistics(net)
        with pytest.raises(RuntimeError, match="contain 9 elements"):
            recalibrate(net, [*images(), torch.ones(4, 9, 2, 2)])
        assert_same(statistics(net), before)
        assert all(module.training for module in net.modules())


def test_which_modules_need_data() -> None:
    needs = [*(kind() for kind in STYLES.values()), nn.InstanceNorm2d(3, track_running_stats=True)]
    needs.remove(next(x for x in needs if getattr(x, "names", None) == ("mu", "sigma2")))
    for net in needs:
        assert is_renewable(net)
    for net in (nn.InstanceNorm2d(3), nn.LayerNorm(3), FrozenBatchNorm2d(), Centred()):
        assert not is_renewable(net)
    layer = nn.BatchNorm2d(3)
    layer.track_running_stats = False
    assert not is_renewable(layer)


# Frozen layers


def frozen_by_lightning(layer: nn.Module) -> None:
    BaseFinetuning.freeze(layer, train_bn=False)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, ElasticBatchNorm2d])
def test_a_layer_frozen_by_lightning_normalises_by_its_statistics(kind: Any) -> None:
    net = nn.Sequential(kind(3), nn.BatchNorm2d(3))
    recalibrate(net[0], [10 * images()[0] + 3])
    frozen_by_lightning(net[0])
    before = statistics(net[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is clear
        recalibrate(net.train(), images())
    assert_same(statistics(net[0]), before)
    with torch.no_grad():
        assert_statistics(net[1], *direct([net[0].eval()(x) for x in images()]))


def test_a_frozen_elastic_layer_behaves_as_torchs_and_is_extracted_frozen() -> None:
    layer, plain = ElasticBatchNorm2d(3).train(), nn.BatchNorm2d(3).train()
    layer.track_running_stats = plain.track_running_stats = False
    torch.testing.assert_close(layer(images()[0]), plain(images()[0]))
    for each in (layer, plain):
        assert each.running_mean.tolist() == [0, 0, 0]
    assert layer.plain(3).track_running_stats is False


def test_a_layer_in_eval_mode_among_others_in_training_mode_is_frozen_and_named() -> None:
    net = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(3)]).train()
    net[0].eval()
    net[2].eval()  # as a teacher that does not run
    with pytest.warns(CalibrationWarning) as caught:
        recalibrate(net, images(), forward=lambda x: net[1](net[0](x)))
    assert len(caught) == 1
    assert_clear(
        caught[0].message, "as frozen ones do: '0'.", "call train()", "track_running_stats"
    )
    assert net[0].running_mean.tolist() == [0, 0, 0]
    assert_statistics(net[1], *direct([x / (1 + 1e-5) ** 0.5 for x in images()]))
    renew = Recalibrator(net)
    net.eval()  # as in a validation
    with pytest.warns(CalibrationWarning, match="as frozen ones do: '0'"):
        renew(images(), forward=lambda x: net[1](net[0](x)))
    assert net[0].running_mean.tolist() == [0, 0, 0]


def test_layers_that_are_set_apart_are_frozen_and_named_also_where_no_other_is_renewed() -> None:
    one = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    one[0].eval()
    backbone = nn.Sequential(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)).eval(), nn.ReLU()))
    for net, layer, name in ((one, one[0], "0"), (backbone, backbone[0][0][0], "0.0.0")):
        with pytest.warns(CalibrationWarning, match=f"as frozen ones do: '{name}'"):
            assert recalibrate(net, images()) == 0
        assert layer.running_mean.tolist() == [0, 0, 0]


def test_a_network_wholly_in_eval_mode_says_nothing_about_its_layers() -> None:
    outer = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)).eval()).train(False)
    outer.training = True  # as a LightningModule around a network that was loaded
    recalibrate(outer, images())
    assert_statistics(outer[0][0], *direct(images()))


def test_weights_that_are_not_trained_are_named_and_statistics_renewed() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    net[0].requires_grad_(False)
    with pytest.warns(CalibrationWarning) as caught:
        recalibrate(net, images())
    assert len(caught) == 1
    assert_clear(
        caught[0].message, "would move them: '0'.", "requires_grad=False", "track_running_stats"
    )
    assert_statistics(net[0], *direct(images()))


def test_a_train_method_that_freezes_needs_no_warning() -> None:
    class Net(nn.Sequential):
        def train(self, mode: bool = True) -> Net:
            super().train(mode)
            self[0].eval()
            return self

    net = Net(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recalibrate(net, images())
    assert net[0].running_mean.tolist() == [0, 0, 0]


def test_a_subnet_of_its_own_is_renewed_in_the_stead_of_the_module() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).train()
    net[0].eval()
    renew = Recalibrator(net)
    for _ in range(2):
        plain = copy.deepcopy(net).eval()
        with warnings.catch_warnings(record=True):
            renew(images(), module=plain)
        assert plain[0].running_mean.tolist() == [0, 0, 0]
        assert plain[1].num_batches_tracked == len(images())
    assert net[1].num_batches_tracked == 0


def test_frozen_statistics_of_any_style_stay() -> None:
    for style, kind in STYLES.items():
        if style in ("names of its own", "demanding"):  # no statistics by name; fails in training
            continue
        net = kind().train()
        before = statistics(net)
        with frozen_statistics(net):
            x = images()[0].requires_grad_()
            net(x).sum().backward()
        assert_same(statistics(net), before)


def test_batches_that_are_none_say_what_to_write() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    pairs = [(torch.randn(4, 3), torch.zeros(4))]
    with pytest.raises(MeasurementError, match=r"Write recalibrate\(module, \[tensor\]\)"):
        recalibrate(net, torch.randn(4, 3))
    with pytest.raises(
        MeasurementError, match=r"is a tuple: .*forward=lambda batch: module\(batch"
    ):
        recalibrate(net, pairs)
    assert recalibrate(net, pairs, forward=lambda batch: net(batch[0])) == 4
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # torch says it best
        recalibrate(net, [torch.randn(4, 5)])


class Noisy(nn.Module):
    """Draws in every mode; the running average of its own is learnt of in further passes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("running_mean", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.randn(x.shape)
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.norm(x - self.running_mean)


def test_what_a_network_draws_is_the_same_in_every_renewal() -> None:
    net = Noisy()
    renew, data = Recalibrator(net), [torch.zeros(8, 2), torch.ones(8, 2)]
    state = torch.get_rng_state()
    states = []
    for _ in range(2):
        renew(data)
        states.append({k: v.clone() for k, v in net.state_dict().items()})
        torch.randn(3)
    first, second = states
    assert all(torch.equal(second[k], v) for k, v in first.items())
    assert (first["running_mean"] - 0.5).abs().max() > 1e-3  # it draws
    torch.set_rng_state(state)
    renew(data)
    assert torch.equal(torch.get_rng_state(), state)
