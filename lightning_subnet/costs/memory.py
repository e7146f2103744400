# SPDX-License-Identifier: Apache-2.0
"""Memory of one forward pass at its peak: weights, buffers, input and live activations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_subnet._checks import checked_int
from lightning_subnet._torch.contexts import (
    collection_paused,
    default_type,
    default_types,
    plain_attention,
    random_state,
)
from lightning_subnet._torch.inputs import Inputs, arguments, batched, described, run_with
from lightning_subnet._torch.stored import held, parts
from lightning_subnet.costs.counts import SLICED, remembered
from lightning_subnet.costs.device import usable_device
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure


@dataclass(frozen=True, eq=False)
class PeakMemory:
    """Megabytes (10^6 bytes) at the peak of one forward pass of the extracted subnet: exact.

    The weights and buffers, packed and sparse ones as they are, other tensors that modules keep,
    the input, and the tensors that are alive at once count, in inference
    mode. A tensor lives from the operator that makes it to the moment when nothing holds
    it any more: the input of a residual block until the sum. Views and in-place results share the
    memory of their origin and count once.

    On a CPU these are the tensors that operators return, byte by byte: the same number on every
    machine, without the scratch memory that a kernel takes and gives back inside one operator. On
    CUDA the increase is the peak of PyTorch's allocator, above what was allocated before, with such
    workspaces and its rounding to 512 bytes, and without what libraries keep for good; cuDNN's
    benchmark mode is off meanwhile. Fused attention in a CPU's fast path is taken apart for it.

    Of a network that cannot be sliced all weights are in the copy, and so in the number.

    Args:
        batch_size: Samples of the forward pass.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        input: A tensor or a tuple of positional arguments; the first row of each tensor is repeated
            `batch_size` times. None: `fit` takes `example_input_array` or a validation sample.
        name: The measure's name.

    Raises:
        ObjectiveError: An argument is out of range; on binding: there is no input, or no such
            device.
        MeasurementError: The first subnet does not take the input.

    Example:
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> memory = PeakMemory(batch_size=8).bind(net, torch.zeros(1, 1, 8, 8))
        >>> memory([net.search_space().smallest, net.search_space().largest])
        [0.209752, 0.708056]
    """

    batch_size: int = 1
    device: str = "cpu"
    input: Any = None
    name: str = "peak_memory_mb"

    def __post_init__(self) -> None:
        checked_int(self.batch_size, "PeakMemory: batch_size", error=ObjectiveError)
        if self.input is not None:
            batched(self.input, who="PeakMemory")

    def bind(self, elastic: nn.Module, example_input: Any) -> Measure:
        """Return the measure of one super-network, in 10^6 bytes."""
        sample = example_input if self.input is None else self.input
        inputs = batched(sample, self.batch_size, who="PeakMemory")
        device = usable_device(self.device)
        if device.type not in _PEAKS:
            msg = f"PeakMemory: device={self.device!r} is not supported. Take 'cpu' or 'cuda'."
            raise ObjectiveError(msg)

        def peak_mb(subnet: Subnet) -> float:
            try:
                with random_state():  # the plain network is initialised first
                    net = extract(elastic, subnet, inputs, only="example").to(device)
                    return peak_bytes(net, inputs) / 1e6
            except Exception as error:
                msg = (
                    f"{subnet!r:.200} failed on an input of {described(inputs)} on {device} in "
                    f"PeakMemory: {error}. Give PeakMemory(input=...) one sample for forward()."
                )
                raise MeasurementError(msg) from error

        own = callable(getattr(elastic_part(elastic), "extract", None))
        return remembered(self.name, peak_mb, "MB", None if own else SLICED)


def peak_bytes(net: nn.Module, inputs: Inputs) -> int:
    """Return the bytes at the peak of one forward pass in inference mode; see `PeakMemory`.

    Args:
        net: The network, in eval mode, on a CPU or on CUDA.
        inputs: Arguments; they are moved to where the weights are.

    Example:
        >>> net = nn.Sequential(nn.Linear(10, 100, bias=False), nn.Linear(100, 10, bias=False))
        >>> peak_bytes(net, (torch.zeros(1, 10),))  # weights, input, hidden and output
        8480
    """
    weight = next(net.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    # Nothing inside the fast path of attention is seen.
    with plain_attention(), torch.inference_mode(), collection_paused():
        args, kwargs = arguments(net, inputs)
        inputs = kwargs or args
        kept = held(net)  # of packed weights these are copies, which must stay
        storages = _storages_of([*kept, *tree_leaves(inputs)])
        first: Exception | None = None
        for dtype in default_types(net):
            try:
                with default_type(dtype):
                    return _PEAKS[device.type](net, inputs, storages)
            except Exception as error:
                first = first or error
        assert first is not None, "there is a type"
        raise first


def _on_cpu(net: nn.Module, inputs: Inputs, storages: list[torch.UntypedStorage]) -> int:
    _warm_up()
    with _Living(storages) as living:
        run_with(net, inputs)
    return int(living.peak)


def _on_cuda(net: nn.Module, inputs: Inputs, storages: list[torch.UntypedStorage]) -> int:
    device = storages[0].device
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled,
        benchmark=False,  # which would try kernels with other workspaces
        deterministic=torch.backends.cudnn.deterministic,
        allow_tf32=torch.backends.cudnn.allow_tf32,
    ):
        run_with(net, inputs)  # libraries allocate their own, for good, in the first call
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run_with(net, inputs)
        torch.cuda.synchronize(device)
        more: int = torch.cuda.max_memory_allocated(device) - before
    return more + sum(storage.nbytes() for storage in storages)


_PEAKS: dict[str, Callable[..., int]] = {"cpu": _on_cpu, "cuda": _on_cuda}


def _storages_of(items: Iterable[Any]) -> list[torch.UntypedStorage]:
    """Return the storages of the tensors among some items, each once."""
    dense = (part for x in items if isinstance(x, torch.Tensor) for part in parts(x))
    storages = (x.untyped_storage() for x in dense)
    return list({storage._cdata: storage for storage in storages}.values())


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch annotates it in part
    """Count of the bytes of all storages that are alive, from the operators that return them.

    A weak reference to a storage dies with the storage itself, however many tensors view it
    (as in `torch.distributed._tools.mem_tracker`, which is for training).
    """

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for storage in storages:
            self._watch(storage)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, partial(self._freed, key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and watch what it returns."""
        out = func(*args, **(kwargs or {}))
        for storage in _storages_of(tree_leaves(out)):
            self._watch(storage)
        return out


@cache
def _warm_up() -> None:
    """Dispatch one operator: the first one imports much of torch, and frames of it hold tensors."""
    with _Living([]):
        torch.zeros(1).relu()
