# SPDX-License-Identifier: Apache-2.0
"""Masks that are told by the places of weights alone, without what the package knows of groups."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.inputs import arguments
from lightning_subnet._torch.outputs import named_outputs


def outputs(net: nn.Module, example: Any) -> dict[str, torch.Tensor]:
    args, kwargs = arguments(net, example)
    with torch.no_grad():
        output = net.eval()(*args, **kwargs)
    return {n: x for n, x in named_outputs(output).items() if "past_key_values" not in n}


def shaken(net: nn.Module) -> nn.Module:
    """Return a network without weights that are zero, which would hide what they multiply."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p) * (1 if p.ndim < 2 else p[0].numel() ** -0.5))
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return net.eval()


def readers(net: nn.Module) -> dict[str, int]:
    """Return the weights that read channels, with the dimension that they read along."""
    dims = {}
    for name, module in net.named_modules():
        is_conv = isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1
        if isinstance(module, nn.Linear) or is_conv:
            dims[f"{name}.weight"] = 1
        elif type(module).__name__ == "Conv1D":
            dims[f"{name}.weight"] = 0
        for own, p in module.named_parameters(recurse=False):
            if p.ndim == 3 and own in ("gate_up_proj", "down_proj"):  # all experts of a layer
                dims[f"{name}.{own}"] = 2
    return {name.removeprefix("."): dim for name, dim in dims.items()}


def mark(net: nn.Module) -> None:
    """Let each number of each parameter say its own place."""
    with torch.no_grad():
        for p in net.parameters():
            assert p.numel() < 2**24, "float32 counts no further"
            p.copy_(torch.arange(p.numel()).view_as(p))


def marks(part: nn.Module, whole: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return which indices of each dimension of each parameter a part of a marked network has."""
    shapes = {n: p.shape for n, p in whole.named_parameters()}
    result = {}
    for n, p in part.named_parameters():
        shape = shapes[n]
        steps = [prod(shape[d + 1 :]) for d in range(len(shape))]
        result[n] = [
            (p.long() // step % size).unique() for step, size in zip(steps, shape, strict=True)
        ]
    return result


def forget(net: nn.Module, kept: Mapping[str, list[torch.Tensor]]) -> None:
    """Set weights to zero that read channels which are not kept."""
    tensors = dict(net.named_parameters())
    with torch.no_grad():
        for name, dim in readers(net).items():
            if name in kept:
                away = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                away[kept[name][dim]] = False
                tensors[name].index_fill_(dim, away.nonzero().flatten(), 0.0)
