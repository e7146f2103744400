# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_subnet._torch.fingerprints import data_fingerprint
from lightning_subnet.errors import SearchError
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import Resident, Source
from tests.networks import Digits, LitMlp, digits, quiet_trainer, search

TRAIN = DataLoader(digits(), 100)


def test_the_data_is_set_up_once_although_setup_splits_at_random(model: LitMlp) -> None:
    data = Digits()
    with TrainerEvaluator(model, Source(data), trainer=quiet_trainer()) as evaluator:
        subnets = evaluator.space.sample(4, rng=0)
        there = [evaluator.evaluate(s) for s in subnets]
        back = [evaluator.evaluate(s) for s in reversed(subnets)][::-1]
    assert there == back  # neither the split nor the order matters
    assert data.calls == ["prepare_data", "setup fit", "val_dataloader", "teardown fit"]
    assert "setup" not in vars(data)
    assert data.setup.__func__ is Digits.setup


def test_a_datamodule_made_from_datasets_can_be_searched_twice(model: LitMlp) -> None:
    rows = digits()
    data = L.LightningDataModule.from_datasets(train_dataset=rows, val_dataset=rows, batch_size=600)
    own = data.val_dataloader
    for _ in range(2):
        assert len(search().fit(model, data, progress=False).history) == 6
        assert data.val_dataloader is own


def test_dataloaders_without_a_datamodule_and_several_of_them(model: LitMlp) -> None:
    loaders = [DataLoader(digits(), 900), DataLoader(digits(), 600)]
    one = search().fit(model, dataloaders=loaders[0], train_dataloaders=TRAIN, progress=False)
    assert len(one.history) == 6
    names = {"val_acc/dataloader_idx_0": "max", "val_acc/dataloader_idx_1": "max"}
    two = search(objectives=names).fit(
        model, dataloaders=loaders, train_dataloaders=TRAIN, progress=False
    )
    first, second = (two.history.column(name) for name in names)
    np.testing.assert_allclose(first, second, atol=1e-6)  # the same data, in other batches


def test_dataloaders_by_name_and_endless_ones(model: LitMlp) -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield from digits()

    named = {"one": DataLoader(digits(), 900), "two": DataLoader(digits(), 600)}
    objectives = {"val_acc/dataloader_idx_1": "max"}
    both = search(objectives=objectives).fit(
        model, dataloaders=named, train_dataloaders=TRAIN, progress=False
    )
    assert len(both.history) == 6
    trainer, endless = quiet_trainer(limit_val_batches=2), DataLoader(Endless(), 100)
    cut = search(trainer=trainer).fit(
        model, dataloaders=endless, train_dataloaders=TRAIN, progress=False
    )
    assert len(cut.history) == 6


def test_hooks_of_the_module_run_once(model: LitMlp) -> None:
    class Hooked(LitMlp):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def prepare_data(self) -> None:
            self.calls.append("prepare_data")

        def setup(self, stage: str) -> None:
            self.calls.append(f"setup {stage}")

        def teardown(self, stage: str) -> None:
            self.calls.append(f"teardown {stage}")

    hooked = Hooked()
    search().fit(hooked, Digits(), progress=False)
    assert hooked.calls == ["prepare_data", "setup validate", "teardown validate"]
    assert hooked.setup.__func__ is Hooked.setup


def test_a_setup_that_initialises_does_not_lose_the_weights() -> None:
    class Initialising(LitMlp):
        def setup(self, stage: str) -> None:
            if stage == "fit":
                nn.init.zeros_(self.net.last.weight)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(digits(), 600)

        def train_dataloader(self) -> DataLoader:
            return TRAIN

    model = Initialising()
    before = model.net.last.weight.detach().clone()
    run = search(objectives={"val_acc": "max"})
    own = run.fit(model, progress=False).history[0].values
    given = run.replace().fit(
        model, dataloaders=model.val_dataloader(), train_dataloaders=TRAIN, progress=False
    )
    assert own == given.history[0].values
    assert torch.equal(model.net.last.weight, before)


def test_a_datamodule_without_training_data_where_batchnorm_needs_it(model: LitMlp) -> None:
    class ValOnly(L.LightningDataModule):
        def val_dataloader(self) -> DataLoader:
            return DataLoader(digits(), 600)

    with pytest.raises(SearchError, match=r"BatchNorm.*ValOnly has no train_dataloader"):
        search().fit(model, ValOnly(), progress=False)
    assert len(search(calibration_images=0).fit(model, ValOnly(), progress=False).history) == 6


def test_batches_of_numpy_arrays_are_told_apart() -> None:
    rows = np.arange(4000.0).reshape(40, 100)
    changed = rows.copy()
    changed[15] += 1
    assert data_fingerprint([Resident([rows])]) != data_fingerprint([Resident([changed])])
