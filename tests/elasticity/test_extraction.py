# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin, elastic
from lightning_subnet.elasticity.extraction import extract, own_or_frozen, plain_state
from lightning_subnet.elasticity.layers import (
    ElasticBatchNorm2d,
    ElasticConv2d,
    ElasticLinear,
    ElasticSequential,
)
from lightning_subnet.errors import (
    ElasticityError,
    InvalidSubnetError,
    MeasurementError,
    SearchError,
)
from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3, MobileNetV3
from tests.elasticity.slicing.networks import made
from tests.networks import ElasticMlp, LitMlp

WIDTHS, MOST = (4, 6, 8), 3


def plain_net(width: int, kernel: int, depth: int) -> nn.Module:
    """The tree of OwnLayers with ordinary layers, built freshly."""
    body = [
        nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width) for _ in range(depth)
    ]
    parts = {
        "stem": nn.Conv2d(2, width, 1, bias=False),
        "norm": nn.BatchNorm2d(width),
        "body": nn.Sequential(*body),
        "head": nn.Linear(width, 5),
        "last": nn.Linear(5, 3),
    }
    return nn.ModuleDict(parts)


def run(parts: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    x = parts["body"](parts["norm"](parts["stem"](x)).relu())
    out: torch.Tensor = parts["last"](parts["head"](x.mean((2, 3))).relu())
    return out


class OwnLayers(SubnetMixin, nn.Module):
    """A user's network of this package's layers, with an extraction of its own."""

    def __init__(self) -> None:
        super().__init__()
        w = max(WIDTHS)
        self.parts = nn.ModuleDict(
            {
                "stem": ElasticConv2d(2, w),
                "norm": ElasticBatchNorm2d(w),
                "body": ElasticSequential(
                    *(ElasticConv2d(w, w, [3, 5], groups=w, bias=True) for _ in range(MOST))
                ),
                "head": ElasticLinear(w, 5),
                "last": nn.Linear(5, 3),
            }
        )

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=WIDTHS, kernel=[3, 5], depth=range(1, MOST + 1))

    def activate(self, subnet: Subnet) -> None:
        self.parts["stem"].active_out = subnet["width"]
        self.parts["body"].active_depth = subnet["depth"]
        for layer in self.parts["body"]:
            layer.active_kernel = subnet["kernel"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run(self.parts, x)

    def extract(self, subnet: Subnet) -> nn.Module:
        before = self.active_subnet
        self.activate(subnet)
        net = PlainLayers(subnet)
        state = plain_state(self, torch.zeros(1, 2, 4, 4))
        net.load_state_dict(state, assign=True)
        self.activate(before or self.search_space().largest)
        return net


class PlainLayers(nn.Module):
    def __init__(self, subnet: Subnet) -> None:
        super().__init__()
        self.parts = plain_net(subnet["width"], subnet["kernel"], subnet["depth"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run(self.parts, x)


def own() -> OwnLayers:
    torch.manual_seed(0)
    net = OwnLayers()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
        net.parts["norm"].running_mean.normal_()
        net.parts["norm"].running_var.uniform_(0.5, 2)
    return net.eval()


def test_networks_of_own_layers_are_sliced() -> None:
    net = own()
    x = torch.randn(3, 2, 6, 6)
    for subnet in net.search_space():
        plain = extract(net, subnet)
        assert plain.sliced
        assert not plain.training
        assert not any("Elastic" in type(m).__name__ for m in plain.modules())
        net.activate(subnet)
        with torch.no_grad():
            torch.testing.assert_close(plain(x), net(x), atol=1e-6, rtol=1e-6)
        fresh = PlainLayers(subnet)
        fresh.load_state_dict(plain.state_dict())


def test_the_plain_state_is_a_copy_and_leaves_the_flags() -> None:
    net = own()
    net.train()
    net.parts["last"].eval()
    net.activate(net.search_space().smallest)
    flags = [module.training for module in net.modules()]
    before = copy.deepcopy(net.state_dict())
    state = plain_state(net, torch.randn(2, 2, 4, 4))
    assert [module.training for module in net.modules()] == flags
    for tensor in state.values():
        assert not tensor.requires_grad
        if tensor.is_floating_point():
            tensor.fill_(5)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(net.parts[name]._forward_pre_hooks for name in ("stem", "head"))
    assert state["parts.stem.weight"].shape == (4, 2, 1, 1)
    assert [key for key in state if "body" in key] == ["parts.body.0.weight", "parts.body.0.bias"]


def test_flags_and_hooks_come_back_when_the_pass_fails() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no pass")

    net = own().train()
    handle = net.parts["last"].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no pass"):
        plain_state(net, torch.zeros(2, 2, 4, 4))
    handle.remove()
    assert all(module.training for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_layer_used_twice_must_get_the_same_width(layer: str) -> None:
    class Twice(nn.Module):
        def __init__(self, other: int) -> None:
            super().__init__()
            linear = layer == "linear"
            self.shared = ElasticLinear(8, 4) if linear else ElasticConv2d(8, 4)
            self.other = other

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(x[:, :6]) + self.shared(x[:, : self.other])

    x = torch.zeros(1, 8) if layer == "linear" else torch.zeros(1, 8, 2, 2)
    assert plain_state(Twice(6), x)["shared.weight"].shape[:2] == (4, 6)
    name = "ElasticLinear" if layer == "linear" else "ElasticConv2d"
    net = Twice(3).train()
    with pytest.raises(MeasurementError, match=f"{name} is used with 6 and with 3 channels"):
        plain_state(net, x)
    assert net.shared.training
    assert not net.shared._forward_pre_hooks


class LitMobile(L.LightningModule):
    """Its elastic child is wrapped in what is no part of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ElasticMobileNetV3.tiny(n_classes=3)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_of_a_lightning_module_the_elastic_child_is_extracted() -> None:
    model = LitMobile().eval()
    subnet = model.net.search_space().sample(1, 0)[0]
    plain = extract(model, subnet)
    assert type(plain) is MobileNetV3
    model.net.activate(subnet)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(plain(x), model(x), atol=1e-6, rtol=1e-6)
    with pytest.raises(SearchError, match="no elastic part"):
        extract(nn.Linear(2, 2), subnet)


@pytest.mark.parametrize("kind", ["mixin", "attached", "inside"])
def test_other_networks_are_copied_and_frozen(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "attached":

        class Theirs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.width = nn.Linear(64, 32), 32

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.linear(x, self.first.weight[: self.width], self.first.bias[: self.width])

        space = SearchSpace(width=[4, 8, 16])
        model: nn.Module = elastic(
            Theirs(), space=space, activate=lambda n, s: setattr(n, "width", s["width"])
        )
        part = model
    else:
        model = LitMlp() if kind == "inside" else ElasticMlp()
        part = model.net if kind == "inside" else model
        space = part.search_space()
    one, other = space.sample(2, 1)
    part.activate(one)
    part.train()
    x = torch.randn(5, 64)
    frozen = extract(model, other)
    assert part.active_subnet == one  # what was in force
    assert part.training
    assert part.width == one["width"]
    assert all(p.requires_grad for p in part.parameters())
    assert type(frozen) is type(part)
    assert frozen.sliced is False
    assert not hasattr(part, "sliced")
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    part.eval()
    part.activate(other)
    expected = part(x)
    assert torch.equal(frozen(x), expected)
    with torch.no_grad():  # later changes of the original do not matter
        for parameter in part.parameters():
            parameter.add_(1)
    part.activate(space.largest)
    assert torch.equal(frozen(x), expected)
    frozen.activate(space.largest)
    frozen.activate(one)
    assert part.active_subnet == space.largest


def test_a_frozen_copy_is_made_even_if_nothing_was_in_force() -> None:
    net = ElasticMlp()
    frozen = extract(net, net.search_space().smallest)
    assert (frozen.width, net.width) == (4, 32)
    assert net.active_subnet == net.search_space().largest


def hat_frozen() -> tuple[Any, Any, torch.Tensor]:
    """A network that keeps slices of its weights, and a frozen copy, for want of an example."""
    net, tokens = made("hat")
    smallest = net.search_space().smallest
    frozen = extract(net, smallest)
    assert not frozen.sliced
    assert frozen.unsliced_because.startswith("no example input is known")
    net.activate(smallest)
    return net, frozen, tokens


def agree(net: Any, frozen: Any, tokens: torch.Tensor) -> bool:
    with torch.no_grad():
        net.activate(net.active_subnet)
        return torch.equal(net(tokens), frozen(tokens))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.to(torch.float64),
        lambda net: net.half().float(),
        lambda net: net.bfloat16(),
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: nn.ModuleDict({"net": net}).double(),
    ],
)
def test_slices_that_a_frozen_copy_keeps_follow_its_weights(change: Any) -> None:
    net, frozen, tokens = hat_frozen()
    change(net)
    change(frozen)
    assert frozen.tied.dtype == frozen.embed.weight.dtype == net.embed.weight.dtype
    assert frozen.tied.data_ptr() == frozen.embed.weight.data_ptr()
    assert agree(net, frozen, tokens)


@pytest.mark.parametrize("assign", [False, True])
def test_slices_are_taken_again_after_loading(assign: bool) -> None:
    net, frozen, tokens = hat_frozen()
    state = {name: x + 1 for name, x in net.state_dict().items()}
    frozen.load_state_dict(state, assign=assign)
    nn.ModuleDict({"net": net}).load_state_dict({f"net.{n}": x for n, x in state.items()})
    assert agree(net, frozen, tokens)


def test_a_copy_of_a_frozen_copy_keeps_slices_of_its_own() -> None:
    net, frozen, tokens = hat_frozen()
    frozen.requires_grad_()  # as to_module does
    frozen.activate(frozen.active_subnet)
    for copied in (copy.deepcopy(frozen), copy.deepcopy(copy.deepcopy(frozen))):
        assert agree(net, copied, tokens)
        with torch.no_grad():
            for p in copied.parameters():
                p.zero_()
            assert copied(tokens).count_nonzero() == 0
        copied.double()
        assert copied.tied.dtype == torch.float64
    assert agree(net, frozen, tokens)
    assert copy.deepcopy(nn.ModuleDict({"net": frozen}))["net"].tied.dtype == torch.float32


def test_a_frozen_copy_trains_through_slices_of_each_pass() -> None:
    net, frozen, tokens = hat_frozen()
    frozen.requires_grad_().train()
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = frozen(tokens).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert frozen.layers[0]["fc1"].weight.grad.count_nonzero() > 0
    net.load_state_dict(frozen.state_dict())
    assert agree(net, frozen.eval(), tokens)


def test_a_network_that_keeps_nothing_is_left_alone() -> None:
    net = ElasticMlp()
    frozen = extract(net, net.search_space().smallest)
    assert not frozen._forward_pre_hooks
    assert "_apply" not in vars(frozen)


def test_a_slice_needs_an_example_of_the_part() -> None:
    model = LitMlp()
    smallest = model.net.search_space().smallest
    plain = extract(model, smallest, torch.zeros(1, 64))
    assert plain.sliced
    assert plain.first.weight.shape == (4, 64)
    model.net.example_input_array = torch.zeros(1, 64)
    assert extract(model, smallest, only="example").sliced
    assert own_or_frozen(model, smallest).sliced is False


def test_bad_input() -> None:
    net, example = made("ofa")
    space = net.search_space()
    with pytest.raises(
        ElasticityError, match=r"^only='infer' is not one of 'inference', 'example'"
    ):
        extract(net, space.smallest, example, only="infer")  # type: ignore[arg-type]
    with pytest.raises(ElasticityError, match=r"^OfaNet failed on example_input= with Subnet\("):
        extract(net, space.smallest, torch.zeros(2, 5, 8, 8))
    mobile = ElasticMobileNetV3.tiny()
    with pytest.raises(InvalidSubnetError, match="A subnet is made of values by name, not of 3"):
        extract(mobile, 3)  # type: ignore[arg-type]
    smallest = mobile.search_space().smallest
    plain = extract(mobile, dict(smallest))  # type: ignore[arg-type]
    assert sum(p.numel() for p in plain.parameters()) == sum(
        p.numel() for p in extract(mobile, smallest).parameters()
    )


def test_a_super_network_is_not_its_own_extraction() -> None:
    class Itself(ElasticMlp):
        def extract(self, subnet: Subnet) -> nn.Module:
            return self

    net = Itself()
    with pytest.raises(ElasticityError, match=r"^Itself.extract\(\) returned the super-network"):
        extract(net, net.search_space().smallest)
    assert not hasattr(net, "sliced")


@pytest.mark.parametrize("compute", [
    nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_layer_that_computes_its_weight_is_named(compute: Any) -> None:
    net = ElasticMobileNetV3.tiny(n_classes=3)
    subnet = net.search_space().smallest
    compute(net.classifier)
    with pytest.raises(ElasticityError, match=r"compute their weights, .*'classifier'.* remove_"):
        extract(net, subnet)
    if nn.utils.parametrize.is_parametrized(net.classifier):
        nn.utils.parametrize.remove_parametrizations(net.classifier, "weight")
        assert extract(net, subnet)(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
