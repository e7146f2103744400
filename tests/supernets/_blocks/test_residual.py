# SPDX-License-Identifier: Apache-2.0
"""Which modules of a network are its blocks: small networks in the style of known ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from lightning_subnet import extract
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.errors import ElasticityError, ElasticityWarning, MeasurementError
from lightning_subnet.supernets import skippable_blocks
from tests.problems import assert_clear

X = torch.linspace(-2, 2, 2 * 8 * 4 * 4).reshape(2, 8, 4, 4)
TOKENS = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8)


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2, section 3): it adds to its input too."""

    def __init__(self, channels: int, dims: int = 1) -> None:
        super().__init__()
        shape = (channels,) if dims == 1 else (1, 1, 1, channels)
        self.gamma, self.beta = nn.Parameter(torch.rand(shape)), nn.Parameter(torch.rand(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = x.norm(dim=(1, 2), keepdim=True)
        return self.gamma * (x * (g / (g.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class ConvNeXtBlock(nn.Module):
    def __init__(self, c: int, dims: int = 1, scale: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1, groups=c), nn.LayerNorm(c)
        self.fc1, self.grn, self.fc2 = (
            nn.Linear(c, 2 * c),
            ResponseNorm(2 * c, dims),
            nn.Linear(2 * c, c),
        )
        self.gamma = nn.Parameter(torch.rand(c)) if scale else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.fc2(self.grn(F.gelu(self.fc1(y))))
        return x + (y if self.gamma is None else self.gamma * y).permute(0, 3, 1, 2)


class Shrinking(nn.Module):
    """A block that halves the image, with a response normalisation in it; it cannot be skipped."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.grn = nn.Conv2d(c, c, 2, 2), ResponseNorm(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    """A depthwise token mixer that adds to its input (FastViT's RepMixer)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1, groups=c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class MixerBlock(nn.Module):
    """A block whose first half is a residual module, and whose second half is its own."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.mixer, self.mlp = (
            Mixer(c),
            nn.Sequential(nn.Conv2d(c, 4 * c, 1), nn.Conv2d(4 * c, c, 1)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mixer(x)
        return x + self.mlp(x)


class Nested(nn.Module):
    """A block that adds what a residual module, with most of the products, makes of its input."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.inner, self.project = Inner(c), nn.Conv2d(c, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(self.inner(x))


class Inner(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, 2 * c, 1)
        self.back = nn.Conv2d(2 * c, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(self.conv(x).relu())


class Scaled(nn.Module):
    """A block that scales its shortcut by a vector (MetaFormer's res_scale)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.rand(c, 1, 1).flatten()), nn.Conv2d(c, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale[:, None, None] + self.conv(x)


class PReLUBlock(nn.Module):
    """A block whose activation is the ReLU of its input when its weight is zero."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.act, self.back = nn.Conv2d(c, c, 1), nn.PReLU(c), nn.Conv2d(c, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(self.act(self.conv(x)))


class Leaky(nn.Module):
    """A block that ends in a leaky ReLU: many of them in a row come near a ReLU."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x + self.conv(x), 0.01)


class ChannelNorm(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormLast(nn.Module):
    """A block that normalises over the channels after it adds."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 1), ChannelNorm(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.conv(x))


class Body(nn.Module):
    """All blocks, around which the input is added once more (as in super-resolution)."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.last = nn.Sequential(*blocks), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.blocks(x))


class Stage(nn.Module):
    """Blocks, and a small residual module of positions after them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.position = nn.ModuleList(blocks), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x + self.position(x)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(1, 5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.lstm(x)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner(8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class TwoNames(nn.Module):
    """A network that keeps its blocks under two names each, and runs them once."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Inner(8), Inner(8)
        self.stages = nn.ModuleList([self.one, self.other])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.stages:
            x = block(x)
        return x


def stem(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 1), *modules)


def normed(normalise: Callable[[nn.Module], object]) -> nn.Module:
    """Return a network whose blocks have weights that are computed from others."""
    net = stem(Inner(8), Inner(8))
    for block in (net[1], net[2]):
        for layer in (block.conv, block.back):
            normalise(layer)
    return net


# The network, an input, and the blocks that are expected.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[str]]] = {
    "response normalisation": (
        lambda: stem(nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8)), Shrinking(8)),
        X, ["1.0", "1.1"],
    ),
    "response normalisation of four dimensions, layer scale": (
        lambda: stem(ConvNeXtBlock(8, 4, True), Shrinking(8), ConvNeXtBlock(8, 4, True)),
        X, ["1", "3"],
    ),
    "a residual mixer in a block": (
        lambda: stem(nn.Sequential(MixerBlock(8), MixerBlock(8))), X, ["1.0", "1.1"],
    ),
    "a residual module in a block that adds": (
        lambda: stem(nn.Sequential(Nested(8), Nested(8))), X, ["1.0", "1.1"],
    ),
    "a scaled shortcut": (lambda: stem(Scaled(8), Scaled(8)), X, ["1", "2"]),
    "normalised after the sum": (lambda: stem(NormLast(8), NormLast(8)), X, ["1", "2"]),
    "an activation with weights": (lambda: stem(PReLUBlock(8), PReLUBlock(8)), X, ["1", "2"]),
    "a sum around all blocks": (
        lambda: stem(Body(*(Inner(8) for _ in range(6)))), X,
        [f"1.blocks.{i}" for i in range(6)],
    ),
    "positions after a stage": (
        lambda: stem(Stage(Inner(8), Inner(8))), X, ["1.blocks.0", "1.blocks.1"],
    ),
    "halves of a block as modules": (
        lambda: nn.Sequential(Positions(), nn.Sequential(Attention(), Mlp()), nn.Linear(8, 3)),
        TOKENS, ["1.0", "1.1"],
    ),
    "recurrent": (
        lambda: nn.Sequential(Recurrent(), Recurrent(), nn.Linear(8, 3)), TOKENS, ["0", "1"],
    ),
    "checkpointed": (Checkpointed, X, ["blocks.0", "blocks.1"]),
    "two names": (TwoNames, X, ["one", "other"]),
    "data parallel": (
        lambda: nn.DataParallel(stem(Inner(8), Inner(8))), X, ["module.1", "module.2"],
    ),
    "weight normalisation": (lambda: normed(parametrizations.weight_norm), X, ["1", "2"]),
    "weight normalisation by hooks": (lambda: normed(nn.utils.weight_norm), X, ["1", "2"]),
    "spectral normalisation": (lambda: normed(parametrizations.spectral_norm), X, ["1", "2"]),
    "spectral normalisation by hooks": (lambda: normed(nn.utils.spectral_norm), X, ["1", "2"]),
    "pruned": (
        lambda: normed(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
        X, ["1", "2"],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_a_family(family: str) -> None:
    torch.manual_seed(0)
    make, x, expected = FAMILIES[family]
    net = make().eval()
    before, keys = net(x).detach(), list(net.state_dict())
    macs = count_macs(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ElasticityWarning)
        skippable_blocks(net, x)
    space = net.search_space()
    net.activate(space.smallest)
    assert [n for n, module in net.named_modules() if "forward" in vars(module)] == expected
    try:
        assert count_macs(extract(net, space.smallest), x) < 0.6 * macs
    except MeasurementError:  # nothing is left
        assert family in ("checkpointed", "two names")
    with torch.no_grad():
        for subnet in (space.smallest, *space.sample(2, 0), space.largest):
            net.activate(subnet)
            assert torch.equal(net(x), extract(net, subnet)(x)), subnet
    assert torch.equal(net(x), before)
    assert list(net.state_dict()) == keys


class TwoTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.positions = nn.Linear(8, 8), Positions()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + self.fc(self.positions(x)) * mask


class Encoder(nn.Module):
    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        self.blocks, self.repeats = nn.ModuleList(TwoTensors() for _ in range(3)), repeats

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            for _ in range(self.repeats):
                x = block(x, torch.ones(()))
        return x


def test_what_stands_in_blocks_of_two_tensors_is_not_taken_for_blocks() -> None:
    net = skippable_blocks(nn.Sequential(Encoder(), nn.Linear(8, 2)), TOKENS)
    net.activate(net.search_space().smallest)
    skipped = [n for n, module in net.named_modules() if "forward" in vars(module)]
    assert skipped == ["0.blocks.0", "0.blocks.1", "0.blocks.2"]
    with pytest.raises(ElasticityError) as caught:
        skippable_blocks(nn.Sequential(Encoder(repeats=2), nn.Linear(8, 2)), TOKENS)
    assert_clear(caught.value, "'0.blocks.0' adds, but runs 2 times")


@pytest.mark.parametrize(
    "block",
    [
        lambda: nn.Sequential(*(Leaky(8) for _ in range(8))),
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.PReLU(8)),
    ],
)
def test_what_comes_near_a_sum_is_no_block(block: Callable[[], nn.Module]) -> None:
    with pytest.raises(ElasticityError, match="has no block that adds"):
        skippable_blocks(stem(block()), X)


class Remembers(nn.Module):
    """A block that remembers in eval mode what it made of weights (as LeViT does)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(8, 8, 1), nn.Parameter(torch.ones(8))
        self.memory: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "bias" not in self.memory:
            self.memory["bias"] = self.table[:, None, None] * 2
        return x + self.conv(x + self.memory["bias"])


def test_a_network_is_not_touched_by_the_trials() -> None:
    torch.manual_seed(0)
    net = stem(Remembers(), Remembers()).eval()
    right, state = copy.deepcopy(net)(X), torch.get_rng_state()
    skippable_blocks(net, X)
    assert all(not block.memory for block in net[1:])
    assert torch.equal(net(X), right)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("blocks", [None, Mixer, ["1"]])
def test_a_warning_says_if_skipping_saves_nearly_nothing(blocks: object) -> None:
    net = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 8, 3, padding=2), Mixer(8))
    if blocks == ["1"]:
        net = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.BatchNorm2d(64))
    with pytest.warns(ElasticityWarning, match=r"still has (98\.8|100\.0)% of its MACs") as caught:
        skippable_blocks(net, X, blocks=blocks)  # type: ignore[arg-type] # of the three kinds
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("name", "blocks", "share"),
    [  # timm 1.0.31
        ("convnextv2_atto", 12, 0.07),
        ("fastvit_t8", 10, 0.11),
        ("resnet18", 5, 0.37),
        ("vit_tiny_patch16_224", 12, 0.03),
    ],
)
def test_networks_of_timm(name: str, blocks: int, share: float) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    net, x = timm.create_model(name, pretrained=False).eval(), torch.randn(1, 3, 224, 224)
    macs = count_macs(net, x)
    space = skippable_blocks(net, x).search_space()
    assert len(space.names) == blocks
    assert count_macs(extract(net, space.smallest), x) < share * macs
