# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet._torch.fingerprints import data_fingerprint
from lightning_subnet.elasticity.batchnorm import n_samples
from lightning_subnet.errors import CalibrationWarning, SearchError
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import (
    CALIBRATION_IMAGES,
    Resident,
    Source,
    calibration_batches,
)
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


# Batches that recalibrate


def calibration(model: L.LightningModule, loader: Any, images: int = 64) -> list[Any]:
    source = Source(train_dataloaders=loader, calibration_images=images)
    return calibration_batches(model, source, model)


def labelled(y: torch.Tensor, batch_size: int = 16, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(len(y), 4), y), batch_size, **options)


@pytest.mark.parametrize(
    ("batch_size", "images", "sizes"),
    [
        (7, 512, [7] * 73),
        (73, 512, [73] * 7),
        (64, 512, [64] * 8),
        (300, 512, [300]),
        (600, 512, [600]),  # cut when it is used
        (100, 1797, [100] * 17 + [97]),  # the loader's own last batch
    ],
)
def test_no_batch_is_smaller_than_the_loader_gives(
    model: LitMlp, batch_size: int, images: int, sizes: list[int]
) -> None:
    batches = calibration(model, DataLoader(digits(), batch_size), images)
    assert [len(x) for x, _ in batches] == sizes


@pytest.mark.parametrize("batch_size", [7, 73])
def test_a_search_is_not_stopped_by_one_sample_left_over(model: LitMlp, batch_size: int) -> None:
    data = [DataLoader(torch.utils.data.Subset(digits(), range(512)), size) for size in (64, 256)]
    data[0] = DataLoader(data[0].dataset, batch_size)
    run = search(objectives={"val_acc": "max"}, calibration_images=600 - 88)
    history = run.fit(model, dataloaders=data[1], train_dataloaders=data[0], progress=False).history
    assert all(evaluation.ok for evaluation in history)


def test_other_statistics_than_batchnorms_need_data_and_frozen_ones_none() -> None:
    class Lit(LitMlp):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.net = nn.Sequential(layer)

    rows = Resident([torch.zeros(4, 4)] * 3)
    layer = nn.BatchNorm1d(4)
    layer.track_running_stats = False
    assert len(calibration(Lit(nn.InstanceNorm1d(4, track_running_stats=True)), rows, 12)) == 3
    assert calibration(Lit(layer), rows, 12) == calibration(Lit(nn.LayerNorm(4)), rows, 12) == []


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (torch.full((64,), 3), "The 64 calibration images are all of class 3"),
        (torch.arange(64) // 32, r"are sorted by class \(0 to 1\)"),
        (torch.full((64, 1), 3), "all of class 3"),
    ],
)
def test_calibration_images_that_are_not_shuffled(
    model: LitMlp, y: torch.Tensor, text: str
) -> None:
    for loader in (labelled(y), Resident([{"pixels": torch.zeros(64, 4), "labels": y}])):
        with pytest.warns(CalibrationWarning, match=rf"{text}.*Shuffle them: shuffle=True"):
            calibration(WithStep(), loader)


class WithStep(LitMlp):
    def calibration_step(self, batch: Any) -> None: ...


def test_other_labels_say_nothing_of_the_order() -> None:
    loaders = [
        labelled(torch.arange(64) % 10),
        labelled(torch.zeros(64, dtype=torch.int64), shuffle=True),
        labelled(torch.zeros(16, dtype=torch.int64)),
        labelled(torch.arange(64)),  # numbers of samples
        labelled(torch.zeros(64)),  # to be regressed
        Resident([torch.zeros(64, 4)]),
        Resident([(torch.zeros(64, 4), {"y": 1})]),
        Resident([(torch.zeros(64, 4), torch.zeros(64, 8, 8, dtype=torch.int64))]),  # of pixels
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*Shuffle them", CalibrationWarning)
        for loader in loaders:
            images = sum(map(n_samples, loader))
            assert len(calibration(WithStep(), loader, images)) in (1, 4)


def test_fewer_images_than_asked_for(model: LitMlp, caplog: pytest.LogCaptureFixture) -> None:
    loader = labelled(torch.arange(64) % 10)
    with pytest.warns(CalibrationWarning, match=r"has 64 samples, and calibration_images=1000: "):
        calibration(model, loader, 1000)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error", CalibrationWarning)
        calibration(model, loader, 65)  # as drop_last would leave
        assert "64 samples" not in caplog.text
        calibration(model, loader, CALIBRATION_IMAGES)
        assert "has 64 samples" in caplog.text


@pytest.mark.parametrize(
    ("n", "images", "used"), [(1, 512, 1), (40, 512, 40), (200, 32, 32), (63, 63, 63)]
)
def test_too_few_images_are_told_with_their_number(
    model: LitMlp, n: int, images: int, used: int
) -> None:
    with pytest.warns(CalibrationWarning, match=rf"over {used} training samples? \(calibration_im"):
        calibration(model, labelled(torch.arange(n) % 10), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        assert calibration(model, labelled(torch.arange(64) % 10), 64)
        model.net = nn.Linear(64, 10)  # without statistics
        assert calibration(model, labelled(torch.arange(n) % 10), images) == []
