# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_subnet import Subnet, check_elastic
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.errors import InvalidSubnetError, SpaceError
from lightning_subnet.supernets import ElasticResNet, ResNet, ResNetConfig
from lightning_subnet.supernets._blocks.mbconv import make_divisible
from tests.problems import assert_clear
from tests.supernets.contract import ConvolutionalContract, images, shaken


def inactive_masks(net: ElasticResNet, subnet: Subnet) -> dict[str, torch.Tensor]:
    """Of each parameter, where it is not in force (written from the original's description)."""
    c, masks = net.config, {}

    def width(full: float, place: int) -> int:
        return make_divisible(full * subnet[f"w.{place}"], c.divisor)

    inside = make_divisible(width(c.stem, 0) // 2, c.divisor)
    end, outs = width(c.stem, 1), [width(w, s + 2) for s, w in enumerate(c.widths)]
    starts = np.cumsum([0, *(b + max(c.depths) for b in c.base_depths)])

    def channels(name: str) -> tuple[int, int]:
        """Output and input channels in force; none of a block that rests."""
        at = name.split(".")
        if at[0] == "classifier":
            return c.n_classes, outs[-1]
        if name.startswith("stem.0."):
            return inside, c.in_channels
        if name.startswith("stem.1."):
            return (inside, inside) if subnet["d.0"] == max(c.depths) else (0, 0)
        if at[0] == "stem_end":
            return end, inside
        s, b = int(at[1]), int(at[2])
        if b >= c.base_depths[s] + subnet[f"d.{s + 1}"]:
            return 0, 0
        mid = make_divisible(round(outs[s] * subnet[f"e.{starts[s] + b}"]), c.divisor)
        before = outs[s] if b else [end, *outs][s]
        return {
            "conv1": (mid, before),
            "conv2": (mid, mid),
            "conv3": (outs[s], mid),
            "downsample": (outs[s], before),
        }[at[3]]

    for name, weight in net.named_parameters():
        out, into = channels(name)
        used = torch.zeros_like(weight, dtype=torch.bool)
        used[(slice(out), slice(into))[: min(weight.ndim, 2)]] = True
        masks[name] = ~used
    return masks


class TestElasticResNet(ConvolutionalContract):
    cls, plain, config = ElasticResNet, ResNet, ResNetConfig
    inactive = staticmethod(inactive_masks)
    parts = frozenset(
        {"stem.1.body.0.weight", "stem_end.1.bias", "conv2.0.weight", "downsample.1.weight"}
    )
    draws: ClassVar = {"tiny": 50, "small": 50, "full": 8}  # the parity tests have 20 more


class TestElasticResolution(ConvolutionalContract):
    """The same with the choice of a resolution."""

    cls, plain, config = ElasticResNet, ResNet, ResNetConfig
    inactive = staticmethod(inactive_masks)
    parts = frozenset({"conv2.0.weight"})
    draws: ClassVar = {"tiny": 50}

    def build(self, size: str = "tiny", **changes: Any) -> ElasticResNet:
        return super().build(size, resolutions=(4, 6, 8), **changes)

    @pytest.fixture(params=["tiny"])
    def size(self, request: pytest.FixtureRequest) -> str:
        return request.param


def values(net: ElasticResNet, *subnets: Subnet) -> dict[str, list[float]]:
    space = net.search_space()
    X = space.indices(subnets)
    return {m.name: m.evaluate(space, X)[0].tolist() for m in net.exact_measures()}


@pytest.fixture(scope="module")
def full() -> ElasticResNet:
    with torch.device("meta"):
        return ElasticResNet()


def test_the_space_of_the_full_size_is_that_of_the_original(full: ElasticResNet) -> None:
    space = full.search_space()
    assert len(space.names) == 5 + 18 + 6
    by_stage = [sum(3**n for n in counts) for counts in ((2, 3, 4), (2, 3, 4), (4, 5, 6))]
    stages = by_stage[0] ** 3 * by_stage[2]  # the third has two blocks more
    assert space.size == stages * 2 * 2 * 3**5 == 1_639_276_531_308
    assert [len(stage) for stage in full.stages] == [4, 4, 6, 4]
    assert {space.largest[f"w.{i}"] for i in range(6)} == {1.0}
    assert full.search_space() is space


def test_values_that_mean_the_same_network_are_the_same_subnet(full: ElasticResNet) -> None:
    space = full.search_space()
    largest = dict(space.largest)
    assert space.subnet({**largest, "d.0": 0}) == space.subnet({**largest, "d.0": 1})
    assert space.subnet({**largest, "d.0": 0}) != space.largest
    one, other = (space.subnet({**largest, "w.0": w}) for w in (0.65, 0.8))
    assert one == other  # 64 * .65 = 41.6 and 64 * .8 = 51.2: 40 and 48 channels, 24 of them inside
    assert full.config.channels[0] == [24, 24, 32]
    assert full.config.channels[1] == [40, 48, 64]


def test_one_subnet_is_the_published_resnet_50d(full: ElasticResNet) -> None:
    """Blocks 3, 4, 6, 3 at a quarter of the channels, everything full width.

    ResNet-50 of torchvision has 25,557,032 parameters and 4,089,184,256 MACs (its documentation:
    25557032, 4.09 G). The D design has three 3x3 convolutions for the stem's 7x7 one, and pools
    before the convolutions of the shortcuts, which leaves their cost.
    """
    space = full.search_space()
    subnet = space.subnet(d=[2, 1, 2, 2, 1], e=[0.25] * 18, w=[1.0] * 6)
    stem, seven = 9 * (3 * 32 + 32 * 32 + 32 * 64), 49 * 3 * 64
    told = values(full, subnet)
    assert told["params"] == [25_557_032 + stem - seven + 2 * (32 + 32)]
    assert told["macs"] == [4_089_184_256 + (stem - seven) * 112**2]


def test_the_extremes_of_the_full_size_hold_all_and_least(full: ElasticResNet) -> None:
    space = full.search_space()
    told = values(full, space.smallest, space.largest)
    assert told["params"][1] == sum(p.numel() for p in full.parameters())
    random = values(full, *space.sample(500, 0))
    for name, (least, most) in told.items():
        assert least < min(random[name]), name
        assert max(random[name]) < most, name


def test_the_batch_of_a_lower_resolution_is_the_resized_batch() -> None:
    net = shaken(ElasticResNet.tiny(resolutions=(4, 8)))
    fixed = ElasticResNet.tiny()
    fixed.load_state_dict(net.state_dict())
    fixed.eval()
    x = torch.randn(2, 1, 8, 8)
    subnet = net.search_space().subnet({**net.search_space().largest, "r": 4})
    small = nn.functional.interpolate(x, (4, 4), mode="bilinear", antialias=True)
    net.activate(subnet)
    fixed.activate(fixed.search_space().largest)
    with torch.no_grad():
        assert torch.equal(net(x), fixed(small))
        assert torch.equal(extract(net, subnet)(x), net(x))
        net.activate(net.search_space().largest)
        assert torch.equal(net(x), fixed(x))  # nothing is resized
    told = values(net, subnet, net.search_space().largest)
    assert told["macs"][0] < 0.5 * told["macs"][1]
    assert told["params"][0] == told["params"][1]


def test_image_size_changes_macs_alone() -> None:
    with torch.device("meta"):
        one = ElasticResNet(ResNetConfig(image_size=224))
        other = ElasticResNet(ResNetConfig(image_size=113))  # odd sizes round up
        by_choice = ElasticResNet(ResNetConfig(resolutions=(224, 113)))
    subnets = one.search_space().sample(5, 0)
    a, b = values(one, *subnets), values(other, *subnets)
    assert a["params"] == b["params"]
    plain = extract(other, subnets[0])
    with FlopCounterMode(display=False) as counter:
        plain(torch.zeros(1, 3, 113, 113, device="meta"))
    assert b["macs"][0] * 2 == counter.get_total_flops() < a["macs"][0] * 2
    space = by_choice.search_space()
    assert space.size == 2 * one.search_space().size
    both = [space.subnet({**s, "r": r}) for r in (224, 113) for s in subnets]
    assert values(by_choice, *both)["macs"] == a["macs"] + b["macs"]


def test_extraction_draws_no_random_numbers() -> None:
    net = ElasticResNet.tiny()
    before = torch.get_rng_state()
    extract(net, net.search_space().smallest)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_subnet_of_another_space_is_refused_with_the_choice() -> None:
    tiny = ElasticResNet.tiny()
    subnet = tiny.search_space().smallest
    tiny.activate(subnet)
    small = ElasticResNet.small()
    small.activate(small.search_space().smallest)
    with pytest.raises(InvalidSubnetError) as caught:
        small.activate(subnet)
    assert_clear(caught.value, "ElasticResNet has the choice 'd.3'", "search_space()")
    assert small.active_subnet == small.search_space().smallest
    for changes, message in [
        ({"depths": (1, 3)}, r"d\.0=3 is not one of 0, 1, 2, what this network was built with"),
        ({"expansions": (0.25, 0.75)}, r"e\.0=0\.75 is not one of 0\.25, 0\.5, 1\.0"),
        ({"width_mults": (0.75, 1.25)}, r"w\.0=1\.25 is not one of 0\.5, 1\.0"),
    ]:
        other = ElasticResNet.tiny(**changes).search_space()
        with pytest.raises(InvalidSubnetError, match=message):
            tiny.activate(other.largest)
        assert tiny.active_subnet == subnet
        assert tiny.stages[0].active_depth == 1  # nothing was changed
    with pytest.raises(InvalidSubnetError, match=r"r=8 is not one of 4, 6"):
        ElasticResNet.tiny(resolutions=(4, 6)).activate(
            ElasticResNet.tiny(resolutions=(4, 8)).search_space().largest
        )
    tiny.activate(ElasticResNet.tiny(depths=(2,)).search_space().largest)  # a part of it


def test_lists_of_the_wrong_length_are_refused_by_the_space() -> None:
    space = ElasticResNet.tiny().search_space()
    given = space.largest.grouped()
    with pytest.raises(InvalidSubnetError, match="'w' is a list of 4 choices, not 3 values"):
        space.subnet({**given, "w": [1.0] * 3})
    with pytest.raises(InvalidSubnetError, match=r"'e' is a list of 6 choices, not 0\.5"):
        space.subnet({**given, "e": 0.5})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"base_depths": (1,)}, ["2 stages need 2 base depths and 4 strides", "not 1 and 4"]),
        ({"strides": (1, 2)}, ["2 stages need", "not 2 and 2"]),
        ({"widths": ()}, ["0 stages need"]),
        ({"depths": (-1, 0)}, ["depths=(-1, 0) must be one or more whole numbers from 0"]),
        ({"depths": (0.5, 1)}, ["depths=(0.5, 1) must be one or more whole numbers from 0"]),
        ({"expansions": ()}, ["expansions=() must be one or more positive numbers"]),
        ({"width_mults": (0.5, 0)}, ["width_mults=(0.5, 0) must be"]),
        ({"width_mults": (0.5, 0.5)}, ["width_mults=(0.5, 0.5) must have each value once"]),
        ({"resolutions": (8, 8)}, ["resolutions=(8, 8) must have each value once"]),
        ({"resolutions": (0, 8)}, ["resolutions=(0, 8) must be"]),
        ({"base_depths": (0, 1)}, ["base_depths=(0, 1) with depths=(0, 1, 2) leave no block"]),
        ({"divisor": 8}, ["Expansions 0.25 and 0.5 give [8, 8] and [8, 16]", "stage 0"]),
    ],
)
def test_sizes_that_do_not_fit_together(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(SpaceError) as caught:
        ElasticResNet.tiny(**changes)
    assert_clear(caught.value, *parts)


def test_expansions_that_are_always_the_same_network_are_merged() -> None:
    net = shaken(ElasticResNet.tiny(expansions=(0.25, 0.26, 0.5)))
    assert net.search_space().choices["e.0"].same == ((0.25, 0.26),)
    assert net.search_space().size == ElasticResNet.tiny(expansions=(0.25, 0.5)).search_space().size
    check_elastic(net, images(net, 2))
