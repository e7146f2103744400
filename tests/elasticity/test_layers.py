# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from lightning_subnet.elasticity.layers import (
    ElasticBatchNorm2d,
    ElasticConv2d,
    ElasticLayer,
    ElasticLinear,
    ElasticSequential,
)
from lightning_subnet.errors import InvalidSubnetError, SpaceError

few = settings(max_examples=25, deadline=None)


def random_weights(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)


def assert_only_gradients(grad: torch.Tensor, inside: tuple[Any, ...], want: torch.Tensor) -> None:
    """The gradient is `want` inside the slice, and exactly zero everywhere else."""
    expected = torch.zeros_like(grad)
    expected[inside] = want
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)
    outside = torch.ones_like(grad, dtype=torch.bool)
    outside[inside] = False
    assert torch.equal(grad[outside], torch.zeros_like(grad[outside]))


@few
@given(n_in=st.integers(1, 7), n_out=st.integers(1, 5), bias=st.booleans(), seed=st.integers(0, 99))
def test_linear_is_a_linear_layer_with_sliced_weights(
    n_in: int, n_out: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, x = ElasticLinear(7, 5, bias=bias), torch.randn(2, 3, n_in)
    layer.active_out = n_out
    by_hand = nn.Linear(n_in, n_out, bias=bias)
    with torch.no_grad():
        by_hand.weight.copy_(layer.weight[:n_out, :n_in])
        if bias:
            by_hand.bias.copy_(layer.bias[:n_out])
    assert torch.equal(layer(x), by_hand(x))
    assert torch.equal(layer.plain(n_in)(x), layer(x))
    y = torch.randn(2, 3, n_out)
    F.mse_loss(layer(x), y).backward()
    F.mse_loss(by_hand(x), y).backward()
    inside = (slice(n_out), slice(n_in))
    assert_only_gradients(layer.weight.grad, inside, by_hand.weight.grad)
    if bias:
        assert_only_gradients(layer.bias.grad, inside[:1], by_hand.bias.grad)


@few
@given(
    n_in=st.integers(1, 6), n_out=st.integers(1, 5), kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]), bias=st.booleans(),
)  # fmt: skip
def test_a_convolution_without_transform_is_the_centre_of_sliced_weights(
    n_in: int, n_out: int, kernel: int, stride: int, bias: bool
) -> None:
    torch.manual_seed(n_in * 100 + n_out)
    layer = ElasticConv2d(6, 5, [1, 3, 5], stride=stride, bias=bias, kernel_transform=False)
    assert not list(layer.transforms.parameters())
    layer.active_out, layer.active_kernel = n_out, kernel
    x = torch.randn(2, n_in, 8, 7)
    by_hand = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=bias)
    at = 2 - kernel // 2
    inside = (slice(n_out), slice(n_in), slice(at, at + kernel), slice(at, at + kernel))
    with torch.no_grad():
        by_hand.weight.copy_(layer.weight[inside])
        if bias:
            by_hand.bias.copy_(layer.bias[:n_out])
    torch.testing.assert_close(layer(x), by_hand(x))
    assert torch.equal(layer.plain(n_in)(x), layer(x))
    layer(x).square().sum().backward()
    by_hand(x).square().sum().backward()
    assert_only_gradients(layer.weight.grad, inside, by_hand.weight.grad)


def centre(weight: torch.Tensor, kernel: int) -> torch.Tensor:
    edge = (weight.shape[-1] - kernel) // 2
    end = weight.shape[-1] - edge
    return weight[:, :, edge:end, edge:end]


@pytest.mark.parametrize("depthwise", [False, True])
def test_the_kernel_transformation_is_a_centre_crop_and_a_matrix_product_each_time(
    depthwise: bool,
) -> None:
    torch.manual_seed(0)
    layer = ElasticConv2d(4, 4, [7, 3, 5], groups=4 if depthwise else 1)
    assert layer.kernel_sizes == (3, 5, 7)
    assert {n: tuple(p.shape) for n, p in layer.transforms.items()} == {
        "5to3": (9, 9),
        "7to5": (25, 25),
    }
    for matrix in layer.transforms.values():
        assert torch.equal(matrix, torch.eye(len(matrix)))
    x = torch.randn(2, 4, 9, 9)
    groups = 4 if depthwise else 1
    layer.active_kernel = 3  # as they are at first: nothing but the crop
    torch.testing.assert_close(
        layer(x), F.conv2d(x, centre(layer.weight, 3), padding=1, groups=groups)
    )
    random_weights(layer)
    shape = layer.weight.shape[:2]
    crop, matrix = centre(layer.weight, 5).reshape(*shape, 25), layer.transforms["7to5"]
    five = torch.einsum("oij,kj->oik", crop, matrix).reshape(*shape, 5, 5)
    crop, matrix = centre(five, 3).reshape(*shape, 9), layer.transforms["5to3"]
    three = torch.einsum("oij,kj->oik", crop, matrix).reshape(*shape, 3, 3)
    for kernel, weight in ((7, layer.weight), (5, five), (3, three)):
        layer.active_kernel = kernel
        expected = F.conv2d(x, weight, padding=kernel // 2, groups=groups)
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(layer.plain(4)(x), layer(x))


def test_gradients_flow_through_the_transformations_in_use_alone() -> None:
    layer = ElasticConv2d(2, 2, [3, 5, 7], groups=2)
    random_weights(layer)
    x = torch.randn(1, 2, 7, 7)
    for kernel, used in ((7, set()), (5, {"7to5"}), (3, {"7to5", "5to3"})):
        layer.zero_grad(set_to_none=True)
        layer.active_kernel = kernel
        layer(x).square().sum().backward()
        assert {n for n, p in layer.transforms.items() if p.grad is not None} == used
        assert all(layer.transforms[n].grad.abs().sum() > 0 for n in used)
        outside = torch.ones_like(layer.weight, dtype=torch.bool)
        # 3 is cut from the transformed 5, which mixes all of the 5 x 5 centre
        edge = 0 if kernel == 7 else 1
        outside[:, :, edge : 7 - edge, edge : 7 - edge] = False
        assert layer.weight.grad[outside].abs().sum() == 0
        assert (layer.weight.grad[~outside] != 0).all()


@few
@given(active=st.integers(1, 4), multiplier=st.sampled_from([1, 2]), unit=st.sampled_from([1, 3]))
def test_whole_groups_follow_the_input(active: int, multiplier: int, unit: int) -> None:
    layer = ElasticConv2d(4 * unit, 4 * unit * multiplier, 3, groups=4, bias=True)
    x = torch.randn(2, active * unit, 5, 5)
    out = active * unit * multiplier
    expected = F.conv2d(x, layer.weight[:out], layer.bias[:out], padding=1, groups=active)
    assert torch.equal(layer(x), expected)
    plain = layer.plain(active * unit)
    assert (plain.groups, plain.in_channels, plain.out_channels) == (active, active * unit, out)
    assert torch.equal(plain(x), expected)
    layer(x).square().sum().backward()
    assert layer.weight.grad[out:].abs().sum() == 0
    assert layer.weight.grad[:out].abs().sum() > 0


def test_weights_are_views_and_nothing_is_copied() -> None:
    linear, conv = ElasticLinear(6, 6), ElasticConv2d(6, 6, [3, 5], kernel_transform=False)
    linear.active_out, conv.active_out, conv.active_kernel = 2, 3, 3
    weight, bias = linear.active_weights(4)
    assert weight.data_ptr() == linear.weight.data_ptr()
    assert bias.data_ptr() == linear.bias.data_ptr()
    kernel, _, _ = conv.active_weights(4)
    assert kernel.untyped_storage().data_ptr() == conv.weight.untyped_storage().data_ptr()
    assert kernel.data_ptr() == conv.weight[0, 0, 1, 1].data_ptr()
    x = torch.ones(1, 4)
    before = linear(x)
    with torch.no_grad():
        linear.weight[:2, :4] += 1
    torch.testing.assert_close(linear(x), before + 4)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_batch_norm_is_a_batch_norm_over_slices(momentum: float | None) -> None:
    torch.manual_seed(0)
    layer = ElasticBatchNorm2d(6, eps=1e-3, momentum=momentum)
    random_weights(layer)
    by_hand = nn.BatchNorm2d(4, eps=1e-3, momentum=momentum)
    with torch.no_grad():
        by_hand.weight.copy_(layer.weight[:4])
        by_hand.bias.copy_(layer.bias[:4])
    for _ in range(3):
        x = torch.randn(5, 4, 3, 3) * 2 + 1
        torch.testing.assert_close(layer(x), by_hand(x))
    torch.testing.assert_close(layer.running_mean[:4], by_hand.running_mean)
    torch.testing.assert_close(layer.running_var[:4], by_hand.running_var)
    assert torch.equal(layer.running_mean[4:], torch.zeros(2))
    assert torch.equal(layer.running_var[4:], torch.ones(2))
    assert layer.num_batches_tracked == by_hand.num_batches_tracked == 3
    layer.eval()
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(layer(x), by_hand.eval()(x))
    assert layer.num_batches_tracked == 3
    assert torch.equal(layer.plain(4).eval()(x), layer(x))
    plain = layer.plain(4)
    assert (plain.eps, plain.momentum, int(plain.num_batches_tracked)) == (1e-3, momentum, 3)
    layer.train()(x).square().sum().backward()
    by_hand.train()(x).square().sum().backward()
    assert_only_gradients(layer.weight.grad, (slice(4),), by_hand.weight.grad)
    assert_only_gradients(layer.bias.grad, (slice(4),), by_hand.bias.grad)


def test_a_sequence_runs_its_first_modules() -> None:
    stage = ElasticSequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    assert torch.equal(stage(x), stage[2](stage[1](stage[0](x))))
    stage.active_depth = 2
    assert torch.equal(stage(x), stage[1](stage[0](x)))
    assert stage.active == [stage[0], stage[1]]
    stage(x).sum().backward()
    assert stage[2].weight.grad is None
    for depth in (0, 4):
        stage.active_depth = depth
        with pytest.raises(InvalidSubnetError, match=rf"active_depth={depth} is not in 1\.\.3"):
            stage(x)


def layers() -> list[tuple[ElasticLayer, int, tuple[int, ...], type[nn.Module]]]:
    torch.manual_seed(0)
    conv = ElasticConv2d(6, 6, [3, 5, 7], groups=6, stride=2)
    conv.active_kernel = 3
    dense = ElasticConv2d(6, 6, bias=True)
    linear, norm = ElasticLinear(6, 6), ElasticBatchNorm2d(6)
    linear.active_out, dense.active_out = 5, 5
    for layer in (conv, dense, linear, norm):
        random_weights(layer)
    image = (2, 4, 8, 8)
    return [
        (conv, 4, image, nn.Conv2d),
        (dense, 4, image, nn.Conv2d),
        (linear, 4, (2, 4), nn.Linear),
        (norm, 4, image, nn.BatchNorm2d),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("i", range(4))
def test_plain_is_an_ordinary_layer_with_a_copy_in_the_same_type(i: int, dtype: Any) -> None:
    layer, n_in, shape, kind = layers()[i]
    layer = layer.to(dtype).eval()
    plain = layer.plain(n_in).eval()
    assert type(plain) is kind
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert not any(p.is_meta for p in plain.state_dict().values())
    assert set(plain.state_dict()) <= set(layer.state_dict())
    assert "Elastic" not in repr(plain)
    x = torch.randn(shape, dtype=dtype)
    before = layer(x)
    assert torch.equal(plain(x), before)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert torch.equal(plain(x), before)


@pytest.mark.parametrize("i", range(4))
def test_plain_keeps_what_is_frozen(i: int) -> None:
    layer, n_in, shape, _ = layers()[i]
    assert all(p.requires_grad for p in layer.plain(n_in).parameters())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == "bias")
    assert {n: p.requires_grad for n, p in layer.plain(n_in).named_parameters()} == {
        n: n == "bias" for n, _ in layer.plain(n_in).named_parameters()
    }
    assert layer.plain(n_in)(torch.randn(shape)) is not None
    plain = layer.plain(n_in)
    assert all(p.is_leaf for p in plain.parameters())


def test_linear_without_a_bias_stays_so() -> None:
    assert ElasticLinear(3, 3, bias=False).plain(2).bias is None
    assert ElasticConv2d(3, 3).plain(2).bias is None


def test_what_a_layer_cannot_take_is_said_with_the_number() -> None:
    for sizes in (4, [3, 4], [3, 3], [], [-1]):
        with pytest.raises(SpaceError, match="must be odd sizes, each once"):
            ElasticConv2d(4, 4, sizes)
    conv = ElasticConv2d(4, 4, [3, 5])
    conv.active_kernel = 7
    with pytest.raises(InvalidSubnetError, match=r"active_kernel=7 is not one of \[3, 5\]"):
        conv(torch.zeros(1, 4, 5, 5))
    conv.active_kernel, conv.active_out = 3, 5
    with pytest.raises(InvalidSubnetError, match=r"active_out=5 is not in 1\.\.4"):
        conv(torch.zeros(1, 4, 5, 5))
    conv.active_out = 4
    with pytest.raises(InvalidSubnetError, match=r"input channels=5 is not in 1\.\.4"):
        conv(torch.zeros(1, 5, 5, 5))
    grouped = ElasticConv2d(6, 6, 3, groups=3)
    with pytest.raises(InvalidSubnetError, match="3 input channels are not whole groups of 2"):
        grouped(torch.zeros(1, 3, 5, 5))
    linear = ElasticLinear(4, 4)
    with pytest.raises(InvalidSubnetError, match=r"input features=5 is not in 1\.\.4"):
        linear(torch.zeros(1, 5))
    linear.active_out = 0
    with pytest.raises(InvalidSubnetError, match=r"active_out=0 is not in 1\.\.4"):
        linear.plain(4)
    with pytest.raises(InvalidSubnetError, match=r"input channels=5 is not in 1\.\.4"):
        ElasticBatchNorm2d(4)(torch.zeros(1, 5, 1, 1))
    with pytest.raises(InvalidSubnetError, match=r"input channels=5 is not in 1\.\.4"):
        ElasticBatchNorm2d(4).plain(5)
