# SPDX-License-Identifier: Apache-2.0
"""BatchNorm recalibration before each validation of a subnet."""

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
    transfer,
)
from lightning_subnet.training.validation.batch_input import calibration_step, model_input
from lightning_subnet.training.validation.frozen_data import FrozenData
from lightning_subnet.training.validation.place import Place


class Recalibration(Callback):
    """Gives the subnet in force its own BatchNorm statistics before the first batch.

    By then the module is in place, and its own hooks have run. The first validation checks that the
    network gets the same input in recalibration as in validation.

    Args:
        data: The batches of training data.
        place: The place of the elastic part in the LightningModule.
    """

    def __init__(self, data: FrozenData, place: Place) -> None:
        self._data, self._place = data, place
        self._step = calibration_step(place.model)
        self._works = False
        self._compares = self._step is None
        self._inputs: list[torch.Tensor] = []  # of the elastic part, in recalibration
        self._inputs_of_step: list[torch.Tensor] = []  # and in validation_step
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
                    self._place.root,
                    (
                        self._input(transfer(trainer, pl_module, cloned(raw)), pl_module)
                        for raw in self._data.calibration
                    ),
                    max_images=self._data.images,
                    forward=self._place.run,
                )
                if self._compares:
                    self._watch(batch, pl_module)
        except Exception as error:
            if self._works:
                raise  # it is this subnet
            msg = (
                f"{type(self._place.root).__name__} failed on the input of a training batch, which "
                f"was to recalibrate BatchNorm: {error}. {_HINT}"
            )
            raise MeasurementError(msg) from error
        self._works = True

    def _input(self, batch: Any, module: LightningModule) -> Any:
        return batch if self._step is not None else model_input(batch, module)

    def _watch(self, batch: Any, module: LightningModule) -> None:
        """Note the inputs of the elastic part: as in recalibration, then in validation_step."""
        self._compares = False
        try:
            item = model_input(cloned(batch), module)
        except SearchError:  # validation batches have another form
            return
        for inputs in (self._inputs, self._inputs_of_step):
            if self._hook is not None:
                self._hook.remove()
            self._hook = self._place.current.register_forward_pre_hook(
                lambda _module, args, inputs=inputs: inputs.extend(
                    x.detach().clone() for x in args[:1] if isinstance(x, torch.Tensor)
                )
            )
            if inputs is self._inputs:
                self._place.run(item)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_args: Any
    ) -> None:
        """Compare, in the first validation, the inputs that the network got."""
        if self._hook is None:
            return
        self.end()
        if (
            self._inputs
            and self._inputs_of_step
            and not any(
                one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-3)
                for one in self._inputs
                for other in self._inputs_of_step
            )
        ):
            msg = (
                f"{type(pl_module).__name__}.validation_step gives the network another input than "
                f"the first item of a batch, which recalibrates BatchNorm. {_HINT}"
            )
            raise MeasurementError(msg)
        self._inputs, self._inputs_of_step = [], []

    def end(self) -> None:
        """Take the hook away that notes inputs, also after a validation that failed."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


_HINT = (
    "Give the module a forward(x) that takes the first item of a batch, or a "
    "calibration_step(batch) that runs the network on it; or set calibration_images=0."
)
