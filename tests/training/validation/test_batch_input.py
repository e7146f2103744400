# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_subnet.errors import SearchError
from tests.networks import LitMlp, digits, search


def test_batches_of_another_form_are_calibrated_by_the_model(model: LitMlp) -> None:
    class Mapped(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            super().validation_step((batch["pixels"], batch["classes"]), i)

    class Calibrated(Mapped):
        seen = 0

        def calibration_step(self, batch: Any) -> None:
            type(self).seen += len(batch["pixels"])
            self(batch["pixels"])

    rows = [{"pixels": x, "classes": y} for x, y in digits()]
    loaders = {"dataloaders": DataLoader(rows, 600), "train_dataloaders": DataLoader(rows, 300)}
    run = search(objectives={"val_acc": "max"}, budget=2, checks=False)
    with pytest.raises(SearchError, match=r"a method calibration_step\(batch\)"):
        run.fit(Mapped(), **loaders, progress=False)
    calibrated = Calibrated()
    assert len(run.fit(calibrated, **loaders, progress=False).history) == 2
    assert Calibrated.seen == 2 * 600  # batches of a form of their own stay whole


def test_a_mapping_as_batch_needs_an_example_input(model: LitMlp) -> None:
    class Mapped(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            super().validation_step((batch["pixels"], batch["classes"]), i)

    rows = [{"pixels": x, "classes": y} for x, y in digits()]
    without = search(calibration_images=0)
    with pytest.raises(SearchError, match="Set example_input_array"):
        without.fit(Mapped(), dataloaders=DataLoader(rows, 600), progress=False)
    mapped = Mapped()
    mapped.example_input_array = torch.zeros(1, 64)
    assert len(without.fit(mapped, dataloaders=DataLoader(rows, 600), progress=False).front)
