# SPDX-License-Identifier: Apache-2.0
"""A subnet as a module of its own, with the BatchNorm statistics that it was measured with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet._torch.inputs import as_weight, cloned
from lightning_subnet.elasticity.extraction import own_or_frozen
from lightning_subnet.elasticity.parity import Call, check_parity, example_of
from lightning_subnet.elasticity.protocol import activated
from lightning_subnet.errors import ParityError, SearchError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.training._lightning import Trainer, transfer
from lightning_subnet.training.validation.batch_input import (
    calibration_step,
    few_rows,
    model_input,
)
from lightning_subnet.training.validation.checks import Checks, Score
from lightning_subnet.training.validation.frozen_data import FrozenData
from lightning_subnet.training.validation.place import Place
from lightning_subnet.training.validation.restore import BufferState
from lightning_subnet.training.validation.scoring import extracted

_ROWS = 8  # of an example


@dataclass(frozen=True)
class Extractor:
    """Gives a subnet as a module of its own, with BatchNorm statistics as it was measured with.

    Args:
        place: The place of the elastic part in the LightningModule.
        calibration: Inputs that recalibrate BatchNorm.
        calls: Arguments of the part's forward pass, on which its outputs are compared.
        images: How many samples recalibrate.
        score: How subnets were scored; one that was extracted gets its statistics afterwards.
        checks: Whether outputs must be the same, and how far they may differ.
    """

    place: Place
    calibration: list[Any]
    calls: list[Call]
    images: int
    score: Score = "network"
    checks: Checks = Checks()  # noqa: RUF009 - frozen

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        place: Place,
        data: FrozenData,
        calls: list[Call],
        score: Score,
        checks: Checks,
    ) -> Extractor:
        """Return an extractor that does not need the Trainer any more."""
        model = place.model
        inputs = [
            transfer(trainer, model, cloned(raw), torch.device("cpu")) for raw in data.calibration
        ]
        if calibration_step(model) is None:
            inputs = [model_input(batch, model) for batch in inputs]
        return cls(place, inputs, calls, data.images, score, checks)

    @property
    def model(self) -> Any:
        """The LightningModule."""
        return self.place.model

    def __call__(self, subnet: Subnet, *, whole: bool = False) -> nn.Module:
        """Return the subnet; its attribute `parity` is the largest difference of the outputs.

        Args:
            subnet: The subnet.
            whole: Whether the class of the network is to stay: then one without an `extract` of its
                own is a frozen copy.

        Raises:
            ParityError: The outputs are not those of the super-network.
        """
        model, part = self.place.model, self.place.part
        buffers = BufferState(model)
        try:
            with activated(part, subnet), evaluating(model), torch.no_grad():
                if self.score == "network":
                    self._recalibrate()
                plain = (
                    own_or_frozen(part, subnet) if whole else extracted(part, subnet, self.calls)
                )
                plain.parity = self.parity(subnet, plain)  # type: ignore[assignment] # a figure
                if self.score != "network":
                    self.place.put(plain)
                    self._recalibrate()
        finally:
            self.place.restore()
            buffers.restore()
        return plain.eval()

    def _recalibrate(self) -> None:
        if self.calibration:
            self.place.recalibrate(map(self._ready, self.calibration), max_images=self.images)

    def example(self) -> Any:
        """Return the arguments that the network gets with a batch of samples, at most 8 of them.

        Returns:
            A tuple of positional arguments; if it gets some by name, a dict of all.

        Raises:
            SearchError: The network was not seen running.
        """
        if not self.calls:
            msg = (
                "No example input is known, as no batch of the search goes through the forward() "
                f"of {type(self.place.part).__name__}. Pass example_input=, as the network takes "
                "it, or set example_input_array in the model."
            )
            raise SearchError(msg)
        return example_of(self.place.part, few_rows(self.calls[0], _ROWS))

    def _ready(self, batch: Any) -> Any:
        weight = next(self.place.model.parameters())
        batch = cloned(batch, weight.device)
        if calibration_step(self.place.model) is None or isinstance(batch, torch.Tensor):
            return as_weight(weight, batch)
        return batch

    def parity(self, subnet: Subnet, plain: nn.Module) -> float:
        """Return the largest absolute difference of outputs; NaN where none can be compared.

        Raises:
            ParityError: It is larger than rounding explains.
        """
        if not self.calls:
            return math.nan
        part, calls, allowed = self.place.part, self.calls, self.checks.tolerance
        if self.checks.parity:
            return check_parity(part, subnet, plain, calls, tolerance=allowed).absolute
        try:  # it is only told
            return check_parity(part, subnet, plain, calls, tolerance=math.inf).absolute
        except ParityError:
            return math.nan
