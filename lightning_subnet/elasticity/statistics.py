# SPDX-License-Identifier: Apache-2.0
"""Running statistics: which layers have them, their state, and what batches would make of them."""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_subnet.errors import MeasurementError

_NAME = re.compile(r"(^|_)(running|moving)(_|$)")
_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "lightning_subnet")


def norms(module: nn.Module) -> list[_NormBase]:
    """Return torch's normalisations with running statistics, subclasses included."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, _NormBase) and layer.running_mean is not None
    ]


def others(module: nn.Module) -> list[nn.Module]:
    """Return layers of other classes that may have running statistics.

    Layers of torch and of this package have none, except for compiled ones of TorchScript.
    """
    return [
        layer
        for layer in module.modules()
        if not isinstance(layer, _NormBase)
        and any(True for _ in _floating(layer))
        and (has_named_statistics(layer) or type(layer).__module__.split(".")[0] not in _LIBRARIES)
    ]


def has_named_statistics(layer: nn.Module) -> bool:
    """Return whether a buffer of a layer is called `running_...` or `moving_...`.

    Example:
        >>> has_named_statistics(nn.BatchNorm1d(2)), has_named_statistics(nn.Linear(2, 2))
        (True, False)
    """
    return any(_NAME.search(name) for name, _ in _floating(layer))


def tracks(layer: nn.Module) -> bool:
    """Return whether training would move the statistics of a layer that is in training mode.

    `track_running_stats` of a layer with buffers is False where it is frozen so, as
    `BaseFinetuning.freeze(train_bn=False)` of Lightning does: its batch normalises in training, and
    its buffers, which nothing moves, in validation.
    """
    return bool(getattr(layer, "track_running_stats", True))


def is_renewable(module: nn.Module) -> bool:
    """Return whether a module has statistics that depend on the subnet, so that data is needed.

    Layers of a class that calls itself frozen, as torchvision's `FrozenBatchNorm2d`, have none.

    Example:
        >>> is_renewable(nn.InstanceNorm1d(2, track_running_stats=True))
        True
        >>> is_renewable(nn.InstanceNorm1d(2))
        False
    """
    return any(map(tracks, norms(module))) or any(
        has_named_statistics(layer) and "frozen" not in type(layer).__name__.lower()
        for layer in others(module)
    )


def _buffers(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, buffer in layer.named_buffers(recurse=False):
        if is_lazy(buffer):
            msg = (
                f"{type(layer).__name__} has statistics without a shape. Run one forward pass "
                "of the whole network first."
            )
            raise MeasurementError(msg)
        yield name, buffer


def _floating(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((n, b) for n, b in _buffers(layer) if b.is_floating_point() and b.numel())


Key = tuple[nn.Module, str]  # a buffer: its layer and its name there


class Snapshot:
    """The buffers of layers, as objects and as values."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._items = {
            layer: {name: (b, b.detach().clone()) for name, b in _buffers(layer)}
            for layer in layers
        }

    def restore(self, layers: Iterable[nn.Module] | None = None) -> None:
        """Give layers, by default all of them, their buffers back, with their values."""
        pairs = []
        for layer in self._items if layers is None else layers:
            for name, (buffer, value) in self._items[layer].items():
                pairs.append((buffer, value))
                if not isinstance(layer, torch.jit.ScriptModule):  # it rebinds none
                    layer._buffers[name] = buffer
        if pairs:
            buffers, values = zip(*pairs, strict=True)
            torch._foreach_copy_(buffers, values)  # many small ones at once

    def buffer(self, key: Key) -> torch.Tensor:
        """Return the buffer itself, which a layer may have replaced meanwhile."""
        return self._items[key[0]][key[1]][0]

    def changes(self, layers: Iterable[nn.Module]) -> set[Key]:
        """Return those buffers of the layers, of floating point, that are not what they were."""
        changes = set()
        for layer in layers:
            now = dict(layer.named_buffers(recurse=False))
            for name, (buffer, value) in self._items[layer].items():
                if buffer.is_floating_point() and not _equal(now.get(name), value):
                    changes.add((layer, name))
        return changes


def _equal(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal, NaN in the same places included."""
    return (
        one is not None
        and one.shape == other.shape
        and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    )


@dataclass(frozen=True)
class Place:
    """Where a tensor of statistics lies in a buffer.

    Attributes:
        offset: Of its first entry.
        shape: Its shape.
        strides: Its strides.
        entries: The indices of its entries, where they were gathered into a tensor of their own.
    """

    offset: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    entries: tuple[int, ...] | None = None

    def add(self, buffer: torch.Tensor, values: torch.Tensor) -> None:
        """Add values to what lies in this place of a buffer."""
        if self.entries is not None:
            buffer.index_add_(0, torch.tensor(self.entries, device=buffer.device), values)
        else:
            buffer.as_strided(self.shape, self.strides, self.offset).add_(values)


@dataclass
class Sums:
    """Statistics of the batches seen so far, each with the number of its samples.

    Attributes:
        items: By buffer (its layer, its name) and by the place in it that a batch was for.
        rest: By buffer, the value of what no batch was for.
    """

    items: dict[Key, dict[Place, list[tuple[int, torch.Tensor]]]] = field(default_factory=dict)
    rest: dict[Key, float] = field(default_factory=dict)

    def add(
        self, key: Key, place: Place, weight: int, value: torch.Tensor, rest: float = 0.0
    ) -> None:
        """Add the statistics of one batch, of so many samples."""
        self.items.setdefault(key, defaultdict(list))[place].append((weight, value))
        self.rest[key] = rest

    def update(self, other: Sums) -> None:
        """Add those of another pass."""
        for key, places in other.items.items():
            for place, entries in places.items():
                for weight, value in entries:
                    self.add(key, place, weight, value, other.rest[key])

    @property
    def layers(self) -> set[nn.Module]:
        """The layers of which there are statistics."""
        return {layer for layer, _ in self.items}

    def calls(self, key: Key) -> int:
        """Return how many batches were added for a buffer."""
        return sum(map(len, self.items[key].values()))

    def mean(self, key: Key, like: torch.Tensor) -> torch.Tensor:
        """Return the mean of a buffer's statistics, weighted by samples, in float32 or wider."""
        wide = torch.promote_types(like.dtype, torch.float32)
        total = torch.zeros_like(like, dtype=wide)
        weight = torch.zeros_like(total)
        for place, entries in self.items[key].items():
            weights = torch.tensor([w for w, _ in entries], dtype=wide, device=like.device)
            values = torch.stack([value for _, value in entries]).to(wide)
            part = (values * weights.view(-1, *[1] * (values.ndim - 1))).sum(0)
            place.add(total, part)
            place.add(weight, weights.sum().expand_as(part))
        return torch.where(weight > 0, total / weight, self.rest[key])


class Watch(TorchFunctionMode):
    """Takes the statistics of each batch where a network normalises.

    A normalisation that would move running statistics gets fresh ones in place of the layer's
    buffers, with momentum 1, so that they are the batch's own. So it does not matter which momentum
    a layer has or passes on, how often it runs in a pass, which of its channels, and who calls the
    function: the layer, or a module that holds it.

    Args:
        layers: Layers with running statistics.
        always: Those of them that are normalised by their batch whatever flag is passed.
        notes: Whether to note what else is done with their buffers.

    Attributes:
        sums: The statistics.
        uses: The layers whose buffers went into any operation without being moved by it.
    """

    def __init__(
        self, layers: Iterable[nn.Module], always: set[nn.Module], *, notes: bool = False
    ) -> None:
        super().__init__()
        self.sums = Sums()
        self.uses: set[nn.Module] = set()
        self._always = always
        self._notes = notes
        buffers = [(b, layer, name) for layer in layers for name, b in _floating(layer)]
        self._buffers = sorted(buffers, key=lambda item: item[0].data_ptr())
        self._starts = [buffer.data_ptr() for buffer, _, _ in self._buffers]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation; a normalisation with statistics of its own."""
        kwargs = kwargs or {}
        names = _NORMALISATIONS.get(func)
        if names is not None:
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            flag = "training" if "training" in names else "use_input_stats"
            owners = self._owner(call.get("running_mean")), self._owner(call.get("running_var"))
            if owners[0] is not None and owners[1] is not None:
                layer = owners[0][0]
                # instance_norm normalises by its input unless it is told otherwise
                if call.get(flag, flag != "training") or layer in self._always:
                    return self._normalised(func, call, flag, owners[0], owners[1])
        if self._notes:
            self._note([*args, *kwargs.values()])
        return func(*args, **kwargs)

    def _normalised(
        self,
        func: Callable[..., Any],
        call: dict[str, Any],
        flag: str,
        mean: tuple[nn.Module, str, Place],
        var: tuple[nn.Module, str, Place],
    ) -> Any:
        x = call["input"]
        if flag == "training" and x.numel() == x.shape[1]:
            msg = (
                f"{type(mean[0]).__name__} got a batch of one value per channel, which has no "
                "variance. Give batches of two samples or more."
            )
            raise MeasurementError(msg)
        fresh = [torch.zeros_like(call[name]) for name in ("running_mean", "running_var")]
        call |= {"running_mean": fresh[0], "running_var": fresh[1], flag: True, "momentum": 1.0}
        output = func(**call)
        for (layer, name, place), value, rest in zip((mean, var), fresh, (0.0, 1.0), strict=True):
            self.sums.add((layer, name), place, len(x), value, rest)
        return output

    def _note(self, arguments: Iterable[Any]) -> None:
        for x in arguments:
            if isinstance(x, (list, tuple)):
                self._note(x)
            elif (owner := self._owner(x)) is not None:
                self.uses.add(owner[0])

    def _owner(self, tensor: Any) -> tuple[nn.Module, str, Place] | None:
        """Return the layer and the name of the buffer that a tensor is, or is a view of."""
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            return None
        if (source := getattr(tensor, "gathered_from", None)) is not None:
            whole, index = source
            owner = next(((la, n) for b, la, n in self._buffers if b is whole), None)
            return None if owner is None else (*owner, Place(entries=tuple(index.tolist())))
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # a tensor of functorch has no storage
            return None
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        buffer, layer, name = self._buffers[i]
        offset = (address - self._starts[i]) // buffer.element_size()
        if offset >= buffer.numel() or tensor.dtype != buffer.dtype:
            return None
        return layer, name, Place(offset, tuple(tensor.shape), tensor.stride())


_NORMALISATIONS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
    F.instance_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("use_input_stats", "momentum", "eps"),
    ),
    torch.instance_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("use_input_stats", "momentum", "eps", "cudnn_enabled"),
    ),
}
