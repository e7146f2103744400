# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lightning_subnet import check_elastic, extract, recalibrate
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.elasticity.protocol import Elastic, activated
from lightning_subnet.errors import ElasticityError, SearchError
from lightning_subnet.supernets import skippable_blocks
from tests.problems import assert_clear, data_file


class Block(nn.Module):
    """The basic block of a ResNet, with the zero-padded shortcut of its authors (option A)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.pad = stride, (c_out - c_in) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        x = x[:, :, :: self.stride, :: self.stride]
        return (y + F.pad(x, (0, 0, 0, 0, self.pad, self.pad))).relu()


class ResNet(nn.Module):
    def __init__(self, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        c = width
        for s in (1, 2, 3):
            out = width * 2 ** (s - 1)
            first = Block(c, out, 1 if s == 1 else 2)
            rest = (Block(out, out, 1) for _ in range(blocks - 1))
            setattr(self, f"layer{s}", nn.Sequential(first, *rest))
            c = out
        self.linear = nn.Linear(c, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean(dim=(2, 3)))


BLOCKS = ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]


def network(width: int = 4) -> ResNet:
    torch.manual_seed(0)
    net = ResNet(width=width).eval()
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if "running_var" in name:
                buffer.uniform_(0.5, 1.5)
            elif "running_mean" in name:
                buffer.normal_(0, 0.1)
    return net


def skipped_by_hand(net: ResNet, names: list[str], x: torch.Tensor) -> torch.Tensor:
    x = net.bn1(net.conv1(x)).relu()
    for s in (1, 2, 3):
        for b, block in enumerate(getattr(net, f"layer{s}")):
            x = x if f"layer{s}.{b}" in names else block(x)
    return net.linear(x.mean(dim=(2, 3)))


def test_the_blocks_are_found_and_skipped() -> None:
    plain = network()
    before = copy.deepcopy(plain)
    x = torch.randn(2, 3, 8, 8)
    net = skippable_blocks(plain, x)
    assert net is plain
    assert type(net) is ResNet
    assert isinstance(net, Elastic)
    assert list(net.state_dict()) == list(before.state_dict())
    space = net.search_space()
    assert space.size == 2 ** len(BLOCKS)
    assert space.names == tuple(f"keep.{i}" for i in range(len(BLOCKS)))
    with torch.no_grad():
        assert torch.equal(net(x), before(x))  # nothing is skipped yet
        outputs = []
        for subnet in [space.smallest, space.largest, *space.sample(20, 0)]:
            gone = [name for name, keep in zip(BLOCKS, subnet.values(), strict=True) if not keep]
            net.activate(subnet)
            expected = skipped_by_hand(before, gone, x)
            assert torch.equal(net(x), expected), subnet
            extracted = extract(net, subnet)
            assert torch.equal(extracted(x), expected), subnet
            assert count_macs(extracted, x) == count_macs(net, x)
            kept = [
                k for k in before.state_dict() if not k.startswith(tuple(f"{g}." for g in gone))
            ]
            assert list(extracted.state_dict()) == kept
            outputs.append(expected)
    distinct = {space.smallest, space.largest, *space.sample(20, 0)}
    assert len(torch.cat(outputs).unique(dim=0)) == 2 * len(distinct)  # two images each
    check_elastic(net, x)


def test_an_extraction_is_plain_and_leaves_the_network() -> None:
    net, x = skippable_blocks(network(), torch.zeros(1, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    space = net.search_space()
    one, other = space.sample(2, 1)
    net.activate(one)
    before = net(x)
    plain = extract(net, other)
    assert plain.sliced
    assert type(plain) is ResNet
    for name in ("search_space", "activate", "active_subnet", "extract"):
        assert not hasattr(plain, name), name
    assert sum(type(m) is nn.Identity for m in plain.modules()) == list(other.values()).count(0)
    assert net.active_subnet == one
    assert torch.equal(net(x), before)
    pointers = {t.data_ptr() for t in net.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in plain.state_dict().values()}
    plain.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_a_deep_copy_skips_by_itself() -> None:
    net, x = skippable_blocks(network(), torch.zeros(1, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    space = net.search_space()
    net.activate(space.smallest)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    twin.activate(space.largest)
    assert not torch.equal(twin(x), net(x))
    net.activate(space.largest)
    assert torch.equal(twin(x), net(x))
    assert not any("forward" in vars(m) for m in [*net.modules(), *twin.modules()])


def test_gradients_of_what_is_skipped_do_not_exist() -> None:
    net = skippable_blocks(network(), torch.zeros(1, 3, 8, 8)).train()
    net.activate(net.search_space().smallest)
    net(torch.randn(4, 3, 8, 8)).square().sum().backward()
    for name, p in net.named_parameters():
        assert (p.grad is None) == name.startswith(tuple(f"{b}." for b in BLOCKS)), name


@pytest.mark.parametrize("blocks", [Block, BLOCKS[::-1], ["layer2.1"], "layer2.1"])
def test_blocks_may_be_named(blocks: Any) -> None:
    if blocks is Block:
        with pytest.raises(ElasticityError) as caught:
            skippable_blocks(network(), torch.zeros(1, 3, 8, 8), blocks=Block)
        assert_clear(caught.value, "'layer2.0' of ResNet", "makes (1, 8, 4, 4) of (1, 4, 8, 8)")
        return
    net = skippable_blocks(network(), torch.zeros(1, 3, 8, 8), blocks=blocks)
    expected = BLOCKS if len(blocks) == len(BLOCKS) else ["layer2.1"]
    assert net.search_space().size == 2 ** len(expected)
    subnet = net.search_space().subnet({**net.search_space().largest, "keep.0": 0})
    net.activate(subnet)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x), skipped_by_hand(network(), expected[:1], x))


class Silu(nn.Module):
    """Adds, and ends in something else than a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x + self.layer(x))


class Scales(nn.Module):
    """Keeps the shape, has weights, depends on its input without them, and is no residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.layer(x).sigmoid()


class Twice(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(x))


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), Scales()

    def forward(self, x: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
        return x + factor * self.scale(self.layer(x))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Adds()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, factor=2.0)


def test_only_what_adds_to_its_input_is_found() -> None:
    x = torch.zeros(1, 4)
    net = nn.Sequential(nn.Sequential(Adds(), Scales(), Adds()), nn.Linear(4, 4), Silu(), nn.ReLU())
    skippable_blocks(net, x)
    assert net.search_space().size == 4
    net.activate(net.search_space().smallest)
    assert [name for name, m in net.named_modules() if "forward" in vars(m)] == ["0.0", "0.2"]
    with_silu = skippable_blocks(copy.deepcopy(net), x, blocks=Silu)
    assert with_silu.search_space().names == ("keep.0",)


@pytest.mark.parametrize(
    ("net", "options", "kind", "parts"),
    [
        (3, {}, SearchError, ["got a int, which is not an nn.Module"]),
        (nn.Sequential(nn.Linear(4, 4)), {}, ElasticityError, ["no block that adds", "blocks="]),
        (Twice(Adds()), {}, ElasticityError, ["Twice has no block that adds"]),
        (Twice(Adds()), {"blocks": Adds}, ElasticityError, ["'block' of Twice", "runs 2 times"]),
        (
            nn.Sequential(Adds()),
            {"blocks": Block},
            ElasticityError,
            ["has no Block; it has 'Adds'"],
        ),
        (nn.Sequential(Adds()), {"blocks": ["0.layr"]}, SearchError, ["Did you mean '0.layer'"]),
        (nn.Sequential(nn.Linear(3, 3)), {}, ElasticityError, ["failed on the example input"]),
        (nn.Sequential(nn.LSTM(4, 4)), {"blocks": ["0"]}, ElasticityError, ["gives a tuple"]),
    ],
)
def test_networks_and_blocks_that_cannot_be_skipped(
    net: Any, options: dict[str, Any], kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        skippable_blocks(net, torch.zeros(1, 4), **options)
    assert_clear(caught.value, *parts)
    assert not hasattr(net, "search_space")
    if isinstance(net, nn.Module):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_block_with_a_keyword_argument_is_skipped() -> None:
    torch.manual_seed(0)
    net, x = skippable_blocks(Named(), torch.zeros(1, 4), blocks=Adds), torch.randn(2, 4)
    space = net.search_space()
    whole = net(x)
    net.activate(space.smallest)
    assert torch.equal(net(x), x)
    assert torch.equal(extract(net, space.smallest)(x), x)
    assert not [*extract(net, space.smallest).parameters()]
    assert torch.equal(extract(net, space.largest)(x), whole)
    assert not torch.equal(whole, x)


class TimmBlock(nn.Module):
    """BasicBlock or Bottleneck in the layout of timm 1.0 (`timm/models/resnet.py`).

    Unlike torchvision's it adds in place, may squeeze and excite, and may start from zero.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, inner: int, se: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2, self.drop_block = nn.BatchNorm2d(inner), nn.Identity()
        self.act2, self.aa = nn.ReLU(inplace=True), nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(inner, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.se = Gate(c_out) if se else None
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or c_in != c_out:  # the "d" variants: pool, then convolve
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            conv, norm = nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
            self.downsample = nn.Sequential(pool if stride > 1 else nn.Identity(), conv, norm)
        nn.init.zeros_(self.bn3.weight)  # zero_init_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class Gate(nn.Module):
    """Squeeze and excite as timm does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.bn = nn.Conv2d(channels, 2, 1), nn.Identity()
        self.act, self.fc2 = nn.ReLU(inplace=True), nn.Conv2d(2, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(x.mean((2, 3), keepdim=True))))))


class TimmResNet(nn.Module):
    def __init__(self, se: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for s, (c_in, c_out) in enumerate([(8, 16), (16, 16), (16, 32)], 1):
            first = TimmBlock(c_in, c_out, 1 if s == 1 else 2, 4, se)
            rest = [TimmBlock(c_out, c_out, 1, 4, se) for _ in range(2)]
            setattr(self, f"layer{s}", nn.Sequential(first, *rest))
        self.global_pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.global_pool(x).flatten(1))


@pytest.mark.parametrize("se", [False, True])
def test_residual_networks_in_the_layout_of_timm(se: bool) -> None:
    torch.manual_seed(0)
    plain, x = TimmResNet(se).eval(), torch.randn(4, 3, 32, 32)
    names = [f"layer{s}.{b}" for s in (1, 2, 3) for b in (1, 2)]
    net = skippable_blocks(copy.deepcopy(plain), x[:1])  # even while all of them add zero
    assert net.search_space().size == 2**6
    for one, other in zip(plain.parameters(), net.parameters(), strict=True):
        with torch.no_grad():
            one.add_(0.1 * torch.randn_like(one))
            other.copy_(one)
    for subnet in [net.search_space().largest, *net.search_space().sample(6, 0)]:
        by_hand = copy.deepcopy(plain)
        for name, keep in zip(names, subnet.values(), strict=True):
            stage, number = name.split(".")
            if not keep:
                getattr(by_hand, stage)[int(number)] = nn.Identity()
        net.activate(subnet)
        with torch.no_grad():
            assert torch.equal(net.eval()(x), by_hand(x)), subnet
            assert torch.equal(extract(net, subnet)(x), by_hand(x)), subnet
        net.zero_grad()
        net.train()(x).square().sum().backward()  # nothing in place spoils the gradients
        gone = tuple(
            f"{name}." for name, keep in zip(names, subnet.values(), strict=True) if not keep
        )
        for name, p in net.named_parameters():
            assert (p.grad is None) == (bool(gone) and name.startswith(gone)), name
        for module, original in zip(net.modules(), plain.modules(), strict=True):
            if isinstance(module, nn.BatchNorm2d):  # training moved its statistics
                module.load_state_dict(original.state_dict())


def test_a_lightning_module_is_a_network_too() -> None:
    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    x = torch.randn(2, 3, 8, 8)
    model = skippable_blocks(Lit(), x)
    assert model.search_space().size == 2 ** len(BLOCKS)
    with activated(model, model.search_space().smallest):
        assert torch.equal(model(x), skipped_by_hand(network(), BLOCKS, x))


def test_a_trained_resnet_20_does_without_a_block() -> None:
    """Weights and images of the shared data; 91.73 % on all of the test images."""
    path = data_file("cifar10_resnet/resnet20-12fca82f.th")
    state = torch.load(path, map_location="cpu", weights_only=True)
    with np.load(data_file("cifar10_small.npz")) as data:
        images, classes = data["test_x"][::10], torch.tensor(data["test_y"][::10]).long()
        train = data["train_x"][::100]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])

    def ready(x: np.ndarray) -> torch.Tensor:
        return ((torch.tensor(x) / 255 - mean) / std).permute(0, 3, 1, 2)

    net = ResNet().eval()
    net.load_state_dict({k.removeprefix("module."): v for k, v in state["state_dict"].items()})
    skippable_blocks(net, ready(images[:1]))
    space, x, fixed = net.search_space(), ready(images), ready(train)

    def accuracy(*gone: int) -> float:
        net.activate(space.subnet(keep=[int(i not in gone) for i in range(len(BLOCKS))]))
        recalibrate(net, [fixed])
        with torch.no_grad():
            return (net(x).argmax(1) == classes).float().mean().item()

    with torch.no_grad():
        assert (net(x).argmax(1) == classes).float().mean() > 0.89
    by_block = [accuracy(i) for i in range(len(BLOCKS))]
    assert max(by_block) > 0.75
    assert accuracy(*range(len(BLOCKS))) < 0.3 < min(by_block)


# Hooks


class Steered(Block):
    """A block with a hook that is a method of its own."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__(c_in, c_out, stride)
        self.strength = 0.5
        self.register_forward_hook(self.steer)

    def steer(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + self.strength


class Adapter:
    """A hook that has a state."""

    def __init__(self) -> None:
        self.factor = 1.5

    def __call__(self, _module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.factor + args[0].mean()


def added_output(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 0.5


def added_input(_module: nn.Module, args: Any) -> tuple[torch.Tensor]:
    return (args[0] * 1.25 + 0.5,)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda block: block.register_forward_hook(added_output),
    "input": lambda block: block.register_forward_pre_hook(added_input),
    "by name": lambda block: block.register_forward_hook(
        lambda _m, args, kwargs, output: output + len(args) + len(kwargs), with_kwargs=True
    ),
    "input by name": lambda block: block.register_forward_pre_hook(
        lambda _m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
    ),
    "always": lambda block: block.register_forward_hook(added_output, always_call=True),
    "an object": lambda block: block.register_forward_hook(Adapter()),
    "several": lambda block: [
        block.register_forward_pre_hook(added_input),
        block.register_forward_hook(Adapter()),
        block.register_forward_hook(added_output, prepend=True),
    ],
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
def test_forward_hooks_of_a_skipped_block_go_along(kind: str, when: str) -> None:
    net, x = network(), torch.randn(2, 3, 8, 8)
    plain = network()
    if when == "before":
        HOOKS[kind](net.layer1[1])
    skippable_blocks(net, x)
    assert net.search_space().size == 2 ** len(BLOCKS)
    if when == "after":
        HOOKS[kind](net.layer1[1])
    space = net.search_space()
    with torch.no_grad():
        for subnet in (space.smallest, *space.sample(3, 0), space.largest):
            net.activate(subnet)
            active, extracted = net(x), extract(net, subnet)
            assert torch.equal(extracted(x), active), subnet
            plain_subnet = copy.deepcopy(extracted)
            assert torch.equal(plain_subnet(x), active)
        net.activate(space.smallest)
        assert (net(x) - skipped_by_hand(plain, BLOCKS, x)).abs().max() > 0.01
    small = extract(net, space.smallest)
    assert type(small.layer1[1]) is nn.Identity
    assert not any(True for _ in small.layer1[1].parameters())
    assert not small.layer1[2]._forward_hooks
    extracted_hooks, hooks = small.layer1[1]._forward_hooks, net.layer1[1]._forward_hooks
    assert list(extracted_hooks) == list(hooks)
    if kind == "several":
        check_elastic(net, x)


def reads_the_block(module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * module.conv1.weight.mean()  # type: ignore[union-attr, operator] # of a Block


def asks_for_the_class(module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1 if isinstance(module, Block) else output


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        (reads_the_block, "fails there: AttributeError"),
        (asks_for_the_class, "gives another output there"),
        (None, "fails there: AttributeError"),
    ],
)
def test_a_hook_that_needs_its_block_is_refused(hook: Any, why: str) -> None:
    net, x = network(), torch.randn(2, 3, 8, 8)
    if hook is None:
        net.layer1[1] = Steered(4, 4, 1).eval()
    else:
        net.layer1[1].register_forward_hook(hook)
    skippable_blocks(net, x)
    space = net.search_space()
    assert torch.equal(extract(net, space.largest)(x), net(x))
    with pytest.raises(ElasticityError) as caught:
        extract(net, space.smallest)
    assert_clear(caught.value, "'layer1.1' (", "nn.Identity", why, "use nothing of the block")
    without = space.subnet({**space.smallest, "keep.1": 1})
    net.activate(without)
    assert torch.equal(extract(net, without)(x), net(x))


def test_a_hook_that_fails_outside_of_a_whole_pass_goes_along() -> None:
    net, x, seen = network(), torch.randn(2, 3, 8, 8), []
    net.conv1.register_forward_hook(lambda _m, _args, output: seen.append(output.mean()))

    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + seen.pop()

    skippable_blocks(net, x, blocks=["layer1.1"])
    net.layer1[1].register_forward_hook(hook)
    smallest = net.search_space().smallest
    net.activate(smallest)
    assert torch.equal(extract(net, smallest)(x), net(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "normalise",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    ],
)
def test_what_computes_the_weights_of_a_skipped_block_goes_with_it(normalise: Any) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))),
        torch.rand(1, 3, 4, 4),
    )
    for layer in net:
        normalise(layer)
    net(x).sum().backward()  # the weights belong to a graph now
    skippable_blocks(net.eval(), x, blocks=["0", "2"])
    space = net.search_space()
    for subnet in (space.smallest, *space.sample(2, 0), space.largest):
        net.activate(subnet)
        plain = extract(net, subnet)
        torch.testing.assert_close(plain(x), net(x))
        assert [type(m) is nn.Identity for m in plain] == [
            not subnet["keep.0"], False, not subnet["keep.1"],
        ]  # fmt: skip


def test_hooks_of_what_lies_in_a_skipped_block_do_not_run() -> None:
    net, x, runs = network(), torch.randn(2, 3, 8, 8), []
    net.layer1[1].conv1.register_forward_hook(lambda *_: runs.append(1))
    net.layer1[1].register_full_backward_hook(lambda *_: None)
    skippable_blocks(net, x)
    runs.clear()
    smallest = net.search_space().smallest
    net.activate(smallest)
    assert torch.equal(net(x), extract(net, smallest)(x))
    assert runs == []


# Another forward of the instance


def test_a_forward_of_the_instance_comes_back() -> None:
    """Tools such as accelerate and torch.compile set `forward` on an instance."""
    net, x = network(), torch.randn(2, 3, 8, 8)
    for block in (net.layer1[1], net.layer2[1]):
        block.forward = functools.partial(doubled, block)
    before = net(x)
    skippable_blocks(net, x, blocks=BLOCKS)
    space = net.search_space()
    for subnet in (space.smallest, space.smallest, *space.sample(4, 0)):
        net.activate(subnet)
        assert torch.equal(extract(net, subnet)(x), net(x))
        twin = copy.deepcopy(net)
        assert torch.equal(twin(x), net(x))
        twin.activate(space.largest)
        assert torch.equal(twin(x), before)
    assert torch.equal(extract(net, space.largest)(x), before)
    net.activate(space.largest)
    assert torch.equal(net(x), before)
    assert [n for n, m in net.named_modules() if "forward" in vars(m)] == ["layer1.1", "layer2.1"]
    assert twin.layer1[1].forward.args[0] is twin.layer1[1]


def doubled(block: Block, x: torch.Tensor) -> torch.Tensor:
    return 2 * Block.forward(block, x)


def test_a_forward_that_is_replaced_while_its_block_is_skipped_is_refused() -> None:
    net, x = network(), torch.randn(2, 3, 8, 8)
    skippable_blocks(net, x)
    net.activate(net.search_space().smallest)
    inner = net.layer1[1].forward
    net.layer1[1].forward = lambda x: 2 * inner(x)
    with pytest.raises(ElasticityError) as caught:
        net.activate(net.search_space().largest)
    assert_clear(caught.value, "'layer1.1' of ResNet", "was replaced while", "Activate the largest")
    net.layer1[1].forward = inner
    net.activate(net.search_space().largest)
    assert torch.equal(net(x), network()(x))
