# SPDX-License-Identifier: Apache-2.0
"""The tensors that a network ships, and their elements and bytes, each piece of memory once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lightning_subnet._torch.names import class_name
from lightning_subnet.errors import MeasurementError

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_CONSTANTS = ("prim::Constant", "prim::ConstantMKLDNNTensor")
_ONEDNN: Any = torch._mkldnn  # type: ignore[attr-defined] # untyped
_EXTRA = "_extra_state"
_PLAIN = {bool, int, float, str, set, type(None), OrderedDict}
_NO_STATE = ("_parameters", "_buffers", "_modules", "_example_input_array", "example_input_array")


def weights(net: nn.Module) -> list[torch.Tensor]:
    """Return the weights of a network: its parameters, and those that quantised layers pack.

    Raises:
        MeasurementError: A layer does not have its weights yet, or the state cannot be read.

    Example:
        >>> [tuple(x.shape) for x in weights(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))]
        [(3, 2), (3,), (3,), (3,)]
    """
    state = list(_state(net))
    # What is ready for oneDNN has its weights as buffers.
    buffers = [x for x in net.buffers() if x.layout is not _ONEDNN]
    others = {_address(x) for x in (*net.parameters(), *buffers)}
    packed = [
        tensor
        for name, tensor in state
        if tensor.ndim and not name.endswith(_EXTRA) and _address(tensor) not in others
    ]
    return [*net.parameters(), *packed]


def stored(net: nn.Module) -> list[torch.Tensor]:
    """Return the tensors that a checkpoint of a network holds.

    These are parameters, persistent buffers, what quantised layers pack, and the tensors of an
    extra state. Some may share memory; see `n_bytes`.

    Raises:
        MeasurementError: A layer does not have its weights yet, or the state cannot be read.

    Example:
        >>> n_bytes(stored(nn.BatchNorm1d(3)))  # two parameters, two statistics, and a counter
        56
    """
    return [tensor for _, tensor in _state(net)]


def held(net: nn.Module) -> list[torch.Tensor]:
    """Return the dense tensors that a network keeps in memory.

    These are those of its checkpoint, with the other buffers and the tensors that modules keep as
    plain attributes. Of weights that are packed copies are returned.

    Example:
        >>> [x.numel() for x in held(nn.Linear(3, 2))]
        [6, 2]
    """
    kept = [*net.parameters(), *net.buffers(), *attributes(net)]
    known = {_address(x) for x in kept}
    kept += [x for _, x in _state(net) if x.ndim and _address(x) not in known]
    return [
        torch.empty(part.shape, dtype=part.dtype) if part.layout is _ONEDNN else part
        for tensor in kept
        for part in parts(tensor)
    ]


def attributes(net: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that modules keep as plain attributes; an example of an input is none.

    Example:
        >>> net = nn.ReLU()
        >>> net.masks = [torch.ones(3)]
        >>> list(attributes(net))
        [tensor([1., 1., 1.])]
    """
    for child in net.modules():
        for name, value in vars(child).items():
            # isinstance() takes long, and most attributes are of these types.
            if type(value) not in _PLAIN and name not in _NO_STATE:
                yield from (x for x in tree_leaves(value) if isinstance(x, torch.Tensor))


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that one consists of: itself if it is dense.

    Example:
        >>> [x.shape for x in parts(torch.eye(3).to_sparse())]
        [torch.Size([3]), torch.Size([2, 3])]
    """
    return [*_parts(tensor, indices=True)]


def _state(net: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
            msg = (
                f"{name} of {class_name(net)} has no shape before the first forward pass. "
                "Run the network once on a sample, then search."
            )
            raise MeasurementError(msg)
    try:
        state = net.state_dict()
    except Exception as error:
        msg = (
            f"The state_dict() of {class_name(net)} cannot be read, so its size is not known: "
            f"{type(error).__name__}: {error}. Mend it, or give the measure as a network_measure "
            "of your own."
        )
        raise MeasurementError(msg) from error
    own = dict(net.named_buffers(remove_duplicate=False))
    for name, value in state.items():
        for tensor in _tensors(value):
            # What another library holds has no memory to know it by in a state.
            yield name, own.get(name, tensor) if tensor.layout is _ONEDNN else tensor
    for name, child in net.named_modules():
        if isinstance(child, torch.jit.ScriptModule) and hasattr(child, "inlined_graph"):
            for tensor in _constants(child):
                yield f"{name}.constant", tensor


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors inside a value of a state dict: of any structure, packed or not."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, torch.ScriptObject) and hasattr(leaf, "__getstate__"):
            yield from _tensors(leaf.__getstate__())


def _constants(script: Any) -> Iterator[torch.Tensor]:
    """Yield the weights that frozen TorchScript has in its graph."""
    graph = script.inlined_graph
    for kind in _CONSTANTS:
        for node in graph.findAllNodes(kind):
            if node.hasAttribute("value") and node.kindOf("value") == "t":
                tensor = node.t("value")
                if tensor.ndim:  # others are numbers of the program
                    yield tensor


def n_elements(tensors: Iterable[torch.Tensor]) -> int:
    """Return how many numbers tensors hold; what two of them share counts once.

    Of sparse tensors only the values that are stored count.

    Example:
        >>> weight = torch.zeros(4, 3)
        >>> n_elements([weight, weight.t(), weight[:2], torch.zeros(5)])
        17
    """
    items = list(tensors)
    # One of a class of its own is packed in some way, and no view is taken of it.
    own = {_address(x): x.numel() for x in items if _inner(x)}
    values = [part for x in items if not _inner(x) for part in _parts(x, indices=False)]
    dense = (_covered(views) // views[0].element_size() for views in _by_memory(values))
    return sum(own.values()) + sum(dense)


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return how many bytes tensors take in their types; what two of them share counts once.

    Indices of sparse tensors, and scales of quantised ones, count as well.

    Example:
        >>> n_bytes([torch.zeros(4), torch.zeros(4).half(), torch.eye(3).to_sparse()])
        84
    """
    parts = [x for tensor in tensors for x in _parts(tensor, indices=True)]
    return sum(_covered(views) for views in _by_memory(parts))


def _parts(tensor: torch.Tensor, *, indices: bool) -> Iterator[torch.Tensor]:
    """Yield the dense tensors that one consists of, with or without those that say where."""
    if tensor.layout is torch.sparse_coo:
        yield tensor._values()
        if indices:
            yield tensor._indices()
    elif tensor.layout in _COMPRESSED:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        yield tensor.values()
        if indices:
            yield tensor.crow_indices() if rows else tensor.ccol_indices()
            yield tensor.col_indices() if rows else tensor.row_indices()
    elif inner := _inner(tensor):
        for part in inner:
            yield from _parts(part, indices=indices)
    else:
        yield tensor
        if indices and tensor.is_quantized and tensor.qscheme() in _PER_CHANNEL:
            yield tensor.q_per_channel_scales()
            yield tensor.q_per_channel_zero_points()


_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_affine_float_qparams)


def _inner(tensor: Any) -> list[torch.Tensor]:
    """Return the tensors inside one of a class of its own, as those of torchao."""
    if not is_traceable_wrapper_subclass(tensor) or hasattr(tensor, "full_tensor"):
        return []  # a distributed one says itself how large it is as a whole
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _by_memory(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return tensors grouped by the memory that they are views of."""
    groups: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(_address(tensor), []).append(tensor)
    return list(groups.values())


def _address(tensor: torch.Tensor) -> int:
    if tensor.layout in (torch.sparse_coo, *_COMPRESSED):
        return _address(parts(tensor)[0])
    if inner := _inner(tensor):
        return _address(inner[0])
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # of another library
        return int(tensor._cdata)


def _covered(views: list[torch.Tensor]) -> int:
    """Return how many bytes of one piece of memory some views of it cover."""
    first = views[0]
    if first.layout is not torch.strided:
        return first.numel() * first.element_size()
    layouts = {(x.storage_offset(), x.shape, x.stride(), x.element_size()) for x in views}
    if len(layouts) == 1 and 0 not in first.stride():
        return first.numel() * first.element_size()
    covered = torch.zeros(first.untyped_storage().nbytes(), dtype=torch.bool)
    for offset, shape, strides, size in layouts:
        # Along a stride of 0 all elements are one.
        sizes = [1 if step == 0 else n for n, step in zip(shape, strides, strict=True)]
        steps = [step * size for step in strides]
        covered.as_strided([*sizes, size], [*steps, 1], offset * size).fill_(True)
    return int(covered.sum())
