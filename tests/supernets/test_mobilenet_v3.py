# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_subnet import SearchSpace, Subnet
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.layers import ElasticBatchNorm2d, ElasticConv2d
from lightning_subnet.errors import InvalidSubnetError, SpaceError
from lightning_subnet.supernets._blocks.mbconv import make_divisible
from lightning_subnet.supernets.mobilenet_v3 import (
    ElasticMobileNetV3,
    MobileNetV3,
    MobileNetV3Config,
)
from tests.problems import assert_clear, data_file
from tests.supernets.contract import ConvolutionalContract, megabytes, shaken, untouched

SIZES = {"tiny": 8, "small": 32, "full": 64}  # pixels
Sized = tuple[ElasticMobileNetV3, int]


def build(size: str) -> ElasticMobileNetV3:
    torch.manual_seed(0)
    if size == "full":
        return shaken(ElasticMobileNetV3(MobileNetV3Config(image_size=64)))
    return shaken(getattr(ElasticMobileNetV3, size)())


@pytest.fixture(scope="module", params=list(SIZES))
def sized(request: pytest.FixtureRequest) -> Iterator[Sized]:
    net = build(request.param)
    with untouched(net):
        yield net, SIZES[request.param]


def layout(net: ElasticMobileNetV3, subnet: Subnet) -> tuple[list[list[int]], list[list[float]]]:
    """Kernels and expansions of the blocks that exist, by stage, read one by one."""
    most = max(net.config.depths)
    numbers = [
        [s * most + b for b in range(subnet[f"d.{s}"])] for s in range(len(net.config.widths))
    ]
    return (
        [[subnet[f"ks.{i}"] for i in stage] for stage in numbers],
        [[subnet[f"e.{i}"] for i in stage] for stage in numbers],
    )


def inactive_masks(net: ElasticMobileNetV3, subnet: Subnet) -> dict[str, torch.Tensor]:
    """Of each parameter of the blocks, where it is not in force (written from the paper)."""
    most, masks = max(net.config.depths), {}
    for name, weight in net.stages.named_parameters(prefix="stages"):
        _, s, b, part, *rest = name.split(".")
        i = int(s) * most + int(b)
        used = torch.zeros_like(weight, dtype=torch.bool)
        if int(b) < subnet[f"d.{s}"]:
            spec = net.config.stages[int(s)][int(b)]
            mid = make_divisible(round(spec.c_in * subnet[f"e.{i}"]))
            kernel, squeezed = subnet[f"ks.{i}"], make_divisible(mid // 4)
            if "transforms" in rest:
                large, small = map(int, rest[-1].split("to"))
                used[:] = kernel <= small < large
            elif part == "expand" or (part, rest[0]) == ("depthwise", "1"):
                used[:mid] = True
            elif part == "depthwise":
                largest, below = sorted(net.config.kernels, reverse=True)[:2]
                side = largest if kernel == largest else below  # matrices mix all of that crop
                inner = slice((largest - side) // 2, (largest + side) // 2)
                used[:mid, :, inner, inner] = True
            elif part == "project":
                used[(slice(None), slice(mid))[: weight.ndim]] = True
            elif rest[0] == "reduce":
                used[:squeezed] = True
                if rest[1] == "weight":
                    used[:, mid:] = False
            else:
                used[:mid] = True
                if rest[1] == "weight":
                    used[:, squeezed:] = False
        masks[name] = ~used
    return masks


class TestElasticMobileNetV3(ConvolutionalContract):
    cls, plain, config = ElasticMobileNetV3, MobileNetV3, MobileNetV3Config
    inactive = staticmethod(inactive_masks)
    parts = frozenset({"expand.0.weight", "project.1.bias", "se.reduce.bias"})


def test_an_extraction_has_no_trace_of_elasticity_and_loads_into_a_fresh_network(
    sized: Sized,
) -> None:
    net, pixels = sized
    x = torch.randn(2, net.config.in_channels, pixels, pixels)
    for subnet in net.search_space().sample(4, 2):
        plain = extract(net, subnet)
        assert type(plain) is MobileNetV3
        assert plain.sliced
        assert not plain.training
        assert not any("Elastic" in type(module).__name__ for module in plain.modules())
        assert not hasattr(plain, "activate")
        fresh = MobileNetV3(net.config, *layout(net, subnet)).eval()
        assert not torch.equal(fresh.classifier.weight, plain.classifier.weight)
        fresh.load_state_dict(plain.state_dict())  # strict: names and shapes
        with torch.no_grad():
            assert torch.equal(fresh(x), plain(x))
        shared = {t.data_ptr() for t in net.state_dict().values()}
        assert not shared & {t.data_ptr() for t in plain.state_dict().values()}


def test_the_space_of_the_full_size_is_that_of_the_paper() -> None:
    with torch.device("meta"):
        net = ElasticMobileNetV3()
    space = net.search_space()
    assert space.size == 7371**5
    assert len(space.names) == 5 + 20 + 20
    assert space.largest.grouped()["d"] == [4] * 5
    assert {space.largest[f"ks.{i}"] for i in range(20)} == {7}
    assert {space.smallest[f"e.{i}"] for i in range(0, 20, 4)} == {3}
    assert net.search_space() == space


@pytest.mark.parametrize("width", [1.0, 1.2])
def test_the_largest_has_all_weights_but_the_kernel_transformations(width: float) -> None:
    with torch.device("meta"):
        net = ElasticMobileNetV3(MobileNetV3Config(width_mult=width))
    space = net.search_space()
    params = net.exact_measures()[1].evaluate(space, space.indices([space.largest]))[0][0]
    transforms = sum(p.numel() for name, p in net.named_parameters() if "transforms" in name)
    assert transforms == 20 * (25**2 + 9**2)
    assert params == sum(p.numel() for p in net.parameters()) - transforms


def test_macs_and_params_are_those_measured_by_others_for_all_2223_subnets() -> None:
    with np.load(data_file("ofa_mbv3_w10_measured.npz")) as data:
        ks, e, d = data["ks"], data["e"], data["d"]
        macs, params = data["macs"], data["params"]
    with torch.device("meta"):
        net = ElasticMobileNetV3()
    space, measures = net.search_space(), {m.name: m for m in net.exact_measures()}
    subnets = [
        space.subnet(
            **{f"d.{s}": int(v) for s, v in enumerate(d[r])},
            **{f"ks.{i}": int(v) for i, v in enumerate(ks[r])},
            **{f"e.{i}": int(v) for i, v in enumerate(e[r])},
        )
        for r in range(len(d))
    ]
    assert len(subnets) == 2223
    X = space.indices(subnets)
    assert np.array_equal(measures["macs"].evaluate(space, X)[0], macs)
    assert np.array_equal(measures["params"].evaluate(space, X)[0], params)


def test_size_counts_the_bytes_of_the_type_in_use() -> None:
    net = build("tiny")
    space = net.search_space()
    X = space.indices([space.largest])
    single = net.exact_measures()[2].evaluate(space, X)[0][0]
    half = net.half().exact_measures()[2].evaluate(space, X)[0][0]
    assert math.isclose(half, megabytes(extract(net, space.largest)), rel_tol=1e-12)
    assert 0.5 < half / single < 0.51  # the counters of BatchNorm stay 64-bit


def test_image_size_changes_macs_alone() -> None:
    with torch.device("meta"):
        one = ElasticMobileNetV3(MobileNetV3Config(image_size=224))
        other = ElasticMobileNetV3(MobileNetV3Config(image_size=113))  # odd sizes round up
    space = one.search_space()
    X = space.indices(space.sample(5, 0))
    a, b = ({m.name: m.evaluate(space, X)[0] for m in n.exact_measures()} for n in (one, other))
    assert np.array_equal(a["params"], b["params"])
    subnet = space.from_indices(X)[0]
    plain = extract(other, subnet)
    with FlopCounterMode(display=False) as counter:
        plain(torch.zeros(1, 3, 113, 113, device="meta"))
    assert b["macs"][0] * 2 == counter.get_total_flops() < a["macs"][0] * 2


def test_only_blocks_of_the_stages_are_elastic() -> None:
    net = build("tiny")
    elastic = {
        name.split(".")[0]
        for name, module in net.named_modules()
        if isinstance(module, ElasticConv2d | ElasticBatchNorm2d)
    }
    assert elastic == {"stages"}
    assert len(net.blocks) == 2 * 3


def test_a_subnet_of_another_space_is_refused_with_the_choice() -> None:
    tiny, small = build("tiny"), build("small")
    small.activate(small.search_space().smallest)
    for own in (tiny.search_space().largest, SearchSpace(a=[1, 2]).largest):
        with pytest.raises(InvalidSubnetError) as caught:
            small.activate(own)
        assert_clear(caught.value, "ElasticMobileNetV3 has the choice", "another space")
        assert small.active_subnet == small.search_space().smallest
        assert small.stages[0].active_depth == min(small.config.depths)  # nothing was changed
    subnet = tiny.search_space().smallest
    tiny.activate(subnet)
    for changes, message in [
        ({"depths": (1, 4)}, r"d\.0=4 is not one of 1, 2, 3"),
        ({"kernels": (3, 7)}, r"ks\.0=7 is not one of 3, 5, what this network was built with"),
        ({"expansions": (1, 3)}, r"e\.0=3 is not one of 1, 2, 4"),  # narrower, yet unknown
    ]:
        other = ElasticMobileNetV3.tiny(**changes).search_space()
        with pytest.raises(InvalidSubnetError, match=message):
            tiny.activate(other.largest)
        assert tiny.active_subnet == subnet
        assert tiny.stages[0].active_depth == 1  # nothing was changed
    tiny.activate(ElasticMobileNetV3.tiny(depths=(3,)).search_space().largest)  # a part of it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": (1, 2)}, "2 stages need 3 strides, 2 activations and 2 se, not 2, 2 and 2"),
        ({"se": (True,)}, "not 3, 2 and 1"),
        ({"activations": ("relu",)}, "not 3, 1 and 2"),
        ({"kernels": (3, 4)}, r"kernel_size=\(3, 4\) must be odd sizes, each once"),
        ({"activations": ("relu", "h_swich")}, "'h_swich' is not one .* Did you mean 'h_swish'"),
        ({"depths": (0, 1)}, r"depths=\(0, 1\) must be one or more positive numbers"),
        ({"expansions": ()}, r"expansions=\(\) must be one or more positive numbers"),
        ({"kernels": (3, 3)}, r"kernel_size=\(3, 3\) must be odd sizes, each once"),
    ],
)
def test_sizes_that_do_not_fit_together(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        ElasticMobileNetV3.tiny(**changes)


def test_make_divisible_is_the_published_rule() -> None:
    assert [make_divisible(v) for v in (1, 12, 16, 19, 20, 27, 28.8)] == [8, 16, 16, 24, 24, 32, 32]
    assert make_divisible(11) == 16  # 8 would be more than 10 % below
    assert all(make_divisible(v) >= 0.9 * v and make_divisible(v) % 8 == 0 for v in range(1, 500))
