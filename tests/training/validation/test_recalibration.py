# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_subnet import recalibrate
from lightning_subnet.errors import MeasurementError
from lightning_subnet.supernets import ElasticMobileNetV3
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import Source
from tests.networks import Digits, LitMlp, quiet_trainer, search


class LitConv(LitMlp):
    """Its BatchNorm stands behind elastic channels, so its statistics depend on the subnet."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ElasticMobileNetV3.tiny(n_classes=10, dropout=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.view(-1, 1, 8, 8) - 0.5)


def test_statistics_are_recalibrated_on_the_same_training_samples_for_each_subnet() -> None:
    L.seed_everything(0, verbose=False)
    model, data = LitConv(), Digits()
    subnets = model.net.search_space().sample(3, rng=0)
    with TrainerEvaluator(
        model, Source(data, calibration_images=120), trainer=quiet_trainer()
    ) as evaluator:
        told = [evaluator.evaluate(subnet) for subnet in subnets]
        again = [evaluator.evaluate(subnet) for subnet in reversed(subnets)][::-1]
        calibration = [x for x, _ in evaluator._data.calibration]
        calibration[-1] = calibration[-1][:20]  # 50 + 50 + 20
        batches = [batch for loader in evaluator._data.loaders for batch in loader]
        extracted = evaluator.extractor()
    assert told == again
    assert sum(len(x) for x in calibration) == 120
    train = {tuple(x.tolist()) for x, _ in data.train}
    assert {tuple(x.tolist()) for batch in calibration for x in batch} <= train
    for subnet, metrics in zip(subnets, told, strict=True):  # by hand, outside of Lightning
        net = copy.deepcopy(model.net)
        net.activate(subnet)
        recalibrate(net, [x.view(-1, 1, 8, 8) - 0.5 for x in calibration])
        net.eval()
        plain = extracted(subnet)
        right, seen = 0, 0
        with torch.no_grad():
            for x, y in batches:
                logits = net(x.view(-1, 1, 8, 8) - 0.5)
                torch.testing.assert_close(plain(x.view(-1, 1, 8, 8) - 0.5), logits)
                right, seen = right + (logits.argmax(1) == y).sum().item(), seen + len(y)
        assert metrics["val_acc"] == pytest.approx(right / seen, abs=1e-6)
        assert plain.sliced


def test_without_recalibration_statistics_are_those_of_the_super_network() -> None:
    L.seed_everything(0, verbose=False)
    model = LitConv()
    outcomes = []
    for images in (0, 200):
        run = search(calibration_images=images, budget=3, objectives={"val_loss": "min"})
        outcomes.append(run.fit(model, Digits(), progress=False).history.column("val_loss"))
    assert (outcomes[0] != outcomes[1]).all()


def test_a_network_that_does_not_take_a_training_batch_is_told_before_anything_is_spent(
    tmp_path: Path,
) -> None:
    class Reshaping(LitConv):
        """Its validation_step reshapes, its forward does not."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            super().validation_step((batch[0].view(-1, 1, 8, 8), batch[1]), i)

    run = search(storage=f"sqlite:///{tmp_path}/s.db", name="a", objectives={"val_acc": "max"})
    with pytest.raises(MeasurementError, match=r"to recalibrate BatchNorm: .*calibration_step"):
        run.fit(Reshaping(), Digits(), progress=False)
    assert not run.fit(LitConv(), Digits(), progress=False).history[0].reused


def test_transfer_hooks_of_the_datamodule_prepare_training_batches_too(model: LitMlp) -> None:
    class Normalising(Digits):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            return 3 * x + 1, y

    result = search().fit(model, Normalising(), progress=False)
    net = result.extract(result.best("val_acc"))
    assert net.norm.running_mean.mean() > 1.5  # of 3 x + 1
    assert net.parity == 0
