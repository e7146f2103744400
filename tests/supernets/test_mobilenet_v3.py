# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_subnet import Subnet
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.layers import ElasticBatchNorm2d, ElasticConv2d
from lightning_subnet.errors import InvalidSubnetError, SpaceError
from lightning_subnet.supernets.mobilenet_v3 import (
    ElasticMobileNetV3,
    MobileNetV3,
    MobileNetV3Config,
    make_divisible,
)
from tests.problems import data_file

SIZES = {"tiny": 8, "small": 32, "full": 64}  # pixels
Sized = tuple[ElasticMobileNetV3, int]


def build(size: str) -> ElasticMobileNetV3:
    """A network with no weight at its initial value, so that no zero or one hides anything."""
    torch.manual_seed(0)
    if size == "full":
        net = ElasticMobileNetV3(MobileNetV3Config(image_size=64))
    else:
        net = getattr(ElasticMobileNetV3, size)()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 1.5)
            elif "running_mean" in name:
                tensor.normal_(0, 0.1)
            elif "num_batches" not in name:
                tensor.add_(0.02 * torch.randn_like(tensor))
    return net.eval()


@pytest.fixture(scope="module", params=list(SIZES))
def sized(request: pytest.FixtureRequest) -> Iterator[Sized]:
    net = build(request.param)
    state = copy.deepcopy(net.state_dict())
    yield net, SIZES[request.param]
    for name, tensor in net.state_dict().items():  # no test writes to the shared network
        assert torch.equal(tensor, state[name]), name


def megabytes(net: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in net.state_dict().values()) / 1e6


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


def test_random_subnets_extracted_give_the_same_outputs_and_cost_what_the_tables_say(
    sized: Sized,
) -> None:
    net, pixels = sized
    x = torch.randn(1, net.config.in_channels, pixels, pixels)
    space = net.search_space()
    subnets = [space.smallest, space.largest, *space.sample(50, 1)]
    X = space.indices(subnets)
    table = {m.name: m.evaluate(space, X)[0] for m in net.exact_measures()}
    outputs = []
    for i, subnet in enumerate(subnets):
        plain = extract(net, subnet)
        net.activate(subnet)
        with torch.no_grad():
            active = net(x)
            with FlopCounterMode(display=False) as counter:
                extracted = plain(x)
        assert active.shape == (1, net.config.n_classes)
        torch.testing.assert_close(extracted, active, atol=1e-6, rtol=1e-6)
        assert table["macs"][i] * 2 == counter.get_total_flops(), subnet
        assert table["params"][i] == sum(p.numel() for p in plain.parameters()), subnet
        assert math.isclose(table["size_mb"][i], megabytes(plain), rel_tol=1e-12), subnet
        outputs.append(active)
    assert len(torch.cat(outputs).unique(dim=0)) == len(subnets)  # the comparison says something


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


def test_extraction_leaves_what_was_in_force(sized: Sized) -> None:
    net, _ = sized
    one, other = net.search_space().sample(2, 3)
    net.activate(one)
    extract(net, other)
    assert net.active_subnet == one
    assert [len(stage.active) for stage in net.stages] == [
        one[f"d.{s}"] for s in range(len(net.stages))
    ]


def test_gradients_of_inactive_weights_are_exactly_zero(
    sized: Sized,
) -> None:
    net = copy.deepcopy(sized[0]).train()
    x = torch.randn(3, net.config.in_channels, sized[1], sized[1])
    space = net.search_space()
    kinds = set()
    for subnet in [space.smallest, *space.sample(2 if sized[1] == 64 else 8, 4)]:
        net.activate(subnet)
        net.zero_grad(set_to_none=True)
        net(x).square().sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        for name, inactive in inactive_masks(net, subnet).items():
            gradient = gradients[name]
            if gradient is None:
                assert inactive.all(), name
                continue
            kinds.add(".".join(name.split(".")[3:]))
            assert gradient[inactive].abs().sum() == 0, name
            assert inactive.all() or gradient[~inactive].abs().sum() > 0, name
    assert any("transforms" in kind for kind in kinds)
    assert {"expand.0.weight", "project.1.bias", "se.reduce.bias"} <= kinds


def test_what_activate_gives_is_views_of_the_weights() -> None:
    net = build("tiny")
    net.activate(net.search_space().smallest)
    before = {name: (p.data_ptr(), p.shape) for name, p in net.state_dict(keep_vars=True).items()}
    for subnet in net.search_space().sample(20, 0):
        net.activate(subnet)
    after = {name: (p.data_ptr(), p.shape) for name, p in net.state_dict(keep_vars=True).items()}
    assert before == after


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


def test_exact_measures_know_what_they_are_and_agree_in_bulk_and_one_by_one() -> None:
    with torch.device("meta"):
        net = ElasticMobileNetV3()
    space, measures = net.search_space(), net.exact_measures()
    assert [(m.name, m.unit, m.exact, m.vectorised) for m in measures] == [
        ("macs", "MAC", True, True),
        ("params", "", True, True),
        ("size_mb", "MB", True, True),
    ]
    X = space.sample_indices(20_000, np.random.default_rng(0))
    began = time.perf_counter()
    values = [m.evaluate(space, X)[0] for m in measures]
    assert time.perf_counter() - began < 20  # 20,000 extractions would take half an hour
    assert all(v.shape == (20_000,) and np.isfinite(v).all() for v in values)
    for m, v in zip(measures, values, strict=True):
        rows = [m.evaluate(space, X[i : i + 1])[0][0] for i in range(50)]
        assert rows == v[:50].tolist()


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


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("which", ["smallest", "largest", "random"])
def test_subnets_learn(size: str, which: str) -> None:
    torch.manual_seed(0)
    net = getattr(ElasticMobileNetV3, size)(n_classes=4, dropout=0.0)
    space = net.search_space()
    net.activate(space.sample(1, 9)[0] if which == "random" else getattr(space, which))
    x = torch.randn(8, net.config.in_channels, net.config.image_size, net.config.image_size)
    y = torch.arange(8) % 4
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


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
    with pytest.raises(KeyError, match=r"'ks\.6' is not a choice of this subnet"):
        small.activate(tiny.search_space().largest)
    subnet = tiny.search_space().smallest
    tiny.activate(subnet)
    for changes, message in [
        ({"depths": (1, 4)}, r"d\.0=4 is not one of \[1, 2, 3\]"),
        ({"kernels": (3, 7)}, r"ks\.0=7 is not one of \[3, 5\], what this network was built with"),
        ({"expansions": (1, 3)}, r"e\.0=3 is not one of \[1, 2, 4\]"),  # narrower, yet unknown
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


def test_a_network_on_another_type_extracts_in_that_type() -> None:
    net = build("tiny").double()
    subnet = net.search_space().sample(1, 0)[0]
    net.activate(subnet)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    plain = extract(net, subnet)
    assert {p.dtype for p in plain.parameters()} == {torch.float64}
    torch.testing.assert_close(plain(x), net(x), atol=1e-12, rtol=1e-12)
    assert isinstance(plain.stages[0], nn.Sequential)
