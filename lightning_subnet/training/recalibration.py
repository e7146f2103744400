# SPDX-License-Identifier: Apache-2.0
"""BatchNorm recalibration where the Trainer validates, and where a subnet is extracted."""

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

from lightning_subnet._torch.fingerprints import cloned
from lightning_subnet.costs.counts import as_weight
from lightning_subnet.elasticity.batchnorm import recalibrate
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import activated, evaluating
from lightning_subnet.errors import MeasurementError, SearchError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.training._lightning import (
    Callback,
    LightningModule,
    Trainer,
    in_precision,
    is_overridden,
    transferred,
)
from lightning_subnet.training.frozen_data import FrozenData, model_input, own_step
from lightning_subnet.training.restore import BufferState
from lightning_subnet.training.subnet_sampling import muted


def network(model: LightningModule, part: Any) -> Any:
    """Return what is called with the input of a batch: the module, or its elastic part."""
    return model if is_overridden("forward", model) else part


class Recalibration(Callback):
    """Gives the subnet in force its own BatchNorm statistics before the first batch.

    By then the module is in place, and its own hooks have run. In the first validation it is
    checked that the network sees in recalibration what it sees in validation.
    """

    def __init__(self, data: FrozenData, model: LightningModule, part: Any) -> None:
        self._data = data
        self._own = own_step(model)
        self._network, self._part = network(model, part), part
        self._works = False
        self._checked = self._own is not None
        self._expected: list[torch.Tensor] = []
        self._seen: list[torch.Tensor] = []
        self._hook: Any = None

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Recalibrate before the first batch of the first dataloader."""
        if batch_idx or dataloader_idx:
            return
        try:
            with in_precision(trainer), muted(pl_module):
                recalibrate(
                    pl_module,
                    (
                        self._input(transferred(trainer, pl_module, cloned(raw)), pl_module)
                        for raw in self._data.calibration
                    ),
                    max_images=self._data.images,
                    forward=self._own or self._network,
                )
                if not self._checked:
                    self._watch(batch, pl_module)
        except Exception as error:
            if self._works:
                raise  # it is this subnet
            msg = (
                f"{type(self._network).__name__} failed on the input of a training batch, which "
                f"was to recalibrate BatchNorm: {error}. {_HINT}"
            )
            raise MeasurementError(msg) from error
        self._works = True

    def _input(self, batch: Any, module: LightningModule) -> Any:
        return batch if self._own is not None else model_input(batch, module)

    def _watch(self, batch: Any, module: LightningModule) -> None:
        """Look at what the elastic part gets from recalibration, then from validation_step."""
        self._checked = True
        try:
            mine = model_input(cloned(batch), module)
        except SearchError:  # validation batches have another form
            return
        for kept in (self._expected, self._seen):
            if self._hook is not None:
                self._hook.remove()
            self._hook = self._part.register_forward_pre_hook(
                lambda _module, args, kept=kept: kept.extend(
                    x.detach().clone() for x in args[:1] if isinstance(x, torch.Tensor)
                )
            )
            if kept is self._expected:
                self._network(mine)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_args: Any
    ) -> None:
        """Compare, in the first validation, what the network got."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if (
            self._expected
            and self._seen
            and not any(
                one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-3)
                for one in self._expected
                for other in self._seen
            )
        ):
            msg = (
                f"{type(pl_module).__name__}.validation_step gives the network another input than "
                f"the first item of a batch, which recalibrates BatchNorm. {_HINT}"
            )
            raise MeasurementError(msg)
        self._expected, self._seen = [], []


_HINT = (
    "Give the module a forward(x) that takes the first item of a batch, or a "
    "calibration_step(batch) that runs the network on it; or set calibration_images=0."
)


def _few(x: Any) -> Any:
    return x[:8].detach().cpu().clone() if isinstance(x, torch.Tensor) else x


@dataclass(frozen=True)
class Extractor:
    """Gives a subnet as a module of its own, with BatchNorm statistics as it was measured with.

    Args:
        model: The LightningModule.
        part: What activates subnets.
        step: Runs the network on an input.
        calibration: Inputs that recalibrate BatchNorm.
        samples: Inputs to compare the outputs of the module and the super-network on.
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
        """Return an extractor that needs the Trainer no more."""
        own = own_step(model)
        inputs = [
            transferred(trainer, model, cloned(raw), torch.device("cpu"))
            for raw in data.calibration
        ]
        inputs = inputs if own is not None else [model_input(batch, model) for batch in inputs]
        samples = inputs[:1] if inputs else [x for x in (example,) if isinstance(x, torch.Tensor)]
        return cls(model, part, own or network(model, part), inputs, samples, data.images)

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
        """Return what the network gets of a batch of samples, at most 8 of them.

        Returns:
            A tuple of positional arguments; if it gets some by name, a dict of all.

        Raises:
            SearchError: There are no samples, or the network does not run on them.
        """
        seen: list[tuple[Any, Any]] = []
        hook = self.part.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
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
        if not seen:
            msg = (
                f"No example input is known ({reason!s:.120}). Pass example_input=, as the network"
            )
            raise SearchError(f"{msg} takes it, or set example_input_array in the model.")
        args, kwargs = tree_map(_few, seen[0])
        if not kwargs:
            return tuple(args)
        bound = inspect.signature(self.part.forward).bind(*args, **kwargs)
        return dict(bound.arguments)

    def _ready(self, batch: Any) -> Any:
        weight = next(self.model.parameters())
        batch = cloned(batch, weight.device)
        return as_weight(weight, batch) if isinstance(batch, torch.Tensor) else batch

    def _parity(self, plain: nn.Module) -> float:
        """Return the largest absolute difference of outputs; NaN where it cannot be told."""
        seen: list[float] = []

        def remember(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                seen.append((plain(*args, **kwargs) - output).abs().max().item())

        hook = self.part.register_forward_hook(remember, with_kwargs=True)
        try:
            with suppress(Exception):  # one sample may be too few, as for batch statistics
                for batch in self.samples:
                    self.step(self._ready(batch))
        finally:
            hook.remove()
        return max(seen, default=math.nan)
