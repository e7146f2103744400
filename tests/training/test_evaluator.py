# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import csv
import random
import signal
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_subnet import Latency, SearchSpace, SubnetMixin, SubnetSearch, recalibrate
from lightning_subnet._torch.fingerprints import data_fingerprint
from lightning_subnet.errors import MeasurementError, SearchError, StudyMismatchError
from lightning_subnet.strategies import RandomSearch
from lightning_subnet.supernets import ElasticMobileNetV3
from lightning_subnet.training.evaluator import TrainerEvaluator
from lightning_subnet.training.frozen_data import Resident, Source
from tests.networks import WIDTHS, Digits, LitMlp, digits, quiet_trainer
from tests.problems import numpy_state

TRAIN = DataLoader(digits(), 100)


def search(**settings: Any) -> SubnetSearch:
    default = {"objectives": {"val_acc": "max", "macs": "min"}, "budget": 6, "storage": None}
    default |= {"strategy": RandomSearch(batch_size=4), "trainer": quiet_trainer()}
    return SubnetSearch(**{**default, **settings})


@pytest.fixture
def model() -> LitMlp:
    L.seed_everything(0, verbose=False)
    return LitMlp()


def test_fit_measures_the_largest_first_and_every_subnet_once(model: LitMlp) -> None:
    result = search(budget=12).fit(model, Digits(), progress=False)
    assert len(result.history) == 12 == len({e.subnet for e in result.history})
    assert result.history[0].subnet == model.net.search_space().largest
    assert {e.status for e in result.history} == {"ok"}
    assert set(result.history[0].values) == {"val_acc", "val_loss", "macs"}
    # 64 inputs and 10 outputs per hidden unit
    assert all(e.values["macs"] == 74 * e.subnet["width"] for e in result.history)


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


def test_values_are_those_of_a_plain_loop(model: LitMlp) -> None:
    data = Digits()
    with TrainerEvaluator(model, Source(data), trainer=quiet_trainer()) as evaluator:
        for subnet in evaluator.space.sample(3, rng=1):
            told = evaluator.evaluate(subnet)
            model.net.activate(subnet)
            model.eval()
            with torch.no_grad():
                x, y = (
                    torch.stack(t) if t[0].ndim else torch.tensor(t)
                    for t in zip(*data.val, strict=True)
                )
                right = (model(x).argmax(1) == y).float().mean().item()
            assert told["val_acc"] == pytest.approx(right, abs=1e-6)


def test_nothing_is_left_changed(model: LitMlp, tmp_path: Path) -> None:
    class Counter(L.Callback):
        calls = 0

        def on_validation_start(self, *_: Any) -> None:
            self.calls += 1

    callback, logger = Counter(), CSVLogger(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data, other = Digits(), quiet_trainer()
    model.train()
    model.net.norm.eval()
    model.net.first.weight.requires_grad_(False)
    model.trainer, data.trainer = other, other
    chosen = model.net.search_space().subnet(width=8, sharpen=2)
    model.net.activate(chosen)
    callbacks, loggers = trainer.callbacks, trainer.loggers
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    flags = {k: m.training for k, m in model.named_modules()}
    handler = signal.getsignal(signal.SIGINT)
    states = (random.getstate(), numpy_state(), torch.get_rng_state())

    result = search(trainer=trainer).fit(model, data, progress=False)

    assert {k: m.training for k, m in model.named_modules()} == flags
    assert not model.net.first.weight.requires_grad
    assert model.net.last.weight.requires_grad
    assert model.trainer is other
    assert data.trainer is other
    assert model.net.active_subnet == chosen
    assert model.net.width == 8
    assert trainer.callbacks is callbacks
    assert trainer.loggers == loggers
    assert callback.calls == 0
    (log,) = tmp_path.rglob("*.csv")  # one row per evaluation, and nothing of the validations
    rows = list(csv.DictReader(log.open()))
    assert [row["step"] for row in rows] == [str(i) for i in range(6)]
    assert [float(row["search/val_acc"]) for row in rows] == [
        pytest.approx(e.values["val_acc"]) for e in result.history
    ]
    assert {row["search/failed"] for row in rows} == {"0.0"}
    assert not any(name.startswith("val_") for name in rows[0])
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert signal.getsignal(signal.SIGINT) is handler
    after = (random.getstate(), numpy_state(), torch.get_rng_state())
    assert after[:2] == states[:2]
    assert torch.equal(after[2], states[2])


def test_a_failing_subnet_is_recorded_and_the_search_goes_on(model: LitMlp) -> None:
    step = LitMlp.validation_step

    class Failing(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            if self.net.width == 16:
                raise RuntimeError("out of paper")
            step(self, batch, i, dataloader_idx)

    failing = Failing()
    result = search(budget=12).fit(failing, Digits(), progress=False)
    failed = [e for e in result.history if not e.ok]
    assert {e.subnet["width"] for e in failed} == {16}
    assert failed[0].reason == "RuntimeError: out of paper"
    assert all(e.subnet["width"] != 16 for e in result.front)
    assert failing.training
    assert failing._trainer is None


def test_nan_is_a_failure(model: LitMlp) -> None:
    class Broken(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            self.log("val_acc", torch.tensor(float("nan") if self.net.width == 4 else 0.5))

    result = search(budget=12).fit(Broken(), Digits(), progress=False)
    assert {e.reason for e in result.history if e.subnet["width"] == 4} == {"val_acc is nan"}
    assert sum(e.ok for e in result.history) == 9


def test_ctrl_c_arrives_as_keyboard_interrupt_and_keeps_what_was_measured(tmp_path: Path) -> None:
    class Interrupted(LitMlp):
        seen = 0

        def on_validation_epoch_end(self) -> None:
            self.seen += 1
            if self.seen == 3:
                raise KeyboardInterrupt

    model, handler = Interrupted(), signal.getsignal(signal.SIGINT)
    settings = {"storage": f"sqlite:///{tmp_path}/s.db", "name": "stopped"}
    with pytest.raises(KeyboardInterrupt):
        search(**settings).fit(
            model, dataloaders=DataLoader(digits(), 600), train_dataloaders=TRAIN, progress=False
        )
    assert signal.getsignal(signal.SIGINT) is handler
    assert model.training
    data = DataLoader(digits(), 600)
    result = search(**settings).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    assert len(result.history) == 6


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


def test_a_growing_budget_goes_on_and_equals_one_run(model: LitMlp, tmp_path: Path) -> None:
    data = DataLoader(digits(), 600)
    settings = {"storage": f"sqlite:///{tmp_path}/s.db", "name": "grows"}
    search(**settings).fit(model, dataloaders=data, train_dataloaders=TRAIN, progress=False)
    grown = search(**settings, budget=12).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    assert model.validations == 12
    straight = search(budget=12).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    assert [(e.subnet, e.values) for e in grown.history] == [
        (e.subnet, e.values) for e in straight.history
    ]


def test_other_weights_or_other_data_are_another_study(model: LitMlp, tmp_path: Path) -> None:
    data = DataLoader(digits(), 600)
    settings = {"storage": f"sqlite:///{tmp_path}/s.db", "name": "same"}
    search(**settings).fit(model, dataloaders=data, train_dataloaders=TRAIN, progress=False)
    with pytest.raises(StudyMismatchError, match=r"evaluator\.data"):
        search(**settings).fit(
            model, dataloaders=DataLoader(digits(), 300), train_dataloaders=TRAIN, progress=False
        )
    with torch.no_grad():
        model.net.last.bias += 1
    with pytest.raises(StudyMismatchError, match=r"evaluator\.weights"):
        search(**settings).fit(model, dataloaders=data, train_dataloaders=TRAIN, progress=False)


def test_values_of_older_code_are_not_reused(model: LitMlp, tmp_path: Path) -> None:
    class Other(LitMlp):
        def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
            self.log("val_acc", 1 - (self(batch[0]).argmax(1) == batch[1]).float().mean())

    data, url = DataLoader(digits(), 600), f"sqlite:///{tmp_path}/s.db"
    search(storage=url, name="a").fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    other = Other()
    other.load_state_dict(model.state_dict())
    with pytest.raises(StudyMismatchError, match=r"evaluator\.code"):
        search(storage=url, name="a").fit(
            other, dataloaders=data, train_dataloaders=TRAIN, progress=False
        )
    fresh = search(storage=url, name="b").fit(
        other, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    assert {e.reused for e in fresh.history} == {()}


def test_when_everything_fails_nothing_is_spent(tmp_path: Path) -> None:
    class Broken(LitMlp):
        mended = False

        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            if not self.mended:
                raise RuntimeError("a typo")
            super().validation_step(batch, i)

    model, data = Broken(), DataLoader(digits(), 600)
    settings = {"storage": f"sqlite:///{tmp_path}/s.db", "name": "broken"}
    with pytest.raises(SearchError, match="first 5 evaluations all failed, the last with: Runtime"):
        search(**settings).fit(model, dataloaders=data, train_dataloaders=TRAIN, progress=False)
    model.mended = True
    result = search(**settings).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    assert [e.status for e in result.history] == ["ok"] * 6


def test_constraints_that_nothing_satisfies_are_refused_at_once(model: LitMlp) -> None:
    with pytest.raises(SearchError, match=r"None of the 12 subnets satisfies macs <= 10"):
        search(constraints={"macs": "<= 10"}).fit(model, Digits(), progress=False)
    assert model.validations == 0


def test_another_study_reuses_what_was_measured(model: LitMlp, tmp_path: Path) -> None:
    data, url = DataLoader(digits(), 600), f"sqlite:///{tmp_path}/s.db"
    first = search(storage=url, name="a", budget=12).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    before = model.validations
    second = search(storage=url, name="b", seed=1).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    assert model.validations == before
    assert {e.reused for e in second.history} == {("val_acc",)}
    assert len(second.history) == 6
    for e in second.history:
        known = first.history.get(e.subnet)
        assert known is not None
        assert e.values["val_acc"] == known.values["val_acc"]


def test_other_hardware_reuses_every_accuracy(model: LitMlp, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"

    def settings(batch_size: int) -> dict[str, Any]:
        quick = Latency(batch_size=batch_size, seconds=0.05, repeats=15)
        objectives = {"val_acc": "max", "latency_ms": "min"}
        return {"storage": url, "measures": [quick], "objectives": objectives}

    first = search(**settings(1), name="bs1").fit(model, Digits(), progress=False)
    validations = model.validations
    second = search(**settings(32), name="bs32").fit(model, Digits(), progress=False)
    assert model.validations == validations
    assert [e.subnet for e in second.history] == [e.subnet for e in first.history]
    for one, two in zip(first.history, second.history, strict=True):
        assert two.reused == ("val_acc",)
        assert one.values["val_acc"] == two.values["val_acc"]
        assert one.values["latency_ms"] != two.values["latency_ms"]
        assert one.errors["latency_ms"] > 0
    assert second.verified
    # the study goes on in another process, on the same scale
    more = search(**settings(32), name="bs32", budget=8).fit(model, Digits(), progress=False)
    assert more.history[0] == second.history[0]


def test_a_part_of_the_space_can_be_searched_and_resumed(model: LitMlp, tmp_path: Path) -> None:
    whole, data = model.net.search_space(), DataLoader(digits(), 600)
    pool = whole.restricted_to([s for s in whole if s["sharpen"] == 2])
    settings = {"storage": f"sqlite:///{tmp_path}/s.db", "name": "part", "space": pool}
    first = search(**settings, budget=3).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    assert {e.subnet["sharpen"] for e in first.history} == {2}
    again = search(**settings)
    assert len(again.history) == 3
    assert len(
        again.fit(model, dataloaders=data, train_dataloaders=TRAIN, progress=False).history
    ) == len(WIDTHS)
    with pytest.raises(SearchError, match="does not fit the model's own space"):
        search(space=SearchSpace(depth=[1, 2])).fit(
            model, dataloaders=data, train_dataloaders=TRAIN, progress=False
        )


def test_relative_constraints_refer_to_the_largest_as_measured(model: LitMlp) -> None:
    result = search(budget=12, constraints={"macs": "<= 50%", "val_acc": ">= 20%"}).fit(
        model, Digits(), progress=False
    )
    floor = 0.2 * result.history[0].values["val_acc"]
    assert all(e.subnet["width"] <= 16 and e.values["val_acc"] >= floor for e in result.front)
    assert len(result.front) >= 1


def test_profile_needs_no_validation(model: LitMlp) -> None:
    profile = search(constraints={"macs": "<= 100"}).profile(model, Digits())
    assert model.validations == 0
    assert not profile.satisfiable
    assert profile.nearest["width"] == min(WIDTHS)
    assert profile.ranges["macs"].largest == 74 * 32
    assert "No feasible subnet was found" in str(profile)


class Meddling(LitMlp):
    """Does in its hooks what a user may do, and a search must not be disturbed by."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("counted", torch.zeros(1))

    def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
        batch[0].mul_(0.5)
        self.seen = self.seen + 1  # rebound
        self.counted = torch.cat([self.counted, self.counted[:1]])  # resized
        self.net.norm.running_mean.add_(1)
        self.logger.log_metrics({"x": 1.0})
        x = batch[0] / self.hparams.temperature + 0.01 * self.seen
        super().validation_step((x, batch[1]), i)


def test_a_score_depends_on_the_subnet_alone_whatever_hooks_do(tmp_path: Path) -> None:
    model, trainer = Meddling(), quiet_trainer(logger=CSVLogger(tmp_path))
    objects = dict(model.named_buffers())
    values = {name: buffer.clone() for name, buffer in objects.items()}
    source = Source(Digits(), calibration_images=0)  # its step halves the images, its forward not
    with TrainerEvaluator(model, source, trainer=trainer) as evaluator:
        told = [evaluator.evaluate(evaluator.space.largest) for _ in range(3)]
    assert told[0] == told[1] == told[2]
    for name, buffer in model.named_buffers():
        assert buffer is objects[name]
        assert torch.equal(buffer, values[name])
    assert model._trainer is None
    run = search(trainer=trainer, calibration_images=0)
    assert len(run.fit(model, Digits(), progress=False).front)
    with pytest.raises(MeasurementError, match="gives the network another input than the first"):
        search(trainer=trainer).fit(model, Digits(), progress=False)


def test_other_hyperparameters_are_other_values(tmp_path: Path) -> None:
    data, url = DataLoader(digits(), 600), f"sqlite:///{tmp_path}/s.db"
    settings = {"storage": url, "trainer": quiet_trainer(logger=CSVLogger(tmp_path))}
    settings |= {"calibration_images": 0}
    one, other = Meddling(), Meddling(temperature=5.0)
    other.load_state_dict(one.state_dict())
    search(**settings, name="a").fit(one, dataloaders=data, train_dataloaders=TRAIN, progress=False)
    fresh = search(**settings, name="b").fit(
        other, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    assert {e.reused for e in fresh.history} == {()}


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_weights_come_back_from_another_precision(model: LitMlp, precision: str) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = quiet_trainer(precision=precision)
    result = search(trainer=trainer).fit(model, Digits(), progress=False)
    assert all(e.ok for e in result.history)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])


def test_layers_that_setup_adds_do_not_lose_the_result() -> None:
    class Late(LitMlp):
        def setup(self, stage: str) -> None:
            self.extra = nn.Linear(2, 2)

    assert len(search().fit(Late(), Digits(), progress=False).history) == 6


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


def test_batches_of_numpy_arrays_are_told_apart() -> None:
    rows = np.arange(4000.0).reshape(40, 100)
    changed = rows.copy()
    changed[15] += 1
    assert data_fingerprint([Resident([rows])]) != data_fingerprint([Resident([changed])])


# BatchNorm


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


def test_batches_of_another_form_are_calibrated_by_the_model(model: LitMlp) -> None:
    class Mapped(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            super().validation_step((batch["x"], batch["y"]), i)

    class Calibrated(Mapped):
        seen = 0

        def calibration_step(self, batch: Any) -> None:
            self.seen += len(batch["x"])
            self(batch["x"])

    rows = [{"x": x, "y": y} for x, y in digits()]
    loaders = {"dataloaders": DataLoader(rows, 600), "train_dataloaders": DataLoader(rows, 300)}
    run = search(objectives={"val_acc": "max"}, budget=2)
    with pytest.raises(SearchError, match=r"a method calibration_step\(batch\)"):
        run.fit(Mapped(), **loaders, progress=False)
    calibrated = Calibrated()
    assert len(run.fit(calibrated, **loaders, progress=False).history) == 2
    assert calibrated.seen == 2 * 600  # batches of a form of their own stay whole


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


def test_a_datamodule_without_training_data_where_batchnorm_needs_it(model: LitMlp) -> None:
    class ValOnly(L.LightningDataModule):
        def val_dataloader(self) -> DataLoader:
            return DataLoader(digits(), 600)

    with pytest.raises(SearchError, match=r"BatchNorm.*ValOnly has no train_dataloader"):
        search().fit(model, ValOnly(), progress=False)
    assert len(search(calibration_images=0).fit(model, ValOnly(), progress=False).history) == 6


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


def test_transfer_hooks_of_the_datamodule_prepare_training_batches_too(model: LitMlp) -> None:
    class Normalising(Digits):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            return 3 * x + 1, y

    result = search().fit(model, Normalising(), progress=False)
    net = result.extract(result.best("val_acc"))
    assert net.norm.running_mean.mean() > 1.5  # of 3 x + 1
    assert net.parity == 0


def test_a_failure_leaves_nothing_behind_for_the_next_subnet() -> None:
    class Gathering(LitMlp):
        """Gathers by itself, as users do, and empties when an epoch ends well."""

        def __init__(self) -> None:
            super().__init__()
            self.right: list[torch.Tensor] = []

        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            right = self(batch[0]).argmax(1) == batch[1]
            self.right.append(right)
            self.accuracy.update(self(batch[0]), batch[1])
            if self.net.width == 8 and i == 2:
                msg = "no"
                raise ValueError(msg)

        def on_validation_epoch_end(self) -> None:
            self.log("val_acc", torch.cat(self.right).float().mean())
            self.log("val_metric", self.accuracy.compute())
            self.right.clear()
            self.accuracy.reset()

    model = Gathering()
    result = search(budget=12, objectives={"val_acc": "max"}).fit(model, Digits(), progress=False)
    assert 0 < sum(not e.ok for e in result.history) < 12
    for e in result.history:
        if e.ok:
            assert e.values["val_acc"] == pytest.approx(e.values["val_metric"], abs=1e-6)


def test_metrics_as_checkpoints_see_them(model: LitMlp) -> None:
    class Logging(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
            self.log("silent", right, logger=False)
            self.log("both", right, on_step=True, on_epoch=True)

    objectives = {"silent": "max", "both": "max"}
    result = search(objectives=objectives).fit(Logging(), Digits(), progress=False)
    assert all(e.values["silent"] == e.values["both"] for e in result.history)


def test_costs_are_those_of_the_precision_that_validates(model: LitMlp) -> None:
    sizes = {}
    for precision in ("32-true", "bf16-true"):
        run = search(
            trainer=quiet_trainer(precision=precision),
            objectives={"val_acc": "max", "size_mb": "min"},
        )
        column = run.fit(model, Digits(), progress=False).history.column("size_mb")
        assert len(set(column)) == 1
        sizes[precision] = column[0]
    assert sizes["bf16-true"] < 0.6 * sizes["32-true"]


def test_fast_dev_run_evaluates_a_few_subnets_and_keeps_nothing(
    model: LitMlp, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    trainer = quiet_trainer(fast_dev_run=True)
    result = search(trainer=trainer, storage=url).fit(model, Digits(), progress=False)
    assert len(result.history) == 3
    assert list(tmp_path.iterdir()) == []


def test_extraction_of_what_fit_found(model: LitMlp) -> None:
    result = search().fit(model, Digits(), progress=False)
    frozen = result.extract(result.best("val_acc"))
    assert not frozen.sliced  # ElasticMlp has no extract() of its own
    assert frozen.width == result.best("val_acc").subnet["width"]
    assert frozen is not model.net
    with pytest.raises(SearchError, match="does not know the network"):
        type(result)(result.problem, result.history).extract(result.best("val_acc"))


def test_verify_reports_the_drop_on_other_data(model: LitMlp) -> None:
    class Split(Digits):
        def setup(self, stage: str) -> None:
            self.calls.append(f"setup {stage}")
            rows = digits()
            self.train, self.val, self.test = (
                Subset(rows, range(a, b)) for a, b in ((0, 300), (300, 500), (500, 1797))
            )

        def test_dataloader(self) -> DataLoader:
            return DataLoader(self.test, batch_size=300)

    result = search(budget=12).fit(model, Split(), progress=False)
    same = result.verify(model, Split(), trainer=quiet_trainer())
    assert list(same.index) == [e.number for e in result.front]
    assert (same["val_acc_drop"] == 0).all()
    data = Split()
    held_out = result.verify(model, data, split="test", trainer=quiet_trainer())
    assert data.calls == ["prepare_data", "setup fit", "setup test", "teardown fit"]
    assert (held_out["val_acc_drop"] != 0).any()
    np.testing.assert_allclose(
        held_out["val_acc"] - held_out["val_acc_verified"], held_out["val_acc_drop"]
    )
    best = result.front[0]
    frozen = result.extract(best)
    x, y = (torch.stack(items) for items in zip(*data.test, strict=True))
    right = (frozen(x).argmax(1) == y).float().mean().item()
    assert held_out.loc[best.number, "val_acc_verified"] == pytest.approx(right, abs=1e-6)
    with pytest.raises(SearchError, match="Digits has no test_dataloader"):
        result.verify(model, Digits(), split="test")


# Bad input: one clear error, and nothing measured


def test_compiled_modules_are_refused(model: LitMlp) -> None:
    model.net = torch.compile(model.net)
    with pytest.raises(SearchError, match=r"'net' is compiled, and would be compiled anew"):
        search().fit(model, Digits(), progress=False)
    fresh = LitMlp()
    fresh.net.compile()
    with pytest.raises(SearchError, match="'net' is compiled"):
        search().fit(fresh, Digits(), progress=False)
    with pytest.raises(SearchError, match="compiled"):
        search().fit(torch.compile(LitMlp()), Digits(), progress=False)


def test_an_objective_that_is_never_logged(model: LitMlp) -> None:
    with pytest.raises(MeasurementError, match=r"no 'val_ac'\. Did you mean 'val_acc'") as told:
        search(objectives={"val_ac": "max"}).fit(model, Digits(), progress=False)
    assert "val_loss" in str(told.value)
    assert model._trainer is None


def test_a_validation_step_that_logs_nothing() -> None:
    class Silent(LitMlp):
        def validation_step(self, batch: Any, _: int) -> None:
            self(batch[0])

    with pytest.raises(MeasurementError, match="logged nothing"):
        search().fit(Silent(), Digits(), progress=False)


def test_models_that_cannot_be_searched() -> None:
    class NoStep(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = LitMlp().net

    class Plain(L.LightningModule):
        def validation_step(self, *_: Any) -> None: ...

    class Two(LitMlp):
        def __init__(self) -> None:
            super().__init__()
            self.other = LitMlp().net

    class Foreign(pytorch_lightning.LightningModule):
        def validation_step(self, *_: Any) -> None: ...

    class NoSpace(SubnetMixin, LitMlp):
        def search_space(self) -> Any:
            return {"width": [1, 2]}

        def activate(self, subnet: Any) -> None: ...

    for bad, message in [
        (NoStep(), "has no validation_step"),
        (Plain(), "has no elastic part"),
        (Two(), r"2 elastic parts \(net, other\)"),
        (Foreign(), "import it from `lightning` throughout"),
        (nn.Linear(1, 1), "not a LightningModule"),
        (NoSpace(), "Return a SearchSpace"),
    ]:
        with pytest.raises(SearchError, match=message) as told:
            search().fit(bad, Digits(), progress=False)
        assert len(str(told.value).splitlines()) <= 3


def test_data_and_trainers_that_do_not_fit(model: LitMlp) -> None:
    class Empty(Digits):
        def val_dataloader(self) -> Any:
            return DataLoader([])

    loader = DataLoader(digits(), 600)
    with pytest.raises(SearchError, match="has no val_dataloader"):
        search().fit(model, progress=False)
    with pytest.raises(SearchError, match="both datamodule= and dataloaders="):
        search().fit(model, Digits(), dataloaders=loader, train_dataloaders=TRAIN, progress=False)
    with pytest.raises(SearchError, match="not a LightningDataModule"):
        search().fit(model, loader, progress=False)
    with pytest.raises(SearchError, match="gave no batches"):
        search().fit(model, Empty(), progress=False)
    with pytest.raises(SearchError, match=r"not a lightning\.pytorch\.Trainer"):
        search(trainer="cpu").fit(model, Digits(), progress=False)
    spawned = quiet_trainer(devices=2, strategy="ddp_spawn")
    with pytest.raises(SearchError, match=r"strategy 'spawn'.*Pass Trainer\(strategy='ddp'\)"):
        search(trainer=spawned).fit(model, Digits(), progress=False)
    bare = L.Trainer(barebones=True, accelerator="cpu")
    with pytest.raises(SearchError, match="barebones=True, which turns off all logging"):
        search(trainer=bare).fit(model, Digits(), progress=False)


def test_a_mapping_as_batch_needs_an_example_input(model: LitMlp) -> None:
    class Mapped(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            super().validation_step((batch["x"], batch["y"]), i)

    rows = [{"x": x, "y": y} for x, y in digits()]
    without = search(calibration_images=0)
    with pytest.raises(SearchError, match="Set example_input_array"):
        without.fit(Mapped(), dataloaders=DataLoader(rows, 600), progress=False)
    mapped = Mapped()
    mapped.example_input_array = torch.zeros(1, 64)
    assert len(without.fit(mapped, dataloaders=DataLoader(rows, 600), progress=False).front)


def test_the_space_may_be_passed_by_the_model_only() -> None:
    with pytest.raises(SearchError, match="This search has no space"):
        search().ask()
    assert search().space is None
    with pytest.raises(SearchError, match="This search has no space"):
        search().profile()
    assert isinstance(search(space=SearchSpace(a=[1, 2])).space, SearchSpace)
