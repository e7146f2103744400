# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import Choice, SearchSpace, SubnetSearch, check_elastic, extract
from lightning_subnet.errors import SearchError, SpaceError
from lightning_subnet.supernets import from_hat, from_ofa, from_whittle
from tests.networks import Digits, LitMlp, quiet_trainer
from tests.problems import assert_clear

ROOT = Path(__file__).resolve().parents[2]
ORACLES = ROOT / ".venv" / "oracles"


# The networks of the ofa package and of torchvision themselves


@functools.cache
def told(*arguments: str) -> dict[str, Any]:
    if not (ORACLES / "ofa").is_dir() or not (ORACLES / "torchvision").is_dir():
        pytest.skip(f"the ofa package is not in {ORACLES}; `make install` puts it there")
    program = [sys.executable, "-m", "tests.programs.foreign_networks_program", str(ORACLES)]
    program += arguments
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "size", "names"),
    [
        pytest.param("OFAMobileNetV3", 7371**5, 5 + 20 + 20, marks=pytest.mark.slow),
        pytest.param(  # the last stage has one block
            "OFAProxylessNASNets", 7371**5 * 9, 5 + 21 + 21, marks=pytest.mark.slow
        ),
        pytest.param(
            "OFAResNets", 117**3 * 1053 * 2 * 2 * 3**5, 5 + 18 + 6, marks=pytest.mark.slow
        ),
    ],
)
def test_from_ofa_is_what_the_network_does_by_its_own_methods(
    kind: str, size: int, names: int
) -> None:
    net = told()[kind]
    assert net["same"]
    assert (net["size"], net["names"]) == (size, names)
    assert net.get("space of our own", True)
    assert len({row["subnet"] for row in net["rows"]}) == 4
    for row in net["rows"]:
        assert row["spread"] > 0.001
        assert row["active"] == 0, row
        assert row["extracted"] < 1e-5, row
        assert row["sliced"]
        assert not row["elastic"], "an extraction has no trace of elasticity"
        assert row["macs"][0] == row["macs"][1]
        assert row["params"][0] == row["params"][1]
    assert len({row["params"][0] for row in net["rows"]}) == 4
    assert sum(row["smaller"] for row in net["rows"]) >= 3  # the largest ResNet has all weights
    assert net["a copy activates itself"]
    assert net["extraction leaves what was in force"]
    assert net["recalibrated"] < 1e-5
    assert_clear(net["a subnet"], "from_ofa() got a", "which is none of 'OFAMobileNetV3'")


@pytest.mark.slow
def test_from_ofa_of_networks_that_were_built_with_other_lists() -> None:
    nets = told("small")
    by_depth = {1: 2, 2: 2 + 4}  # of a stage: the expansions of as many blocks
    assert nets["one kernel size"] == {
        "size": 2**20,
        "depths": 5,
        "gap": pytest.approx(0, abs=1e-4),
    }
    sizes = {"repeated values": ((2 + 4) ** 5 * 2, 5)}  # two kernels, one expansion
    stage = sum(by_depth.values()) - 2
    sizes |= {
        "three stages": (2 * stage**3, 4),
        "lists of two lengths": (2 * stage**2, 3),
        "five stages, of which four are built": (2 * stage**4, 5),
    }
    for name, (size, depths) in sizes.items():
        assert (nets[name]["size"], nets[name]["depths"]) == (size, depths), name
        assert nets[name]["gap"] < 1e-4, name
    for name, parts in {
        "depth 0": ["SpaceError", "a OFAMobileNetV3 with depth_list=[0, 1]", "numbers from 1"],
        "a negative depth": ["a OFAResNets with depth_list=[-1, 0]", "whole numbers from 0"],
        "one value for all": ["SpaceError", "single subnet"],
        "no blocks": ["OFAResNets with STAGE_WIDTH_LIST=[32, 64], BASE_DEPTH_LIST=[1, 0]"],
        "other widths than it was built with": ["STAGE_WIDTH_LIST=[8, 16, 32]", "[[32], [64]"],
        "other depths than it was built with": ["with 3 stages of [2, 2, 2]", "3 of [3, 3, 5]"],
    }.items():
        for part in parts:
            assert part in nets[name], nets[name]


@pytest.mark.parametrize(
    ("kind", "attributes", "error", "parts"),
    [
        ("OFAResNets", {}, SearchError, ["OFAResNets without depth_list", "elastic("]),
        ("OFAMobileNetV3", {}, SearchError, ["OFAMobileNetV3 without block_group_info"]),
        (
            "OFAProxylessNASNets",
            {"block_group_info": [[1, 2]], "depth_list": []},
            SpaceError,
            ["OFAProxylessNASNets with depth_list=[]", "one or more whole numbers from 1"],
        ),
        (
            "OFAMobileNetV3",
            {"block_group_info": [[1, 2]], "depth_list": [1, 2], "ks_list": None},
            SpaceError,
            ["with ks_list=None", "one or more positive numbers"],
        ),
        (
            "OFAMobileNetV3",
            {"block_group_info": [[1, 2]], "depth_list": [1, 2], "ks_list": [[3, 5]]},
            SpaceError,
            ["with ks_list=[[3, 5]]"],
        ),
    ],
)
def test_from_ofa_of_a_network_that_has_only_the_name(
    kind: str, attributes: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    net = type(kind, (nn.Module,), attributes)()
    with pytest.raises(error) as caught:
        from_ofa(net)
    assert_clear(caught.value, *parts)
    assert not hasattr(net, "search_space")


def test_from_ofa_of_something_else() -> None:
    for other in (nn.Linear(2, 2), 3, nn.Linear, LitMlp()):
        with pytest.raises(SearchError) as caught:
            from_ofa(other)
        assert_clear(caught.value, f"got a {type(other).__name__}", "'OFAResNets'", "elastic(")


@pytest.mark.slow
def test_the_blocks_of_torchvisions_networks_that_may_be_skipped() -> None:
    nets = told()["torchvision"]
    assert nets["resnet18"]["blocks"] == [f"layer{s}" for s in ("1.0", "1.1", "2.1", "3.1", "4.1")]
    rest = {1: [1, 2], 2: [1, 2, 3], 3: [1, 2, 3, 4, 5], 4: [1, 2]}
    assert nets["resnet50"]["blocks"] == [f"layer{s}.{b}" for s, bs in rest.items() for b in bs]
    blocks = [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]  # its table 2: stages of 2, 3, 4, 3, 3, 1 blocks
    assert nets["mobilenet_v2"]["blocks"] == [f"features.{b}" for b in blocks]
    stages = {1: 3, 3: 3, 5: 9, 7: 3}
    assert nets["convnext_tiny"]["blocks"] == [
        f"features.{s}.{b}" for s, n in stages.items() for b in range(n)
    ]
    assert_clear(nets["densenet121"], "ElasticityError", "DenseNet has no block that adds")
    for name in ("resnet18", "resnet50", "mobilenet_v2", "convnext_tiny"):
        assert nets[name]["difference"] == 0, name
        assert nets[name]["restored"], name
        assert nets[name]["fewer"], name


# A network with the methods of whittle (whittle.modules.Linear, whittle.models.gpt.GPT)


class WhittleLinear(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.reset_super_network()

    def set_sub_network(self, sub_network_in: int, sub_network_out: int) -> None:
        self.sub_network_in, self.sub_network_out = sub_network_in, sub_network_out

    def reset_super_network(self) -> None:
        self.set_sub_network(self.in_features, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight[: self.sub_network_out, : self.sub_network_in]
        return F.linear(x, weight, self.bias[: self.sub_network_out])


class WhittleMlp(nn.Module):
    """64 -> n_embd -> layers of (n_embd -> intermediate -> n_embd) -> 10."""

    def __init__(self, n_embd: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.n_embd, self.n_layer = n_embd, layers
        self.embed = WhittleLinear(64, n_embd)
        self.up = nn.ModuleList(WhittleLinear(n_embd, 4 * n_embd) for _ in range(layers))
        self.down = nn.ModuleList(WhittleLinear(4 * n_embd, n_embd) for _ in range(layers))
        self.head = WhittleLinear(n_embd, 10)
        self.reset_super_network()

    def set_sub_network(
        self,
        sub_network_n_embd: int,
        sub_network_intermediate_size: list[int],
        sub_network_n_layers: int,
        sample_random_indices: bool = False,
    ) -> None:
        assert not sample_random_indices
        self.sub_network_n_layers = sub_network_n_layers
        self.embed.set_sub_network(64, sub_network_n_embd)
        for i in range(sub_network_n_layers):  # the others keep what was set before, as theirs do
            size = sub_network_intermediate_size[i]
            self.up[i].set_sub_network(sub_network_n_embd, size)
            self.down[i].set_sub_network(size, sub_network_n_embd)
        self.head.set_sub_network(sub_network_n_embd, 10)

    def select_sub_network(self, config: dict[str, Any]) -> None:
        width = config["embed_dim"]
        sizes = [config["mlp_ratio"] * width for _ in range(config["depth"])]
        self.set_sub_network(width, sizes, config["depth"])

    def reset_super_network(self) -> None:
        self.sub_network_n_layers = self.n_layer
        for module in [self.embed, *self.up, *self.down, self.head]:
            module.reset_super_network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(1))
        for up, down in zip(
            self.up[: self.sub_network_n_layers],
            self.down[: self.sub_network_n_layers],
            strict=True,
        ):
            x = x + down(up(x).relu())
        return self.head(x)


BY_NAME = {
    "sub_network_n_embd": [4, 8, 16],
    "sub_network_n_layers": [1, 2, 3],
    "sub_network_intermediate_size.0": [8, 64],
    "sub_network_intermediate_size.1": Choice([8, 64], when={"sub_network_n_layers": [2, 3]}),
    "sub_network_intermediate_size.2": Choice([8, 64], when={"sub_network_n_layers": [3]}),
}
SELECTED = {"embed_dim": [4, 8, 16], "mlp_ratio": [1, 2, 4], "depth": [1, 2, 3]}


@pytest.mark.parametrize(("space", "size"), [(BY_NAME, 3 * (2 + 4 + 8)), (SELECTED, 27)])
def test_whittle_by_arguments_and_by_selection(space: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    plain = WhittleMlp()
    before = copy.deepcopy(plain)
    net = from_whittle(plain, SearchSpace(space))
    assert net is plain
    assert net.active_subnet is None
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(net(x), before(x))  # the whole network is in force
    assert net.search_space().size == size
    check_elastic(net, x)
    for subnet in net.search_space():
        values = subnet.grouped()
        before.reset_super_network()
        if space is BY_NAME:
            before.set_sub_network(**values)
        else:
            before.select_sub_network(values)
        net.activate(subnet)
        assert torch.equal(net(x), before(x))
        assert net.embed.sub_network_out == subnet[next(iter(space))]
    frozen = extract(net, net.search_space().smallest)
    assert not frozen.sliced
    assert not any(p.requires_grad for p in frozen.parameters())
    before.reset_super_network()
    net.activate(net.search_space().smallest)
    assert torch.equal(frozen(x), net(x))


def test_nothing_of_the_last_subnet_stays_in_a_whittle_network() -> None:
    net = from_whittle(WhittleMlp(), SearchSpace(BY_NAME))
    net.activate(net.search_space().smallest)
    net.activate(
        net.search_space().subnet({**net.search_space().largest, "sub_network_n_layers": 1})
    )
    assert net.up[2].sub_network_out == 64


def test_the_configuration_of_whittle_may_be_written_by_a_function() -> None:
    space = SearchSpace(width=[4, 16], depth=[1, 3])
    net = from_whittle(
        WhittleMlp(),
        space,
        config=lambda s: {"embed_dim": s["width"], "mlp_ratio": 2, "depth": s["depth"]},
    )
    net.activate(space.subnet(width=4, depth=3))
    assert (net.embed.sub_network_out, net.up[2].sub_network_out) == (4, 8)


def test_a_whittle_network_is_searched() -> None:
    class Lit(LitMlp):
        def __init__(self) -> None:
            super().__init__()
            self.net = from_whittle(WhittleMlp(), SearchSpace(SELECTED))

    L.seed_everything(0, verbose=False)
    search = SubnetSearch(
        objectives={"val_acc": "max", "macs": "min"},
        strategy="random",
        budget=4,
        storage=None,
        trainer=quiet_trainer(),
    )
    result = search.fit(Lit(), Digits(), progress=False)
    assert len({e.values["macs"] for e in result.history}) == 4
    largest = result.history[0]
    assert largest.values["macs"] == 64 * 16 + 3 * 2 * 16 * 64 + 16 * 10


@pytest.mark.parametrize(
    ("net", "space", "parts"),
    [
        (nn.Linear(2, 2), SELECTED, ["from_whittle() got a Linear", "no reset_super_network()"]),
        (3, SELECTED, ["from_whittle() got a int, which is not an nn.Module"]),
        (WhittleMlp(), None, ["from_whittle(space=None) is not a SearchSpace"]),
        (
            WhittleMlp(),
            {"embed_dim": [4, 8], "mlp_ratio": [1], "depht": [1, 2]},
            ["The space does not fit WhittleMlp", "KeyError: 'depth'"],
        ),
        (
            WhittleMlp(),
            {**SELECTED, "depth": [1, 9]},
            ["The space does not fit WhittleMlp: Subnet(embed_dim=16", "depth=9) raises"],
        ),
        (
            WhittleLinear(4, 4),
            {"sub_network_int": [1, 2], "sub_network_out": [1, 2]},
            [
                "'sub_network_int' is not an argument of set_sub_network()",
                "Did you mean 'sub_network_in'",
            ],
        ),
        (
            WhittleLinear(4, 4),
            {"sub_network_in": [1, 2]},
            ["set_sub_network() needs 'sub_network_out', which is not a choice"],
        ),
    ],
)
def test_whittle_networks_and_spaces_that_do_not_fit(
    net: Any, space: Any, parts: list[str]
) -> None:
    with pytest.raises((SearchError, SpaceError)) as caught:
        from_whittle(net, SearchSpace(space) if space else space)
    assert_clear(caught.value, *parts)
    assert not hasattr(net, "search_space")


@pytest.mark.parametrize(
    ("config", "parts"),
    [(lambda s: {"depth": s["depht"]}, ["'depht'"]), (lambda s: None, ["TypeError"])],
)
def test_a_configuration_of_whittle_that_fails(config: Any, parts: list[str]) -> None:
    with pytest.raises(SpaceError) as caught:
        from_whittle(WhittleMlp(), SearchSpace(SELECTED), config=config)
    assert_clear(caught.value, "config= of from_whittle() fails for Subnet(", *parts)


def test_a_whittle_network_without_a_way_to_set_it() -> None:
    class Half(nn.Module):
        def reset_super_network(self) -> None: ...

    with pytest.raises(SearchError) as caught:
        from_whittle(Half(), SearchSpace(SELECTED))
    assert_clear(caught.value, "Half", "neither select_sub_network() nor set_sub_network()")


# A network with the methods of HAT (fairseq.modules.LinearSuper, TransformerSuperModel)


class LinearSuper(nn.Linear):
    """Keeps slices of its weight from one `set_sample_config` to the next, as HAT's does."""

    samples: dict[str, torch.Tensor]

    def set_sample_config(self, sample_in_dim: int, sample_out_dim: int) -> None:
        self.samples = {
            "weight": self.weight[:, :sample_in_dim][:sample_out_dim, :],
            "bias": self.bias[:sample_out_dim],
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.samples["weight"], self.samples["bias"])


class HatLayer(nn.Module):
    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = LinearSuper(dim, ffn), LinearSuper(ffn, dim)

    def set_sample_config(self, is_identity_layer: bool, dim: int = 0, ffn: int = 0) -> None:
        self.is_identity_layer = is_identity_layer
        if not is_identity_layer:
            self.fc1.set_sample_config(dim, ffn)
            self.fc2.set_sample_config(ffn, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.is_identity_layer else x + self.fc2(self.fc1(x).relu())


class HatPart(nn.Module):
    def __init__(self, part: str, inputs: int, dim: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.part, self.inputs = part, inputs
        self.embed = LinearSuper(inputs, dim)
        self.layers = nn.ModuleList(HatLayer(dim, ffn) for _ in range(layers))

    def set_sample_config(self, config: dict[str, Any]) -> None:
        own = config[self.part]
        dim = own[f"{self.part}_embed_dim"]
        inputs = config["encoder"]["encoder_embed_dim"] if self.part == "decoder" else self.inputs
        self.embed.set_sample_config(inputs, dim)
        for i, layer in enumerate(self.layers):
            if i < own[f"{self.part}_layer_num"]:
                ffn = own[f"{self.part}_ffn_embed_dim"][i]  # a list for all layers
                layer.set_sample_config(is_identity_layer=False, dim=dim, ffn=ffn)
            else:
                layer.set_sample_config(is_identity_layer=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class HatModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = HatPart("encoder", 8, 12, 24, layers=3)
        self.decoder = HatPart("decoder", 12, 10, 20, layers=2)

    def set_sample_config(self, config: dict[str, Any]) -> None:
        self.encoder.set_sample_config(config)
        self.decoder.set_sample_config(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x)).sum(-1)


CHOICES = {  # as get_all_choices(args) has them: the largest first
    "encoder": {
        "encoder_embed_dim": [12, 6],
        "encoder_layer_num": [3, 2],
        "encoder_ffn_embed_dim": [24, 12, 6],
    },
    "decoder": {
        "decoder_embed_dim": [10, 5],
        "decoder_layer_num": [2, 1],
        "decoder_ffn_embed_dim": [20, 10],
    },
}


def hat() -> HatModel:
    torch.manual_seed(0)
    return from_hat(HatModel(), CHOICES)


@pytest.mark.parametrize(
    ("lists", "parts"),
    [
        ({"encoder_embed_dim": 12}, ["'encoder_embed_dim': 12", "a list of one or more numbers"]),
        ({"encoder_ffn_embed_dim": []}, ["'encoder_ffn_embed_dim': []", "one or more numbers"]),
        ({"encoder_layer_num": []}, ["'encoder_layer_num': []", "whole numbers from 0"]),
        ({"encoder_layer_num": [1.5]}, ["'encoder_layer_num': [1.5]", "whole numbers from 0"]),
        ({"encoder_layer_num": "23"}, ["'encoder_layer_num': '23'", "whole numbers from 0"]),
    ],
)
def test_choices_of_hat_that_are_no_lists(lists: dict[str, Any], parts: list[str]) -> None:
    net = HatModel()
    with pytest.raises(SpaceError) as caught:
        from_hat(net, {**CHOICES, "encoder": {**CHOICES["encoder"], **lists}})
    assert_clear(caught.value, "from_hat() got", *parts)
    assert not hasattr(net, "search_space")


def test_a_value_that_hat_lists_twice_is_one() -> None:
    lists = {**CHOICES["encoder"], "encoder_embed_dim": [12, 6, 12], "encoder_layer_num": [3, 2, 3]}
    net = from_hat(HatModel(), {**CHOICES, "encoder": lists})
    assert net.search_space() == hat().search_space()


def test_the_space_of_a_hat_network_is_that_of_its_choices() -> None:
    space = hat().search_space()
    assert space.size == 2 * (3**2 + 3**3) * 2 * (2 + 2**2)
    assert space.largest.grouped() == {
        "encoder_layer_num": 3,
        "encoder_embed_dim": 12,
        "encoder_ffn_embed_dim": [24] * 3,
        "decoder_layer_num": 2,
        "decoder_embed_dim": 10,
        "decoder_ffn_embed_dim": [20] * 2,
    }
    assert space.choices["encoder_ffn_embed_dim.2"].when == {"encoder_layer_num": (3,)}
    assert space.choices["encoder_ffn_embed_dim.1"].when == {}


def test_a_hat_network_does_what_its_own_configuration_says() -> None:
    net, x = hat(), torch.randn(4, 8)
    theirs = copy.deepcopy(HatModel())
    theirs.load_state_dict(net.state_dict())
    check_elastic(net, x)
    for subnet in [net.search_space().smallest, *net.search_space().sample(20, 0)]:
        theirs.set_sample_config(
            {
                part: {
                    f"{part}_embed_dim": subnet[f"{part}_embed_dim"],
                    f"{part}_layer_num": subnet[f"{part}_layer_num"],
                    f"{part}_ffn_embed_dim": [
                        subnet[f"{part}_ffn_embed_dim.{i}"] for i in range(layers)
                    ],
                }
                for part, layers in (("encoder", 3), ("decoder", 2))
            }
        )
        net.activate(subnet)
        with torch.no_grad():
            assert torch.equal(net(x), theirs(x))
            frozen = extract(net, subnet)
            assert torch.equal(frozen(x), theirs(x))
        assert not frozen.sliced


def test_a_hat_network_can_be_extracted_and_trained_on() -> None:
    """Its kept slices are of a graph, which torch does not copy, and must be again afterwards."""
    net, x = hat(), torch.randn(4, 8)
    net.activate(net.search_space().largest)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    frozen = extract(net, net.search_space().smallest)
    with torch.no_grad():
        before = frozen(x)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        assert torch.equal(frozen(x), before)  # it has weights of its own


def test_flat_configurations_and_functions() -> None:
    class Flat(HatModel):
        def set_sample_config(self, config: dict[str, Any]) -> None:
            self.got = config
            both = {"layer_num": config["depth"], "ffn_embed_dim": config["ffn"]}
            whole = {"encoder": {"embed_dim": 12, **both}, "decoder": {"embed_dim": 10, **both}}
            super().set_sample_config(
                {p: {f"{p}_{k}": v for k, v in values.items()} for p, values in whole.items()}
            )

    space = SearchSpace({"depth": [1, 2], "ffn.0": [10, 20], "ffn.1": [10, 20]})
    net = from_hat(Flat(), space)
    net.activate(space.subnet(depth=2, ffn=[10, 20]))
    assert net.got == {"depth": 2, "ffn": [10, 20]}
    net = from_hat(
        Flat(), SearchSpace(d=[1, 2]), config=lambda s: {"depth": s["d"], "ffn": [10] * 2}
    )
    net.activate(net.search_space().smallest)
    assert net.got == {"depth": 1, "ffn": [10, 10]}


@pytest.mark.parametrize(
    ("net", "space", "parts"),
    [
        (nn.Linear(2, 2), CHOICES, ["from_hat() got a Linear, which has no set_sample_config()"]),
        (HatModel, CHOICES, ["from_hat() got a type, which is not an nn.Module"]),
        (HatModel(), None, ["from_hat(space=None) is not a SearchSpace"]),
        (HatModel(), {"encoder": [1, 2]}, ["'encoder' holds [1, 2]", "'encoder_layer_num'"]),
        (
            HatModel(),
            {"encoder": CHOICES["encoder"]},
            ["The space does not fit HatModel", "KeyError: 'decoder'"],
        ),
        (
            HatModel(),
            {**CHOICES, "decoder": {"decoder_layer_num": [1, 2], "decoder_ffn_embed_dim": [20]}},
            ["The space does not fit HatModel", "KeyError: 'decoder_embed_dim'", "Name choices"],
        ),
    ],
)
def test_hat_networks_and_spaces_that_do_not_fit(net: Any, space: Any, parts: list[str]) -> None:
    with pytest.raises((SearchError, SpaceError)) as caught:
        from_hat(net, space)
    assert_clear(caught.value, *parts)
