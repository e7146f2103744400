# SPDX-License-Identifier: Apache-2.0
"""BatchNorm recalibration before each validation of a subnet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_subnet._messages import listed, warn
from lightning_subnet._torch.contexts import muted, random_state
from lightning_subnet._torch.inputs import cloned
from lightning_subnet.elasticity.slicing.network import SlicedNetwork
from lightning_subnet.elasticity.statistics import norms, others
from lightning_subnet.errors import CalibrationWarning, MeasurementError, SearchError
from lightning_subnet.training._lightning import (
    BeforeFirstBatch,
    LightningModule,
    Trainer,
    in_precision,
    transfer,
)
from lightning_subnet.training.validation.batch_input import calibration_step, model_input
from lightning_subnet.training.validation.frozen_data import FrozenData
from lightning_subnet.training.validation.place import Place
from lightning_subnet.training.validation.restore import BufferState


class Recalibration(BeforeFirstBatch):
    """Gives the subnet in force its own BatchNorm statistics before the first batch.

    The first validation checks that the network gets the same input in it as in validation.

    Args:
        data: The batches of training data.
        place: The place of the elastic part in the LightningModule.
    """

    def __init__(self, data: FrozenData, place: Place) -> None:
        self._data, self._place = data, place
        self._step = calibration_step(place.model)
        self._works = False
        self._compares = self._step is None
        self._shapes: dict[str, torch.Size] = {}  # of one input each, training and validation
        self._inputs: list[torch.Tensor] = []  # of the elastic part, in recalibration
        self._inputs_of_step: list[torch.Tensor] = []  # and in validation_step
        self._watches = False

    def prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Recalibrate."""
        self._note_shape("validation", lambda: model_input(batch, module))
        try:
            with in_precision(trainer), muted(module):
                before = {} if self._works else _floating_buffers(self._place.current)
                self._place.recalibrate(
                    (
                        self._input(transfer(trainer, module, cloned(raw)), module)
                        for raw in self._data.calibration
                    ),
                    max_images=self._data.images,
                )
                if not self._works:
                    self._check_renewed(before, trainer, module)
                if self._compares:
                    self._watch(batch, module)
        except Exception as error:
            if self._works:
                raise  # it is this subnet
            if isinstance(error, (MeasurementError, CalibrationWarning)):
                raise  # it says what to do
            msg = (
                f"{type(self._place.root).__name__} failed on the input of a training batch, which "
                f"was to recalibrate BatchNorm: {error}. {self._difference()}{_HINT}"
            )
            raise MeasurementError(msg) from error
        if not self._works:
            self._compare_shapes()
        self._works = True

    def _check_renewed(
        self, before: dict[str, torch.Tensor], trainer: Trainer, module: LightningModule
    ) -> None:
        """Refuse an extraction in which statistics stay that are renewed in the super-network.

        Args:
            before: The buffers of the extraction before its renewal.
            trainer: The Trainer.
            module: The model.
        """
        place, net = self._place, self._place.current
        if net is place.part or not (norms(place.part) or others(place.part)):
            return
        moved, buffers = _changes(net, before), BufferState(module)
        of_network = _floating_buffers(place.part)
        place.restore()
        try:
            first = transfer(trainer, module, cloned(self._data.calibration[0]))
            place.recalibrate([self._input(first, module)], max_images=self._data.images)
            renewed = _changes(place.part, of_network)
        finally:
            buffers.restore()
            place.put(net)
        # A slicing has the names of the network; an extraction of its author may have others.
        missing = renewed - moved if isinstance(net, SlicedNetwork) or not moved else set()
        if missing:
            name = type(place.part).__name__
            msg = (
                f"Running statistics of {name} are renewed for each subnet in the super-network, "
                f"and stay as they are in its extraction: {listed(sorted(missing), 3)}. Search "
                f"with score='network', or let {name}.extract() give the layers that have them."
            )
            raise MeasurementError(msg)

    def _input(self, batch: Any, module: LightningModule) -> Any:
        if self._step is not None:
            return batch
        item = model_input(batch, module)
        self._note_shape("training", lambda: item)
        return item

    def _note_shape(self, kind: str, item: Callable[[], Any]) -> None:
        """Note the shape of the first input of a kind, where it is a tensor."""
        if self._step is None and kind not in self._shapes:
            with suppress(SearchError):  # validation batches may have another form
                first = item()
                if isinstance(first, torch.Tensor):
                    self._shapes[kind] = first.shape[1:]

    def _difference(self) -> str:
        """Return a sentence with the shapes of the inputs, where they differ."""
        shapes = {kind: (..., *shape) for kind, shape in self._shapes.items()}
        if len({*shapes.values()}) <= 1:
            return ""
        training, validation = (
            str(shapes[kind]).replace("Ellipsis", "n") for kind in ("training", "validation")
        )
        return f"Training inputs have the shape {training}, validation inputs {validation}. "

    def _compare_shapes(self) -> None:
        """Refuse training inputs of another form than validation's; warn of another size.

        Sequences and vectors are as long as the network takes them.
        """
        difference = self._difference()
        if not difference:
            return
        one, other = self._shapes["training"], self._shapes["validation"]
        if len(one) != len(other):
            msg = f"{difference}BatchNorm is to be recalibrated on what validation sees. {_HINT}"
            raise MeasurementError(msg)
        if len(one) >= _IMAGE:
            warn(
                f"{difference}BatchNorm statistics of one size are not those of another. Give "
                "train_dataloaders= with inputs of the size that is validated.",
                CalibrationWarning,
            )

    def _watch(self, batch: Any, module: LightningModule) -> None:
        """Note the inputs of the elastic part: as in recalibration, then in validation_step."""
        self._compares = False
        try:
            item = model_input(cloned(batch), module)
        except SearchError:  # validation batches have another form
            return
        for inputs in (self._inputs, self._inputs_of_step):
            self._watches = True
            self._place.watch(partial(_note, inputs))
            if inputs is self._inputs:
                with random_state():  # the first validation draws as later ones do
                    self._place.run(item)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_args: Any
    ) -> None:
        """Compare, in the first validation, the inputs that the network got."""
        if not self._watches:
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
        """Note inputs no more, also after a validation that failed."""
        self._watches = False
        self._place.watch(None)


def _floating_buffers(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the buffers that may be statistics, by name."""
    return {k: b.detach().clone() for k, b in net.named_buffers() if b.is_floating_point()}


def _changes(net: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of the buffers that are not what they were."""
    now = dict(net.named_buffers())
    return {k for k, b in before.items() if k in now and not torch.equal(now[k], b)}


def _note(inputs: list[torch.Tensor], args: tuple[Any, ...]) -> None:
    """Add a copy of the first argument to inputs, if it is a tensor."""
    inputs += [x.detach().clone() for x in args[:1] if isinstance(x, torch.Tensor)]


_IMAGE = 3  # dimensions of a sample with sides: its statistics depend on their length

_HINT = (
    "Give the module a forward(x) that takes the first item of a batch, or a "
    "calibration_step(batch) that runs the network on it; or set calibration_images=0."
)
