# SPDX-License-Identifier: Apache-2.0
"""Ways to score a subnet: in the super-network, extracted, or as the file that ships."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.parity import Call, example_of, outputs_of
from lightning_subnet.elasticity.slicing.slicing import Only
from lightning_subnet.errors import MeasurementError
from lightning_subnet.export.exporting import export
from lightning_subnet.export.formats import registry
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.training._lightning import (
    BeforeFirstBatch,
    Callback,
    LightningModule,
    Trainer,
)
from lightning_subnet.training.validation.checks import FORMATS
from lightning_subnet.training.validation.place import Place


class InForce(Callback):
    """Puts the subnet in force again once the Trainer has moved the module to its device.

    Networks that keep slices of their weights as attributes (HAT, AutoFormer) have those of the
    weights that were there before.

    Args:
        part: The elastic part.

    Attributes:
        subnet: The subnet; set before each validation.
    """

    def __init__(self, part: Any) -> None:
        self._part = part
        self.subnet: Subnet | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Activate."""
        if self.subnet is not None:
            with torch.inference_mode(False):
                self._part.activate(self.subnet)


class Extraction(BeforeFirstBatch):
    """Lets the extracted subnet stand in the place of the elastic part, for one validation.

    Args:
        place: The place.
        calls: Arguments of the part's forward pass, as it gets them.

    Attributes:
        subnet: The subnet; set before each validation.
    """

    def __init__(self, place: Place, calls: list[Call]) -> None:
        self._place, self._calls = place, calls
        self.subnet: Subnet | None = None

    def prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Extract."""
        assert self.subnet is not None, "it is set before each validation"
        with torch.inference_mode(False), torch.no_grad():
            net = extracted(self._place.part, self.subnet, self._calls, only="inference")
            self._place.put(net)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that it was the extracted subnet that has run."""
        if self._place.current is not self._place.part and not self._place.runs:
            name = type(self._place.part).__name__
            msg = (
                f"validation_step does not call {name}.forward(), which is what the extracted "
                "subnet has. Let it call the network itself, or search with score='network'."
            )
            raise MeasurementError(msg)


class Conversion(BeforeFirstBatch):
    """Lets the file of the extracted subnet stand in its place, when it has its statistics.

    Args:
        place: The place.
        calls: Arguments of the part's forward pass.
        runtime: `"onnxruntime"` or `"openvino"`.
        tolerance: Of the outputs; see `export`.
    """

    def __init__(
        self, place: Place, calls: list[Call], runtime: str, tolerance: float | None
    ) -> None:
        self._place, self._calls = place, calls
        self._runtime, self._tolerance = runtime, tolerance

    def prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Convert."""
        place = self._place
        watcher = place.watch(None)  # the runs that compare are none of the validation
        with torch.inference_mode(False), torch.no_grad():
            place.put(Converted(place.current, self._calls[0], self._runtime, self._tolerance))
        place.watch(watcher)


def extracted(
    part: Any, subnet: Subnet, calls: list[Call], *, only: Only | None = None
) -> nn.Module:
    """Return a subnet as a network of its own, on the device of the super-network.

    Args:
        part: The super-network.
        subnet: The subnet.
        calls: Arguments of its forward pass; the first is the example input.
        only: As in `extract`.
    """
    return extract(part, subnet, example_of(part, calls[0]) if calls else None, only=only)


class Converted(nn.Module):
    """A network as a file in a runtime, called as the network is.

    Args:
        net: The network, in eval mode.
        call: Arguments of its forward pass.
        runtime: `"onnxruntime"` or `"openvino"`.
        tolerance: Largest difference of the outputs; see `export`.

    Raises:
        ExportError: It cannot be converted, or the file gives other outputs.
    """

    def __init__(
        self, net: nn.Module, call: Call, runtime: str, tolerance: float | None = None
    ) -> None:
        super().__init__()
        self._runtime, self._name = runtime, class_name(net)
        self._signature = inspect.signature(net.forward)
        form = registry.make(FORMATS[runtime])
        self._outputs, self._spec = tree_flatten(outputs_of(net, call))
        example = example_of(net, call)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"net{form.suffix}"
            exported = export(net, path, example, format=form.name, tolerance=tolerance)
            self._runner = form.open(path)
        self._sizes = {port["name"]: port["shape"] for port in exported.metadata["inputs"]}
        self._names = [*self._sizes]
        self._any_batch = exported.dynamic_batch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file on the CPU; outputs have the structure and device of the network's."""
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        tensors = {n: x for n, x in _by_name(arguments) if isinstance(x, torch.Tensor)}
        device = next(iter(tensors.values())).device
        try:
            values = iter(self._runner.run([tensors[name].cpu() for name in self._names]).values())
        except Exception as error:
            msg = f"The {self._runtime} file of {self._name} fails: {error!s:.200}."
            if not self._any_batch:
                msg += " It takes batches of one size only: validate with such, or score otherwise."
            for name, sizes in self._sizes.items():
                if [*tensors[name].shape[1:]] != sizes[1:]:
                    made, given = (
                        str((*x,)).replace("'", "") for x in (sizes, tensors[name].shape)
                    )
                    msg += (
                        f" It takes {name} {made}, as in the first batch, and got {given}: "
                        "validate with inputs of one size, or score otherwise."
                    )
            raise RuntimeError(msg) from error
        leaves = [
            next(values).to(device=device, dtype=x.dtype) if isinstance(x, torch.Tensor) else x
            for x in self._outputs
        ]
        return tree_unflatten(leaves, self._spec)


def _by_name(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return arguments by the names that inputs of a file have, variadic ones numbered."""
    items: list[tuple[str, Any]] = []
    for name, value in arguments.items():
        if isinstance(value, tuple):
            items += [(f"input_{len(items) + i}", x) for i, x in enumerate(value)]
        elif isinstance(value, dict):
            items += list(value.items())
        else:
            items.append((name, value))
    return items
