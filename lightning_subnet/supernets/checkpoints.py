# SPDX-License-Identifier: Apache-2.0
"""Weights from elsewhere: the checkpoints of the `ofa` package, and loading with clear messages."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from lightning_subnet.errors import SpaceError, listed

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
            f"{original!r} is no name of an OFA MobileNetV3. "
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


def load_weights(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict, or say which tensor does not fit first.

    Raises:
        SpaceError: A tensor is missing, unknown or has another shape; nothing is loaded then.

    Example:
        >>> load_weights(nn.Linear(2, 3), nn.Linear(4, 3).state_dict())
        Traceback (most recent call last):
        ...
        lightning_subnet.errors.SpaceError: The weights do not fit Linear: 'weight' is (3, 4) in ...
    """
    own = module.state_dict()
    name = type(module).__name__
    for key, tensor in own.items():
        if key in state and state[key].shape != tensor.shape:
            msg = (
                f"The weights do not fit {name}: {key!r} is {tuple(state[key].shape)} in the state "
                f"and {tuple(tensor.shape)} here. Build the network in the size of the checkpoint."
            )
            raise SpaceError(msg)
    missing, unknown = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or unknown:
        msg = (
            f"The weights do not fit {name}: missing {listed(missing, 3)}; unknown "
            f"{listed(unknown, 3)}. Build the network in the size of the checkpoint."
        )
        raise SpaceError(msg)
    module.load_state_dict(dict(state))
