# SPDX-License-Identifier: Apache-2.0
"""Extraction: a subnet as a plain module of its own, with a copy of the weights it uses."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_subnet._messages import listed
from lightning_subnet._torch.contexts import (
    default_type,
    default_types,
    evaluating,
    ordinary_tensors,
    random_state,
)
from lightning_subnet._torch.inputs import arguments, cloned
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.layers import ElasticLayer, ElasticSequential
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.elasticity.slicing.slicing import NotSliceable, Only, slice_network
from lightning_subnet.errors import ElasticityError, MeasurementError
from lightning_subnet.space.subnet import Subnet


def extract(
    module: nn.Module, subnet: Subnet, example_input: Any = None, *, only: Only | None = None
) -> nn.Module:
    """Return a subnet as a module of its own.

    A network with an `extract(subnet)` method does it itself; those of this package return ordinary
    torch layers with no trace of elasticity. Any other network is sliced by way of `torch.export`,
    if an example input is known: a `SlicedNetwork` runs the operators of the subnet, with weights
    of its own that are as large as the subnet reads them, and trains. What is computed of weights
    stays computed. What `forward` does besides operators of torch (counting, printing) is left out.

    Where that cannot be had, because the network decides by values, or for want of an example, a
    frozen copy is returned, with the subnet in force: its attribute `sliced` is False, it keeps all
    weights, and so its size and often its latency are those of the super-network. Its attribute
    `unsliced_because` says why.

    Args:
        module: A super-network, or a module with one elastic descendant, which is then extracted.
        subnet: The subnet.
        example_input: Arguments of the super-network's forward pass: a tensor, a tuple of
            positional or a dict of keyword arguments. None: its `example_input_array`, if any.
        only: What the subnet is for, where it is sliced by way of `torch.export`: `"inference"`
            saves half the time, and the result cannot be trained; `"example"` saves four fifths,
            and it also takes inputs of the sizes of the example only. None: for everything.

    Returns:
        The module, in eval mode, with a copy of the weights; its attribute `sliced` is True if it
        is the subnet only.

    Raises:
        ElasticityError: The network's own `extract` returned something other than a module, or the
            super-network itself; the network cannot run `example_input`; `only` is unknown.
        InvalidSubnetError: It is not a subnet of the space.

    Example:
        >>> from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> smallest = extract(net, net.search_space().smallest)
        >>> smallest.sliced, smallest(torch.zeros(1, 1, 8, 8)).shape
        (True, torch.Size([1, 10]))
    """
    with ordinary_tensors():
        return _extracted(elastic_part(module), subnet, example_input, only)


def _extracted(part: Any, subnet: Subnet, example_input: Any, only: Only | None) -> nn.Module:
    if only not in (None, *get_args(Only)):
        msg = f"only={only!r:.60} is not one of {listed(get_args(Only))}, or None."
        raise ElasticityError(msg)
    if not isinstance(subnet, Subnet):
        subnet = part.search_space().subnet(subnet)
    hook = getattr(part, "extract", None)
    if callable(hook):
        plain: Any = hook(subnet)
        if not isinstance(plain, nn.Module) or plain is part:
            what = "the super-network itself" if plain is part else f"{plain!r:.60}"
            msg = (
                f"{class_name(part)}.extract() returned {what} for {subnet!r:.200}. "
                "Return the subnet as a network of its own, an nn.Module."
            )
            raise ElasticityError(msg)
        plain.sliced = True  # type: ignore[assignment] # a mark
        return plain.eval()
    if example_input is None:
        example_input = getattr(part, "example_input_array", None)
    if example_input is None:
        reason = "no example input is known. Pass example_input=, as its forward() takes it"
        return frozen_copy(part, subnet, reason)
    with activated(part, subnet):
        copied = detached_copy(part, {})
    args, kwargs = arguments(part, example_input)
    try:
        return slice_network(copied, subnet, args, kwargs, only=only)
    except NotSliceable as error:
        _check_example(part, copied, subnet, example_input)
        return frozen_copy(part, subnet, str(error))


def _check_example(part: Any, copied: Any, subnet: Subnet, example_input: Any) -> None:
    """Refuse an example that the network itself cannot run: it is not why slicing failed.

    Args:
        part: The super-network.
        copied: A copy of it that is of no more use, with the subnet in force.
        subnet: The subnet.
        example_input: The example.
    """
    first: Exception | None = None
    for dtype in default_types(part):  # it may run under a Trainer of precision="bf16-true" alone
        args, kwargs = cloned(arguments(part, example_input))
        try:
            with evaluating(copied), random_state(0), torch.no_grad(), default_type(dtype):
                copied(*args, **kwargs)
            return
        except Exception as error:
            first = first or error
    msg = (
        f"{class_name(part)} failed on example_input= with {subnet!r:.200}: "
        f"{type(first).__name__}: {first!s:.150}. Pass arguments that its forward() takes."
    )
    raise ElasticityError(msg) from first


def frozen_copy(module: nn.Module, subnet: Subnet, reason: str = "") -> nn.Module:
    """Return a copy of a super-network with one subnet in force, and all weights.

    Slices of weights that it keeps as attributes are taken again when it is moved, cast, loaded or
    copied.

    Args:
        module: A super-network, or a module with one elastic descendant, which is then copied.
        subnet: The subnet.
        reason: Why it is not sliced, for its attribute `unsliced_because`.
    """
    part: Any = elastic_part(module)
    with ordinary_tensors():
        with activated(part, subnet):
            frozen = detached_copy(part, {})
        for parameter in frozen.parameters():
            parameter.requires_grad_(False)
        frozen.activate(subnet)  # slices that it keeps are then of its own weights
    frozen.sliced = False
    frozen.unsliced_because = reason
    if _keeps_tensors(frozen):
        _Kept(frozen, subnet).attach()
    return frozen.eval()  # type: ignore[no-any-return] # a module


def own_or_frozen(module: nn.Module, subnet: Subnet) -> nn.Module:
    """Return a subnet as the `extract` of its super-network gives it, or a frozen copy.

    For what needs neither true sizes nor an example input.

    Args:
        module: A super-network, or a module with one elastic descendant.
        subnet: The subnet.
    """
    own = callable(getattr(elastic_part(module), "extract", None))
    return extract(module, subnet) if own else frozen_copy(module, subnet)


class _Kept:
    """Takes the slices that a frozen copy keeps again, when its weights are others.

    Args:
        net: The copy.
        subnet: The subnet; one that is activated later takes its place.
    """

    def __init__(self, net: Any, subnet: Subnet) -> None:
        self._net, self._subnet = net, subnet

    def attach(self) -> None:
        """Follow the network; the methods live on the instance."""
        net = self._net
        net._apply, net.__deepcopy__ = self.apply, self.copy
        net.register_load_state_dict_post_hook(self.loaded)
        net.register_forward_pre_hook(self.before_forward)

    def again(self) -> None:
        """Activate."""
        self._net.activate(getattr(self._net, "active_subnet", None) or self._subnet)

    def apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast it."""
        result = type(self._net)._apply(self._net, fn, recurse)
        self.again()
        return result

    def loaded(self, _net: nn.Module, _keys: Any) -> None:
        """Weights were loaded."""
        self.again()

    def before_forward(self, net: nn.Module, _args: Any) -> None:
        """Weights may have learnt, and gradients go through slices of this pass alone."""
        if net.training:
            self.again()

    def copy(self, memo: dict[int, Any]) -> Any:
        """Return a deep copy, which keeps slices of its own weights."""
        del self._net.__deepcopy__
        try:
            memo |= _of_a_graph(self._net)
            copied = copy.deepcopy(self._net, memo)
        finally:
            self._net.__deepcopy__ = self.copy
        kept = copied._apply.__self__
        copied.__deepcopy__ = kept.copy
        kept.again()
        return copied


def _keeps_tensors(net: nn.Module) -> bool:
    """Return whether modules have tensors that are neither parameters nor buffers."""
    return any(
        isinstance(tensor, torch.Tensor)
        for child in net.modules()
        for name, value in vars(child).items()
        if name not in ("_parameters", "_buffers", "_modules")
        for tensor in tree_leaves(value)
    )


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
        ElasticityError: A layer computes its weight.
        MeasurementError: A layer is used twice with different numbers of channels.
    """
    if computed := [name for name, layer in module.named_modules() if _computes_weight(layer)]:
        msg = (
            f"Layers of {class_name(module)} compute their weights, which its extraction to plain "
            f"layers leaves out: {listed(computed, 3)}. Let them have these weights for good: "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or "
            "remove_weight_norm(layer), remove_spectral_norm(layer) of torch.nn.utils."
        )
        raise ElasticityError(msg)
    widths: dict[nn.Module, int] = {}

    def remember(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        last = isinstance(layer, nn.Linear | nn.LayerNorm)
        width = x.shape[-1] if last else x.shape[1]
        if isinstance(layer, nn.Embedding):  # tokens have no channels
            width = 1
        if widths.setdefault(layer, width) != width:
            msg = f"{class_name(layer)} is used with {widths[layer]} and with {width} channels."
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


_M = TypeVar("_M", bound=nn.Module)


def with_settings(plain: _M, whole: nn.Module) -> _M:
    """Give the layers of a plain network the settings of those of its super-network.

    These are, in layers of torch, numbers with a fraction, such as the eps and the momentum of a
    normalisation or the share of a dropout, and whether statistics are tracked.

    Args:
        plain: The network of a subnet.
        whole: The super-network, whose layers have the same names.

    Returns:
        The plain network.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(4, eps=0.5, momentum=None))
        >>> with_settings(nn.Sequential(nn.BatchNorm1d(2)), net)[0].eps
        0.5
    """
    layers = dict(whole.named_modules())
    for name, layer in plain.named_modules():
        if not type(layer).__module__.startswith("torch."):  # others may have numbers of their size
            continue
        own, other = vars(layer), vars(layers.get(name, layer))
        for key in own.keys() & other.keys():
            is_setting = isinstance(own[key], float) or key in ("momentum", "track_running_stats")
            if is_setting and isinstance(other[key], (float, int, type(None))):
                own[key] = other[key]
    return plain


def _computes_weight(layer: nn.Module) -> bool:
    """Return whether weight_norm, spectral_norm or another parametrization makes a weight."""
    by_hook = isinstance(vars(layer).get("weight"), torch.Tensor)  # torch's first ones
    return by_hook or torch.nn.utils.parametrize.is_parametrized(layer)
