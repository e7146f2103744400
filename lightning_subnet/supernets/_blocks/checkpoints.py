# SPDX-License-Identifier: Apache-2.0
"""Checks of what may not fit a network: `ofa` checkpoints, weights, subnets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_subnet._messages import listed
from lightning_subnet.errors import InvalidSubnetError, SpaceError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

_BLOCK = re.compile(r"blocks\.(\d+)\.(?:conv|mobile_inverted_conv)\.(.+)")
_PARTS = {
    "inverted_bottleneck": "expand",
    "depth_conv": "depthwise",
    "point_linear": "project",
}
_ENDS = {
    "first_conv.conv": "stem.0",
    "first_conv.bn": "stem.1",
    "final_expand_layer.conv": "expand.0",
    "final_expand_layer.bn": "expand.1",
    "feature_mix_layer.conv": "mix.0",
    "classifier.linear": "classifier",
}
_STEM = re.compile(r"input_stem\.([012])\.(?:conv\.)?(conv|bn)\.(\w+)")
_BOTTLENECK = re.compile(r"blocks\.(\d+)\.(conv[123]|downsample)\.(conv|bn)\.(\w+)")


def from_ofa_mobilenet_v3(state: Mapping[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """Return the state dict of an `OFAMobileNetV3` under the names of `ElasticMobileNetV3`.

    Both layouts of the original are understood: that of the released checkpoints
    (`mobile_inverted_conv`) and that of the current package (`conv`).

    Args:
        state: The original's state dict (of a checkpoint, what is under `"state_dict"`).
        depth: The most blocks of a stage.

    Raises:
        SpaceError: A name that the original does not have.
    """
    renamed = {}
    for key, tensor in state.items():
        plain = re.sub(r"\b(conv|bn|linear)\.\1\.", r"\1.", key)
        renamed[_ofa_name(plain, depth, key)] = tensor
    return renamed


def _ofa_name(key: str, depth: int, original: str) -> str:
    """Return our name of one tensor, from a key without doubled parts."""
    stem, _, last = key.rpartition(".")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{last}"
    match = _BLOCK.fullmatch(key)
    part, _, rest = match[2].partition(".") if match else ("", "", "")
    if match is None or part not in _PARTS:
        msg = (
            f"{original!r} is not a name of an OFA MobileNetV3. "
            "Pass the state dict of OFAMobileNetV3 (of a checkpoint, what is under 'state_dict')."
        )
        raise SpaceError(msg)
    number = int(match[1]) - 1
    block = "first" if number < 0 else f"stages.{number // depth}.{number % depth}"
    if rest.startswith("se.fc."):
        return f"{block}.se.{rest.removeprefix('se.fc.')}"
    if rest.endswith("_matrix"):
        return f"{block}.depthwise.0.transforms.{rest.rpartition('.')[2].removesuffix('_matrix')}"
    return f"{block}.{_PARTS[part]}.{'0' if rest.startswith('conv.') else '1'}.{last}"


def from_ofa_resnets(
    state: Mapping[str, torch.Tensor], blocks: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return the state dict of an `OFAResNets` under the names of `ElasticResNet`.

    Both layouts of the original are understood: that of the released checkpoint (`conv.weight`) and
    that of the current package (`conv.conv.weight`).

    Args:
        state: The original's state dict (of a checkpoint, what is under `"state_dict"`).
        blocks: Blocks of each stage at full depth.

    Raises:
        SpaceError: A name that the original does not have, or a block beyond the last.
    """
    places = [f"stages.{s}.{b}" for s, n in enumerate(blocks) for b in range(n)]
    renamed = {}
    for key, tensor in state.items():
        plain = re.sub(r"\b(conv|bn|linear)\.\1\.", r"\1.", key)
        renamed[_ofa_resnet_name(plain, places, key)] = tensor
    return renamed


def _ofa_resnet_name(key: str, places: Sequence[str], original: str) -> str:
    """Return our name of one tensor, from a key without doubled parts."""
    if key in ("classifier.linear.weight", "classifier.linear.bias"):
        return key.replace(".linear", "")
    if match := _STEM.fullmatch(key):
        at = {"0": "stem.0", "1": "stem.1.body", "2": "stem_end"}[match[1]]
        return f"{at}.{0 if match[2] == 'conv' else 1}.{match[3]}"
    match = _BOTTLENECK.fullmatch(key)
    if match is None:
        msg = (
            f"{original!r} is not a name of an OFA ResNet50. "
            "Pass the state dict of OFAResNets (of a checkpoint, what is under 'state_dict')."
        )
        raise SpaceError(msg)
    number = int(match[1])
    if number >= len(places):
        msg = (
            f"{original!r} is of block {number}, but this network has {len(places)} blocks. "
            "Build it with the base_depths and depths of the checkpoint."
        )
        raise SpaceError(msg)
    inner = (0 if match[3] == "conv" else 1) + (match[2] == "downsample")  # behind the pooling
    return f"{places[number]}.{match[2]}.{inner}.{match[4]}"


def load_weights(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict, if all of it fits.

    Raises:
        SpaceError: A tensor is missing, unknown or has another shape; nothing is loaded then.

    Example:
        >>> load_weights(nn.Linear(2, 3), nn.Linear(4, 3).state_dict())
        Traceback (most recent call last):
        ...
        lightning_subnet.errors.SpaceError: The weights do not fit Linear: 'weight' is (3, 4) in ...
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    check_weights(type(module).__name__, shapes, state)
    module.load_state_dict(dict(state))


def check_weights(
    network: str, shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, torch.Tensor]
) -> None:
    """Refuse a state dict with other names or shapes than these.

    Raises:
        SpaceError: With the first tensor of another shape and both, or what is missing or unknown.

    Example:
        >>> check_weights("Net", {"weight": (2, 3)}, {"bias": torch.zeros(2)})
        Traceback (most recent call last):
        ...
        lightning_subnet.errors.SpaceError: The weights do not fit Net: missing 'weight'; ...
    """
    for key, shape in shapes.items():
        if key in state and tuple(state[key].shape) != shape:
            msg = (
                f"The weights do not fit {network}: {key!r} is {tuple(state[key].shape)} in the "
                f"state and {shape} here. Build the network in the size of the checkpoint."
            )
            raise SpaceError(msg)
    missing = [key for key in shapes if key not in state]
    unknown = [key for key in state if key not in shapes]
    if missing or unknown:
        msg = (
            f"The weights do not fit {network}: missing {listed(missing, 3)}; unknown "
            f"{listed(unknown, 3)}. Build the network in the size of the checkpoint."
        )
        raise SpaceError(msg)


def check_names(network: str, space: SearchSpace, subnet: Subnet) -> None:
    """Refuse a subnet without the choices of a network, before anything of it is put in force.

    Raises:
        InvalidSubnetError: A choice is missing: the subnet is of another size or kind.

    Example:
        >>> one, other = SearchSpace(d=[1, 2]), SearchSpace(d=[1, 2], w=[8, 16])
        >>> check_names("Net", other, one.largest)
        Traceback (most recent call last):
        ...
        lightning_subnet.errors.InvalidSubnetError: Net has the choice 'w', which Subnet(d=2) is ...
    """
    if missing := [name for name in space.names if name not in subnet]:
        msg = (
            f"{network} has the choice {missing[0]!r}, which {subnet!r:.80} is without: it is of "
            "another space. Take a subnet of this network's search_space()."
        )
        raise InvalidSubnetError(msg)


def check_value(subnet: Subnet, name: str, values: Sequence[float]) -> None:
    """Refuse a value that a network was not built with.

    Raises:
        InvalidSubnetError: The subnet has another value for the choice of this name.

    Example:
        >>> check_value(SearchSpace(d=[1, 2]).largest, "d", [1, 3])
        Traceback (most recent call last):
        ...
        lightning_subnet.errors.InvalidSubnetError: d=2 is not one of 1, 3, what this network ...
    """
    if subnet[name] not in values:
        msg = (
            f"{name}={subnet[name]!r} is not one of {listed(values)}, "
            "what this network was built with."
        )
        raise InvalidSubnetError(msg)
