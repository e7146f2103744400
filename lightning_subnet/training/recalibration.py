# SPDX-License-Identifier: Apache-2.0
"""BatchNorm recalibration where the Trainer validates, and where a subnet is extracted."""

from __future__ import annotations

from typing import Any

import torch

from lightning_subnet._torch.contexts import muted
from lightning_subnet._torch.inputs import cloned
from lightning_subnet.elasticity.batchnorm import recalibrate
from lightning_subnet.errors import MeasurementError, SearchError
from lightning_subnet.training._lightning import (
    Callback,
    LightningModule,
    Trainer,
    in_precision,
    is_overridden,
    transferred,
)
from lightning_subnet.training.frozen_data import FrozenData, model_input, own_step


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
