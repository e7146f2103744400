# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lightning_subnet.errors import SpaceError
from lightning_subnet.supernets import (
    ElasticGPT,
    ElasticMobileNetV3,
    ElasticResNet,
    ElasticTransformer,
    ElasticViT,
    MobileNetV3Config,
    ResNetConfig,
)
from lightning_subnet.supernets._blocks.checkpoints import (
    from_ofa_mobilenet_v3,
    from_ofa_resnets,
    load_weights,
)
from tests.problems import assert_clear


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def message(net: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """The message, after proof that nothing was loaded."""
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(SpaceError) as caught:
        load_weights(net, state)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    return str(caught.value)


def test_what_fits_is_loaded() -> None:
    net, other = network(), network()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    load_weights(net, other.state_dict())
    for name, tensor in other.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name


def test_the_first_tensor_of_another_size_is_named_with_both_shapes() -> None:
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(5, 7))
    text = message(network(), other.state_dict())
    assert_clear(text, "do not fit Sequential", "'2.weight'", "(7, 5) in the state", "(2, 3) here")
    assert "2.bias" not in text


def test_missing_and_unknown_tensors_are_named() -> None:
    state = network().state_dict()
    state["head.weight"] = state.pop("2.weight")
    del state["1.running_mean"]
    text = message(network(), state)
    assert_clear(text, "missing '1.running_mean', '2.weight'", "unknown 'head.weight'")
    assert_clear(message(network(), {}), "missing", "... (9 in all)", "unknown nothing")


def test_a_checkpoint_of_another_size_of_the_same_network() -> None:
    with torch.device("meta"):
        narrow = ElasticMobileNetV3(MobileNetV3Config(width_mult=1.0))
        wide = ElasticMobileNetV3(MobileNetV3Config(width_mult=1.2))
        shallow = ElasticMobileNetV3(MobileNetV3Config(depths=(2, 3)))
    with pytest.raises(SpaceError, match=r"'stem\.0\.weight' is \(24, 3, 3, 3\) .*\(16, 3, 3, 3\)"):
        load_weights(narrow, wide.state_dict())
    with pytest.raises(SpaceError, match=r"missing 'stages\.0\.3\.[^;]*in all\); unknown nothing"):
        load_weights(narrow, shallow.state_dict())


NAMES = {
    "first_conv.conv.weight": "stem.0.weight",
    "first_conv.bn.running_var": "stem.1.running_var",
    "blocks.0.conv.depth_conv.conv.weight": "first.depthwise.0.weight",
    "blocks.0.conv.point_linear.bn.bias": "first.project.1.bias",
    "blocks.1.conv.inverted_bottleneck.conv.conv.weight": "stages.0.0.expand.0.weight",
    "blocks.4.mobile_inverted_conv.depth_conv.bn.bn.weight": "stages.0.3.depthwise.1.weight",
    "blocks.5.mobile_inverted_conv.depth_conv.se.fc.reduce.bias": "stages.1.0.se.reduce.bias",
    "blocks.20.conv.depth_conv.conv.7to5_matrix": "stages.4.3.depthwise.0.transforms.7to5",
    "blocks.7.conv.depth_conv.conv.conv.weight": "stages.1.2.depthwise.0.weight",
    "final_expand_layer.bn.weight": "expand.1.weight",
    "feature_mix_layer.conv.weight": "mix.0.weight",
    "classifier.linear.bias": "classifier.bias",
    "classifier.linear.linear.bias": "classifier.bias",
}


@pytest.mark.parametrize("original", NAMES)
def test_names_of_the_original(original: str) -> None:
    tensor = torch.zeros(1)
    assert from_ofa_mobilenet_v3({original: tensor}, 4) == {NAMES[original]: tensor}
    with torch.device("meta"):
        assert NAMES[original] in ElasticMobileNetV3().state_dict()


@pytest.mark.parametrize(
    "name", ["state_dict.x", "blocks.1.conv.unknown.conv.weight", "blocks.x.conv.a", "classifier"]
)
def test_names_that_the_original_does_not_have(name: str) -> None:
    with pytest.raises(SpaceError) as caught:
        from_ofa_mobilenet_v3({name: torch.zeros(1)}, 4)
    assert_clear(caught.value, repr(name), "Pass the state dict of OFAMobileNetV3")
    with pytest.raises(SpaceError, match="is not a name of an OFA MobileNetV3"):
        ElasticMobileNetV3.tiny().load_ofa({name: torch.zeros(1)})


RESNET_NAMES = {
    "input_stem.0.conv.conv.weight": "stem.0.0.weight",
    "input_stem.0.bn.bn.running_var": "stem.0.1.running_var",
    "input_stem.1.conv.conv.conv.weight": "stem.1.body.0.weight",
    "input_stem.1.conv.conv.weight": "stem.1.body.0.weight",  # as in the released checkpoint
    "input_stem.1.conv.bn.bias": "stem.1.body.1.bias",
    "input_stem.2.conv.weight": "stem_end.0.weight",
    "blocks.0.downsample.conv.conv.weight": "stages.0.0.downsample.1.weight",
    "blocks.4.downsample.bn.bn.running_mean": "stages.1.0.downsample.2.running_mean",
    "blocks.13.conv2.conv.weight": "stages.2.5.conv2.0.weight",
    "blocks.17.conv3.bn.bn.num_batches_tracked": "stages.3.3.conv3.1.num_batches_tracked",
    "classifier.linear.linear.weight": "classifier.weight",
    "classifier.linear.bias": "classifier.bias",
}


@pytest.mark.parametrize("original", RESNET_NAMES)
def test_names_of_the_original_resnet(original: str) -> None:
    tensor = torch.zeros(1)
    assert from_ofa_resnets({original: tensor}, [4, 4, 6, 4]) == {RESNET_NAMES[original]: tensor}
    with torch.device("meta"):
        assert RESNET_NAMES[original] in ElasticResNet().state_dict()


@pytest.mark.parametrize("name", ["blocks.1.conv4.conv.weight", "input_stem.3.conv.weight", "x"])
def test_names_that_the_original_resnet_does_not_have(name: str) -> None:
    with pytest.raises(SpaceError) as caught:
        ElasticResNet.tiny().load_ofa({name: torch.zeros(1)})
    assert_clear(caught.value, repr(name), "is not a name of an OFA ResNet50", "OFAResNets")


def test_a_resnet_checkpoint_of_another_size() -> None:
    with torch.device("meta"):
        net, more = ElasticResNet(), ElasticResNet(ResNetConfig(n_classes=10))
        wide = ElasticResNet(ResNetConfig(width_mults=(0.65, 1.2)))
    tensor = torch.zeros(1)
    with pytest.raises(SpaceError) as caught:
        net.load_ofa({"blocks.18.conv1.conv.conv.weight": tensor})
    assert_clear(caught.value, "is of block 18, but this network has 18 blocks", "base_depths")
    pattern = r"'stem\.0\.0\.weight' is \(40, 3, 3, 3\) in the state and \(32, 3, 3, 3\) here"
    with pytest.raises(SpaceError, match=pattern):
        load_weights(net, wide.state_dict())
    with pytest.raises(SpaceError, match=r"'classifier\.weight' is \(10, 2048\) in the state"):
        load_weights(net, more.state_dict())
    with pytest.raises(SpaceError, match=r"missing 'stem\.0\.0\.weight'"):
        net.load_ofa({"classifier.linear.linear.bias": torch.zeros(1000)})


OTHER_SIZES = {
    "MobileNetV3": (ElasticMobileNetV3.tiny, {"n_classes": 7}, "'classifier.weight' is (7, "),
    "ResNet": (ElasticResNet.tiny, {"n_classes": 7}, "'classifier.weight' is (7, "),
    "Transformer": (ElasticTransformer.tiny, {"vocab": 21}, "is (21, "),
    "GPT": (partial(ElasticGPT.tiny, vocab=20), {"embed": (16, 40)}, ", 40) in the state and ("),
    "ViT": (ElasticViT.tiny, {"patch_size": 4}, ") in the state and ("),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_weights_of_another_size_of_each_super_network(name: str) -> None:
    make, changes, told = OTHER_SIZES[name]
    torch.manual_seed(0)
    net, other = make(), make(**changes)
    text = message(net, other.state_dict())
    assert_clear(text, f"do not fit Elastic{name}", told, "Build the network in the size")
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    theirs = {k: tuple(v.shape) for k, v in other.state_dict().items()}
    first = next(k for k, v in shapes.items() if theirs.get(k, v) != v)
    assert f"{first!r} is {theirs[first]} in the state and {shapes[first]} here" in text
    same = make()
    load_weights(net, same.state_dict())
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("kind", ["mobilenet", "resnet"])
def test_checkpoints_of_the_original_in_another_size(kind: str) -> None:
    """Names as the released checkpoints have them; the shapes are those of another width."""
    with torch.device("meta"):
        if kind == "mobilenet":
            net, wide = ElasticMobileNetV3(), ElasticMobileNetV3(MobileNetV3Config(width_mult=1.2))
            ours, theirs = "stem.0.weight", "first_conv.conv.weight"
        else:
            net = ElasticResNet()
            wide = ElasticResNet(ResNetConfig(width_mults=(0.65, 1.2)))
            ours, theirs = "stem.0.0.weight", "input_stem.0.conv.weight"
    state = {theirs: wide.state_dict()[ours]}
    with pytest.raises(SpaceError) as caught:
        net.load_ofa(state)
    shape, own = (tuple(n.state_dict()[ours].shape) for n in (wide, net))
    assert_clear(caught.value, f"{ours!r} is {shape} in the state and {own} here")
