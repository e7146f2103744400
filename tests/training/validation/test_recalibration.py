# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import recalibrate
from lightning_subnet.elasticity.batchnorm import batch_norms
from lightning_subnet.errors import CalibrationWarning, MeasurementError
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
        calibration = [x for x, _ in evaluator._data.calibration]  # 50 + 50: whole batches
        batches = [batch for loader in evaluator._data.loaders for batch in loader]
        extracted = evaluator.extractor()
    assert told == again
    assert sum(len(x) for x in calibration) == 100
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


def freeze_by_flag(layer: nn.Module) -> None:
    BaseFinetuning.freeze(layer, train_bn=False)


def freeze_by_mode(layer: nn.Module) -> None:
    layer.eval()


def freeze_by_both(layer: nn.Module) -> None:
    freeze_by_flag(layer)
    freeze_by_mode(layer)


@pytest.mark.parametrize("freeze", [freeze_by_flag, freeze_by_mode, freeze_by_both])
def test_frozen_layers_score_as_a_plain_validation_does(
    freeze: Callable[[nn.Module], None],
) -> None:
    """All layers but one are frozen, with statistics of other data, as after pre-training."""
    L.seed_everything(0, verbose=False)
    model, data = LitConv(), Digits()
    data.setup("fit")
    data.setup = lambda stage: None  # the same split for all
    space = model.net.search_space()
    layers = [layer for layer in batch_norms(model) if layer is not model.net.stem[1]]
    with torch.no_grad():
        for layer in batch_norms(model):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    for layer in layers:
        freeze(layer)
    flags = {name: module.training for name, module in model.named_modules()}
    clear = freeze is not freeze_by_mode
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CalibrationWarning)
        with TrainerEvaluator(
            model, Source(data, calibration_images=200), trainer=quiet_trainer()
        ) as evaluator:
            subnets = [space.smallest, space.largest, *space.sample(1, rng=0)]
            told = [evaluator.evaluate(subnet)["val_loss"] for subnet in subnets]
            calibration = [x for x, _ in evaluator._data.calibration]
            extracted = [evaluator.extractor()(subnet) for subnet in subnets]
    causes = [w for w in caught if issubclass(w.category, CalibrationWarning)]
    assert len(causes) == (0 if clear else 1)
    assert {name: module.training for name, module in model.named_modules()} == flags
    means, variances = [], []
    for x in calibration:
        stem = model.net.stem[0](x.view(-1, 1, 8, 8) - 0.5).detach()
        means.append(stem.mean((0, 2, 3)))
        variances.append(stem.var((0, 2, 3)))
    model.net.stem[1].running_mean.copy_(torch.stack(means).mean(0))
    model.net.stem[1].running_var.copy_(torch.stack(variances).mean(0))
    for subnet, loss, plain in zip(subnets, told, extracted, strict=True):
        model.net.activate(subnet)
        row = quiet_trainer().validate(model, data, verbose=False)[0]
        assert loss == pytest.approx(row["val_loss"], rel=1e-4)
        assert plain.parity < 1e-4


class Images(L.LightningDataModule):
    """Random images of two sizes: those of the training and those of the validation."""

    def __init__(self, train: tuple[int, ...], val: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = {"train": train, "val": val}

    def loader(self, split: str) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, *self.shapes[split], generator=generator)
        y = torch.arange(64) % 10
        return DataLoader(TensorDataset(x, y), 16)

    def train_dataloader(self) -> DataLoader:
        return self.loader("train")

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")


class LitImages(LitConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_training_inputs_of_another_shape_are_told_with_both_shapes() -> None:
    run = search(objectives={"val_acc": "max"}, budget=2)
    with pytest.raises(MeasurementError, match=r"\(n, 3, 8, 8\), validation inputs \(n, 1, 8, 8\)"):
        run.fit(LitImages(), Images((3, 8, 8), (1, 8, 8)), progress=False)
    with pytest.raises(MeasurementError, match=r"\(n, 64\), validation inputs \(n, 1, 8, 8\)"):
        run.fit(LitConv(), Images((64,), (1, 8, 8)), progress=False)
    with pytest.warns(CalibrationWarning, match=r"\(n, 1, 16, 16\), validation .*\(n, 1, 8, 8\)"):
        run.fit(LitImages(), Images((1, 16, 16), (1, 8, 8)), progress=False)


def test_a_batch_of_one_sample_is_told_as_such() -> None:
    data = Images((64,), (64,))
    data.train_dataloader = lambda: DataLoader(data.loader("train").dataset, 1)
    with pytest.raises(MeasurementError, match="two samples or more") as caught:
        search().fit(LitMlp(), data, progress=False)
    assert "calibration_step" not in str(caught.value)


def test_an_extraction_whose_statistics_stay_is_an_error_where_those_of_the_network_move() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.running_mean.mul_(0.9).add_(0.1 * x.mean(0).detach())
            return x - self.running_mean

    model = LitMlp()
    model.net.norm = Own()
    run = search(budget=2)
    assert len(run.fit(model, Digits(), progress=False).history) == 2
    extracted = run.replace(score="extracted")
    with pytest.raises(MeasurementError, match=r"stay as they are .*: 'norm\.running_mean'"):
        extracted.fit(model, Digits(), progress=False)
    model.net.norm = nn.BatchNorm1d(64)
    assert len(extracted.fit(model, Digits(), progress=False).history) == 2


def test_batches_without_running_statistics_are_counted_and_scored() -> None:
    model = LitMlp()
    model.net.norm = nn.BatchNorm1d(64, track_running_stats=False)
    history = search(budget=2).fit(model, Digits(), progress=False).history
    assert history.ok.all()
    assert history[0].values["macs"] == 74 * 32
