# SPDX-License-Identifier: Apache-2.0
"""Slices of parameters in force: a layer's `weight` is then the part of the units that are kept.

Each module whose parameters may be sliced gets a class of its own, derived from the one that it
had, in which these names are properties, as `torch.nn.utils.parametrize` does it. The parameters
themselves, their names in the state dict and what an optimizer holds stay what they are.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_subnet.elasticity.channels.discovery import ChannelGroup
from lightning_subnet.elasticity.channels.operators import Axis

Index = int | torch.Tensor
"""What is kept of a dimension: so many first entries, or these."""

_STATE = "_slices"  # of an owner, what of its tensors is kept: {name: {dim: Index}}
_WHOLE = "_whole_sizes"  # of an owner, its attributes where nothing is sliced
_GATHERED = "_gathered"  # of an owner, buffers that a pass works on: {name: tensor}


@dataclass(frozen=True)
class Count:
    """An attribute of a module that counts units of a group, or channels of them.

    Attributes:
        module: The name of the module.
        name: The attribute.
        group: The number of the group.
        per_unit: How much a unit adds to it.
        needed: Whether the network is wrong with less of the group if the attribute stays.
    """

    module: str
    name: str
    group: int
    per_unit: int
    needed: bool = True


@dataclass
class Slices:
    """What may be dropped from a network, and how.

    It knows modules by their names, and serves every copy of the network.

    Attributes:
        groups: The groups of channels.
        counts: Attributes of modules that are kept in step, beside those of torch's layers.
    """

    groups: Sequence[ChannelGroup]
    counts: Sequence[Count] = ()
    _owners: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    _indices: dict[Any, dict[Axis, Index]] = field(default_factory=dict, repr=False)

    def attach(self, net: nn.Module) -> None:
        """Make the network ready; all units are kept."""
        self._attach(net, {axis[0] for group in self.groups for axis in group.axes})

    def _attach(self, net: nn.Module, tensors: set[str]) -> None:
        self._owners = owners(net, tensors)
        for name, own in self._owners.items():
            module = net.get_submodule(name)
            known = _attributes(module)
            if not own.keys() <= known:
                attributes = tuple(sorted(own.keys() | known))
                base: Any = plain_class(module)
                module.__class__ = _sliced_class(base, attributes)
                vars(module).setdefault(_STATE, {})

    def put(self, net: nn.Module, kept: Sequence[Index]) -> None:
        """Put slices in force.

        Args:
            net: The network, or a copy of it.
            kept: By group, how many first units are kept, or which.
        """
        self._put(net, self.indices(kept))
        for module, attribute, value in self.counted(kept):
            setattr(net.get_submodule(module), attribute, value)

    def counted(self, kept: Sequence[Index]) -> list[tuple[str, str, int]]:
        """Return what attributes are beside those of torch's layers: (module, name, value)."""
        return [(c.module, c.name, _n(kept[c.group]) * c.per_unit) for c in self.counts]

    def _put(self, net: nn.Module, indices: Mapping[Axis, Index]) -> None:
        by_name: dict[str, dict[int, Index]] = {}
        for (name, dim), index in indices.items():
            by_name.setdefault(name, {})[dim] = index
        for owner, own in self._owners.items():
            module = net.get_submodule(owner)
            vars(module)[_STATE] = {
                attribute: by_name[name] for attribute, name in own.items() if name in by_name
            }
            _set_sizes(module, {a: tuple(_tensor(module, a).shape) for a in own})

    def indices(self, kept: Sequence[Index]) -> dict[Axis, Index]:
        """Return what is kept of each dimension that is not kept whole."""
        key = tuple(k if isinstance(k, int) else tuple(k.tolist()) for k in kept)
        if key not in self._indices:
            if len(self._indices) > _CACHE:
                self._indices.clear()
            self._indices[key] = self._computed(kept)
        return self._indices[key]

    def _computed(self, kept: Sequence[Index]) -> dict[Axis, Index]:
        dropped: dict[Axis, list[torch.Tensor]] = {}
        sizes: dict[Axis, int] = {}
        for group, keep in zip(self.groups, kept, strict=True):
            away = torch.ones(group.units, dtype=torch.bool)
            away[torch.arange(keep) if isinstance(keep, int) else keep] = False
            if away.any():
                for axis, places in group.axes.items():
                    dropped.setdefault(axis, []).append(places[away].flatten())
                    sizes[axis] = group.sizes[axis]
        indices: dict[Axis, Index] = {}
        for axis, places_away in dropped.items():
            mask = torch.ones(sizes[axis], dtype=torch.bool)
            mask[torch.cat(places_away)] = False
            index = mask.nonzero().flatten()
            first = torch.equal(index, torch.arange(len(index)))
            indices[axis] = len(index) if first else index
        return indices


def cut(
    net: nn.Module, indices: Mapping[Axis, Index], counted: Iterable[tuple[str, str, int]] = ()
) -> None:
    """Cut slices out of a network, for good.

    Args:
        net: The network, which is changed.
        indices: By tensor and dimension, what is kept of it.
        counted: Attributes that count channels, beside those of torch's layers: (module, name,
            value).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
        >>> cut(net, {("0.weight", 0): 3, ("0.bias", 0): 3, ("1.weight", 1): 3})
        >>> net[0], net[1].weight.shape
        (Linear(in_features=2, out_features=3, bias=True), torch.Size([1, 3]))
    """
    slices = Slices([])
    slices._attach(net, {name for name, _ in indices})
    slices._put(net, indices)
    for module, attribute, value in counted:
        setattr(net.get_submodule(module), attribute, value)
    bake(net)


_CACHE = 256  # subnets whose indices are remembered


def _n(kept: Index) -> int:
    return kept if isinstance(kept, int) else len(kept)


def owners(net: nn.Module, names: set[str]) -> dict[str, dict[str, str]]:
    """Return the names of modules that hold tensors, by attribute with the first name of each.

    Args:
        net: The network.
        names: Names of parameters and buffers in it.
    """
    first = {id(t): name for name, t in (*net.named_parameters(), *net.named_buffers())}
    result: dict[str, dict[str, str]] = {}
    for owner, module in net.named_modules():
        own = {
            attribute: first[id(t)]
            for attribute, t in (*module._parameters.items(), *module._buffers.items())
            if t is not None and first.get(id(t)) in names
        }
        if own:
            result[owner] = own
    return result


def is_sliced(module: nn.Module) -> bool:
    """Return whether a module is ready for slices."""
    return _STATE in vars(module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before it was made ready."""
    return type(module).__mro__[1] if is_sliced(module) else type(module)


def _attributes(module: nn.Module) -> set[str]:
    """Return the attributes of a module that are properties."""
    return set(getattr(type(module), "_sliced_attributes", ())) if is_sliced(module) else set()


def release(net: nn.Module) -> None:
    """Give all modules of a network the classes back that they had; all units are kept."""
    for module in net.modules():
        if is_sliced(module):
            module.__class__ = plain_class(module)
            vars(module).pop(_STATE)
            vars(module).pop(_GATHERED, None)
            vars(module).pop(_WHOLE, None)
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()


def bake(net: nn.Module) -> None:
    """Make the slices in force all that a network has, and give its modules their classes back."""
    copies: dict[int, Any] = {}
    for module in net.modules():
        for attribute, dims in vars(module).get(_STATE, {}).items():
            whole = _tensor(module, attribute)
            if not dims:
                continue
            if id(whole) not in copies:
                part = _slice(whole.detach(), dims).clone()
                if isinstance(whole, nn.Parameter):
                    part = nn.Parameter(part, requires_grad=whole.requires_grad)
                copies[id(whole)] = (whole, part)  # the whole lives on, so that its id stays
            where = module._parameters if attribute in module._parameters else module._buffers
            where[attribute] = copies[id(whole)][1]
    release(net)


def _tensor(module: nn.Module, attribute: str) -> torch.Tensor:
    tensor: torch.Tensor | None = module._parameters.get(attribute)
    tensor = module._buffers[attribute] if tensor is None else tensor
    assert tensor is not None, "only tensors that are there are sliced"
    return tensor


def _slice(tensor: torch.Tensor, dims: Mapping[int, Index]) -> torch.Tensor:
    for dim, index in dims.items():
        if isinstance(index, int):
            tensor = tensor.narrow(dim, 0, index)
        else:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


# Classes in which tensors are properties


@cache
def _sliced_class(base: Any, attributes: tuple[str, ...]) -> type[nn.Module]:
    """Return a class, derived from one, in which attributes are the slices that are in force."""
    members: dict[str, Any] = {name: _property(name) for name in attributes}
    members["_sliced_attributes"] = attributes
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__}

    def reduce(self: Any, protocol: Any) -> Any:
        _, _, *rest = super(cls, self).__reduce_ex__(protocol)
        return _rebuild, (base, attributes), *rest

    members["__reduce_ex__"] = reduce
    if issubclass(base, _NormBase):

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _gathered(self):
                return base.forward(self, *args, **kwargs)

        members["forward"] = forward
    if issubclass(base, nn.RNNBase):
        members["_flat_weights"] = property(_flat_weights, lambda *_: None)
    cls: type[nn.Module] = type(base.__name__, (base,), members)
    return cls


def _rebuild(base: Any, attributes: tuple[str, ...]) -> Any:
    cls = _sliced_class(base, attributes)
    return copyreg.__newobj__(cls)  # type: ignore[attr-defined] # as pickle makes objects


def _property(name: str) -> property:
    def get(self: Any) -> torch.Tensor:
        state = vars(self)
        if (gathered := state.get(_GATHERED)) and name in gathered:
            return gathered[name]  # type: ignore[no-any-return] # a tensor
        tensor = _tensor(self, name)
        dims = state.get(_STATE, {}).get(name)
        return _slice(tensor, dims) if dims else tensor

    return property(get)


def _flat_weights(rnn: Any) -> list[Any]:
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]


@contextmanager
def _gathered(norm: Any) -> Iterator[None]:
    """Let a normalisation move copies of its statistics where they do not lie side by side."""
    parts = {
        name: (norm._buffers[name], dims[0])
        for name, dims in vars(norm).get(_STATE, {}).items()
        if name in norm._buffers and isinstance(dims.get(0), torch.Tensor)
    }
    if not parts:
        yield
        return
    gathered = {}
    for name, (buffer, index) in parts.items():
        gathered[name] = buffer.index_select(0, index.to(buffer.device))
        gathered[name].gathered_from = (buffer, index)
    vars(norm)[_GATHERED] = gathered
    try:
        yield
    finally:
        del vars(norm)[_GATHERED]
        with torch.no_grad():
            for name, (buffer, index) in parts.items():
                buffer.index_copy_(0, index.to(buffer.device), gathered[name])


# Attributes of layers that say how large they are


Shape = tuple[int, ...]


def _set_sizes(module: Any, whole: Mapping[str, Shape]) -> None:
    """Bring the attributes of a layer in step with the slices in force.

    Args:
        module: The layer.
        whole: The shapes of its tensors without slices, by attribute.
    """
    state = vars(module)
    sizes = _sizes_of(module, whole)
    if not sizes:
        return
    originals: dict[str, Any] = state.setdefault(_WHOLE, {})
    now = {}
    for attribute, shape in whole.items():
        dims = state[_STATE].get(attribute, {})
        now[attribute] = tuple(_n(dims[d]) if d in dims else size for d, size in enumerate(shape))
    for name, compute in sizes.items():
        originals.setdefault(name, state[name])
        state[name] = compute(now, originals)


Compute = Callable[[Mapping[str, Shape], Mapping[str, Any]], Any]


def _sizes_of(  # noqa: PLR0911 - one per kind of layer
    module: Any, whole: Mapping[str, Shape]
) -> dict[str, Compute]:
    """Return the attributes of a layer that depend on the shapes of its tensors."""
    tensor = next(iter(whole))
    shape = whole.get("weight", whole[tensor])

    def weight(now: Mapping[str, Shape]) -> Shape:
        return now.get("weight", now[tensor])

    if isinstance(module, nn.Linear):
        return {"out_features": lambda n, _: weight(n)[0]} | (
            {"in_features": lambda n, _: weight(n)[1]} if "weight" in whole else {}
        )
    if isinstance(module, _ConvNd) and "weight" in whole:
        out, inner = (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)

        def groups(now: Mapping[str, Shape], was: Mapping[str, Any]) -> int:
            return int(was["groups"]) * weight(now)[out] // shape[out] if was["groups"] > 1 else 1

        return {
            "groups": groups,
            "out_channels": lambda n, _: weight(n)[out],
            "in_channels": lambda n, was: weight(n)[inner] * groups(n, was),
        }
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": lambda n, _: weight(n)[1]}
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
        names = {"hidden_size": f"weight_hh{suffix}", "input_size": f"weight_ih{suffix}"}
        return {
            name: lambda n, _, w=w: n[w][1]  # type: ignore[misc] # w is one of its own
            for name, w in names.items()
            if w in whole
        }
    if isinstance(module, _NormBase):
        return {"num_features": lambda n, _: weight(n)[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": lambda n, _: tuple(weight(n))}
    if isinstance(module, nn.GroupNorm):
        return {
            "num_groups": lambda n, was: int(was["num_groups"]) * weight(n)[0] // shape[0],
            "num_channels": lambda n, _: weight(n)[0],
        }
    if isinstance(module, nn.PReLU):
        return {"num_parameters": lambda n, _: weight(n)[0]}
    if {"nf", "nx"} <= vars(module).keys() and len(shape) > 1:  # Conv1D of transformers
        return {"nf": lambda n, _: weight(n)[1], "nx": lambda n, _: weight(n)[0]}
    return {}
