# SPDX-License-Identifier: Apache-2.0
"""A subnet as a module of its own, with the BatchNorm statistics that it was measured with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet._torch.inputs import as_weight, cloned
from lightning_subnet.elasticity.batchnorm import recalibrate
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import activated
from lightning_subnet.errors import SearchError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.training._lightning import LightningModule, Trainer, transfer
from lightning_subnet.training.validation.batch_input import (
    calibration_step,
    model_input,
    network_of,
)
from lightning_subnet.training.validation.frozen_data import FrozenData
from lightning_subnet.training.validation.restore import BufferState


@dataclass(frozen=True)
class Extractor:
    """Gives a subnet as a module of its own, with BatchNorm statistics as it was measured with.

    Args:
        model: The LightningModule.
        part: Its elastic part, which activates subnets.
        step: Runs the network on an input.
        calibration: Inputs that recalibrate BatchNorm.
        samples: Inputs on which the outputs of subnet and super-network are compared.
        images: How many samples recalibrate.
    """

    model: LightningModule
    part: Any
    step: Callable[[Any], Any]
    calibration: list[Any]
    samples: list[Any]
    images: int

    @classmethod
    def of(
        cls, trainer: Trainer, model: LightningModule, part: Any, data: FrozenData, example: Any
    ) -> Extractor:
        """Return an extractor that does not need the Trainer any more."""
        step = calibration_step(model)
        inputs = [
            transfer(trainer, model, cloned(raw), torch.device("cpu")) for raw in data.calibration
        ]
        inputs = inputs if step is not None else [model_input(batch, model) for batch in inputs]
        samples = inputs[:1] if inputs else [x for x in (example,) if isinstance(x, torch.Tensor)]
        run = step or network_of(model, part)
        return cls(model, part, run, inputs, samples, data.images)

    def __call__(self, subnet: Subnet) -> nn.Module:
        """Return the subnet; its attribute `parity` is the largest difference of the outputs."""
        buffers = BufferState(self.model)
        try:
            with activated(self.part, subnet), evaluating(self.model), torch.no_grad():
                if self.calibration:
                    recalibrate(
                        self.model,
                        map(self._ready, self.calibration),
                        max_images=self.images,
                        forward=self.step,
                    )
                plain = extract(self.part, subnet)
                plain.parity = self._parity(plain)  # type: ignore[assignment] # a figure
        finally:
            buffers.restore()
        return plain

    def example(self) -> Any:
        """Return the arguments that the network gets with a batch of samples, at most 8 of them.

        Returns:
            A tuple of positional arguments; if it gets some by name, a dict of all.

        Raises:
            SearchError: There are no samples, or the network does not run on them.
        """
        calls: list[tuple[Any, Any]] = []
        hook = self.part.register_forward_pre_hook(
            lambda _module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        buffers = BufferState(self.model)
        reason: object = "there are no samples"
        try:
            with evaluating(self.model), torch.no_grad():
                for batch in self.samples:
                    self.step(self._ready(batch))
        except Exception as error:
            reason = error
        finally:
            hook.remove()
            buffers.restore()
        if not calls:
            msg = (
                f"No example input is known ({reason!s:.120}). Pass example_input=, as the network "
                "takes it, or set example_input_array in the model."
            )
            raise SearchError(msg)
        args, kwargs = tree_map(_first_rows, calls[0])
        if not kwargs:
            return tuple(args)
        bound = inspect.signature(self.part.forward).bind(*args, **kwargs)
        return dict(bound.arguments)

    def _ready(self, batch: Any) -> Any:
        weight = next(self.model.parameters())
        batch = cloned(batch, weight.device)
        return as_weight(weight, batch) if isinstance(batch, torch.Tensor) else batch

    def _parity(self, plain: nn.Module) -> float:
        """Return the largest absolute difference of outputs; NaN where none can be compared."""
        gaps: list[float] = []

        def compare(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                gaps.append((plain(*args, **kwargs) - output).abs().max().item())

        hook = self.part.register_forward_hook(compare, with_kwargs=True)
        try:
            with suppress(Exception):  # one sample may be too few, as for batch statistics
                for batch in self.samples:
                    self.step(self._ready(batch))
        finally:
            hook.remove()
        return max(gaps, default=math.nan)


def _first_rows(x: Any) -> Any:
    return x[:8].detach().cpu().clone() if isinstance(x, torch.Tensor) else x
