# SPDX-License-Identifier: Apache-2.0
"""Runtime: the contract of a library that runs a network while it is timed, as where it ships.

Inputs are in place before a forward pass, so that copies are not timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._torch.inputs import Inputs, as_weight
from lightning_subnet.errors import ExportError, ObjectiveError
from lightning_subnet.export.call import Call

TRUE = {
    "64-true": torch.float64,
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_SHORT = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's
_PRECISIONS = (*TRUE, *MIXED)


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a network is timed.

    Args:
        device: Where it runs.
        threads: Threads within an operator.
        precision: One of Lightning's, in full.
        cuda_graph: Replay a CUDA graph.
    """

    device: torch.device
    threads: int
    precision: str
    cuda_graph: bool = False


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass of one network on one batch, to be repeated.

    Args:
        run: Does it.
        again: Returns the same elsewhere in memory, where that takes little time.
        release: Gives back what only this network holds.
        seconds: The time that it took to make it.
    """

    run: Callable[[], Any]
    again: Callable[[], ForwardPass] | None = None
    release: Callable[[], Any] = lambda: None
    seconds: float = 0.0


class Runtime(ABC):
    """A library that runs networks.

    Each is a class in a file beside this one, with a line in the table of `registry.py`. Another
    package offers one by an entry point of the group `lightning_subnet.runtimes`.

    Attributes:
        name: What users call it: `Latency(runtime=name)`.
        precisions: Those that it computes in, in full; empty: all, and any type of weights.
        devices: The kinds of devices that it runs on; empty: all.
        libraries: Functions that import the optional libraries that it needs, or raise an
            `ExportError`.
        graphs: Whether it can replay CUDA graphs.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ()
    devices: ClassVar[tuple[str, ...]] = ()
    libraries: ClassVar[tuple[Callable[[], Any], ...]] = ()
    graphs: ClassVar[bool] = False

    @abstractmethod
    def make(self, net: nn.Module, inputs: Inputs, conditions: Conditions) -> ForwardPass:
        """Return the forward pass of a network.

        Args:
            net: In eval mode, on the device and in the precision of the weights; it is changed.
            inputs: Arguments, on the device and in the precision of the weights too.
            conditions: Where and how it runs.
        """

    @abstractmethod
    def describe(self, conditions: Conditions) -> str:
        """Return versions and options in words, for the fingerprint of a measure."""

    def check(self, device: torch.device, precision: str) -> None:  # noqa: B027 - optional
        """Raise an `ObjectiveError` if this machine cannot run it; by default nothing is checked.

        Args:
            device: One of the kinds in `devices`.
            precision: One of `precisions`.
        """

    def accept(self, precision: str | None, *, cuda_graph: bool = False) -> str | None:
        """Return a precision in full, if the runtime can be used with it.

        Args:
            precision: Lightning's: `"32-true"`, `"bf16-true"`, `"16-true"`, `"bf16-mixed"`,
                `"16-mixed"`, or its short forms `"32"`, `"bf16"` and `"16"`; None stays None.
            cuda_graph: Whether a CUDA graph is to be replayed.

        Raises:
            ObjectiveError: There is no such precision, the runtime does not compute in it or
                replays no graph, or it needs a library that is not installed.
        """
        full = None if precision is None else _SHORT.get(str(precision), str(precision))
        if full is not None and full not in _PRECISIONS:
            msg = (
                f"precision={precision!r} is unknown.{did_you_mean(precision, _PRECISIONS)} "
                f"It is one of: {listed(_PRECISIONS)}."
            )
            raise ObjectiveError(msg)
        if full is not None:
            self._check_precision(full, "precision=")
        if cuda_graph and not self.graphs:
            msg = (
                f"cuda_graph=True: runtime={self.name!r} replays no graph. "
                "Use a runtime of torch: 'eager' or 'compile'."
            )
            raise ObjectiveError(msg)
        for import_library in self.libraries:
            try:
                import_library()
            except ExportError as error:
                msg = f"runtime={self.name!r} cannot be used: {error}"
                raise ObjectiveError(msg) from error
        return full

    def precision_on(
        self, device: torch.device, precision: str | None, dtype: torch.dtype | None
    ) -> str:
        """Return the precision that it computes in on a device.

        Args:
            device: Where it runs.
            precision: In full; None: that of the weights.
            dtype: Of the weights; None if there are none.

        Raises:
            ObjectiveError: It does not run on this device, or does not compute in it there.
        """
        if self.devices and device.type not in self.devices:
            msg = f"runtime={self.name!r} does not run on {device.type!r} here. Write device='cpu'."
            raise ObjectiveError(msg)
        if precision is None:
            precision = next((k for k, v in TRUE.items() if v is dtype), str(dtype or "32-true"))
            self._check_precision(precision, "the network is in ")
        self.check(device, precision)
        return precision

    def _check_precision(self, precision: str, start: str) -> None:
        if self.precisions and precision not in self.precisions:
            msg = (
                f"{start}{precision!r}, in which runtime={self.name!r} does not compute. "
                f"Set precision= to one of: {listed(self.precisions)}."
            )
            raise ObjectiveError(msg)

    def prepare(
        self,
        net: nn.Module,
        inputs: Inputs,
        conditions: Conditions,
        *,
        cast: bool = True,
    ) -> ForwardPass:
        """Return the forward pass of a network, which is put on the device.

        Args:
            net: In eval mode; it is changed.
            inputs: Arguments of its forward pass.
            conditions: Where and how it runs.
            cast: Put its weights in the precision.
        """
        dtype = TRUE.get(conditions.precision, torch.float32) if cast else None
        net = net.to(device=conditions.device, dtype=dtype)
        weights = (p for p in net.parameters() if p.is_floating_point())
        like = next(weights, torch.empty(0, device=conditions.device, dtype=dtype))
        return self.make(net, as_weight(like, inputs), conditions)


def arrays_of(net: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the tensors among the inputs of a network as NumPy arrays, by their names in a file.

    Example:
        >>> [*arrays_of(nn.Linear(3, 2), (torch.zeros(1, 3),))]
        ['input']
    """
    call = Call.of(net, inputs, dynamic_batch=False)
    arrays = [x.cpu().numpy() for x in call.tensors]
    return dict(zip(call.input_names, arrays, strict=True))
