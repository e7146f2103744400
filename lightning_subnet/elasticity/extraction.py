# SPDX-License-Identifier: Apache-2.0
"""Extraction: a subnet as a plain module of its own, with a copy of the weights it uses."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet.elasticity.layers import ElasticLayer, ElasticSequential
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.errors import ElasticityError, MeasurementError
from lightning_subnet.space.subnet import Subnet


def extract(module: nn.Module, subnet: Subnet, example_input: Any = None) -> nn.Module:
    """Return a subnet as a module of its own.

    A network with an `extract(subnet)` method does it itself; those of this package return ordinary
    torch layers with no trace of elasticity. Of any other network a frozen copy is returned, with
    the subnet in force: its attribute `sliced` is False, it keeps all weights, and so its size and
    often its latency are those of the super-network.

    Args:
        module: A super-network, or a module with one elastic descendant, which is then extracted.
        subnet: The subnet.
        example_input: Arguments of the super-network's forward pass: a tensor, a tuple of
            positional or a dict of keyword arguments.

    Returns:
        The module, in eval mode, with a copy of the weights; its attribute `sliced` is True if it
        is the subnet only.

    Raises:
        ElasticityError: The network's own `extract` returned something other than a module.

    Example:
        >>> from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> smallest = extract(net, net.search_space().smallest)
        >>> smallest.sliced, smallest(torch.zeros(1, 1, 8, 8)).shape
        (True, torch.Size([1, 10]))
    """
    part = elastic_part(module)
    hook = getattr(part, "extract", None)
    if callable(hook):
        plain: Any = hook(subnet)
        if not isinstance(plain, nn.Module):
            msg = (
                f"{type(part).__name__}.extract() returned {plain!r:.60} for {subnet!r:.200}. "
                "Return the subnet as a network of its own, an nn.Module."
            )
            raise ElasticityError(msg)
        plain.sliced = True  # type: ignore[assignment] # a mark
        return plain.eval()
    with activated(module, subnet):
        frozen = detached_copy(part, {})
    assert isinstance(frozen, nn.Module)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    copied: Any = frozen
    copied.activate(subnet)  # slices that it keeps are then of its own weights
    frozen.sliced = False  # type: ignore[assignment] # a mark
    return frozen.eval()


def detached_copy(module: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy of a module that knows no Trainer.

    Args:
        module: A network or a LightningModule.
        memo: Objects that stand in the place of others, by the id of those.
    """
    # Lightning's `trainer` raises where there is none, so its private attribute is asked.
    owners = [child for child in module.modules() if getattr(child, "_trainer", None) is not None]
    trainers = {id(child._trainer): None for child in owners}
    return copy.deepcopy(module, {**trainers, **_of_a_graph(module), **memo})


def _of_a_graph(part: Any) -> dict[int, Any]:
    """Return copies of tensors that torch does not copy: slices of weights that modules keep."""
    slices = (
        tensor
        for child in part.modules()
        for name, value in vars(child).items()
        if name not in ("_parameters", "_buffers", "_modules")
        for tensor in tree_leaves(value)
        if isinstance(tensor, torch.Tensor) and not tensor.is_leaf
    )
    return {id(tensor): tensor.detach().clone() for tensor in slices}


def plain_state(module: nn.Module, *inputs: Any) -> dict[str, torch.Tensor]:
    """Return the state dict of the subnet in force, as plain layers in the same tree would have it.

    Args:
        module: A network of elastic and ordinary layers.
        *inputs: An input of `forward`; one pass shows how many channels each layer gets.

    Raises:
        MeasurementError: A layer is used twice with different numbers of channels.
    """
    widths: dict[nn.Module, int] = {}

    def remember(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        last = isinstance(layer, nn.Linear | nn.LayerNorm)
        width = x.shape[-1] if last else x.shape[1]
        if isinstance(layer, nn.Embedding):  # tokens have no channels
            width = 1
        if widths.setdefault(layer, width) != width:
            msg = f"{type(layer).__name__} is used with {widths[layer]} and with {width} channels."
            raise MeasurementError(msg)

    leaves = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, ElasticLayer) and not isinstance(layer, ElasticSequential)
    }
    hooks = [layer.register_forward_pre_hook(remember) for layer in leaves.values()]
    try:
        with evaluating(module), torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    inactive = [
        f"{name}.{i}."
        for name, layer in module.named_modules()
        if isinstance(layer, ElasticSequential)
        for i in range(layer.active_depth, len(layer))
    ]
    state = {
        key: value.detach().clone()
        for key, value in module.state_dict().items()
        if not key.startswith(tuple(inactive))
        and not any(key.startswith(f"{name}.") for name in leaves)
    }
    for name, layer in leaves.items():
        if layer in widths:
            state |= {f"{name}.{k}": v for k, v in layer.plain(widths[layer]).state_dict().items()}
    return state
