# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
import sqlite3
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Subset

from lightning_subnet import Latency, SearchSpace
from lightning_subnet.costs.resolve import MEASURES
from lightning_subnet.errors import (
    MeasurementError,
    PluginWarning,
    SearchError,
    StudyMismatchError,
    VersionWarning,
)
from lightning_subnet.training import Checks
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import Source
from tests.networks import WIDTHS, Digits, LitMlp, digits, quiet_trainer, search
from tests.plugins import installed, write_package

TRAIN = DataLoader(digits(), 100)


def test_fit_measures_the_largest_first_and_every_subnet_once(model: LitMlp) -> None:
    result = search(budget=12).fit(model, Digits(), progress=False)
    assert len(result.history) == 12 == len({e.subnet for e in result.history})
    assert result.history[0].subnet == model.net.search_space().largest
    assert {e.status for e in result.history} == {"ok"}
    assert set(result.history[0].values) == {"val_acc", "val_loss", "macs"}
    # 64 inputs and 10 outputs per hidden unit
    assert all(e.values["macs"] == 74 * e.subnet["width"] for e in result.history)


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
        def on_validation_epoch_end(self) -> None:
            if self.validated.n == 5:  # of the third subnet; the first was scored thrice
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


def test_a_growing_budget_goes_on_and_equals_one_run(model: LitMlp, tmp_path: Path) -> None:
    data = DataLoader(digits(), 600)
    settings = {"storage": f"sqlite:///{tmp_path}/s.db", "name": "grows"}
    search(**settings).fit(model, dataloaders=data, train_dataloaders=TRAIN, progress=False)
    grown = search(**settings, budget=12).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    # The first subnet of all is scored twice, with another score in between.
    assert model.validated.n == 12 + 2
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


def lit(change: Any = None) -> LitMlp:
    """Return a model with the same weights as every time, and something else changed."""
    L.seed_everything(0, verbose=False)
    model = LitMlp()
    if change is not None:
        change(model)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.net.norm, "eps", 0.5),
        lambda model: setattr(model, "forward", lambda x: 2 * model.net(x)),
        lambda model: setattr(model.net, "activate", lambda s: setattr(model.net, "width", 4)),
    ],
)
@pytest.mark.parametrize("budget", [4, 6])
def test_stored_values_of_a_model_that_an_attribute_makes_another_are_refused(
    change: Any, budget: int, tmp_path: Path
) -> None:
    data = DataLoader(digits(), 600)
    settings = {"storage": f"sqlite:///{tmp_path}/s.db", "objectives": {"val_loss": "min"}}
    parts = {"dataloaders": data, "train_dataloaders": TRAIN, "progress": False}
    before = search(**settings, name="a", budget=4).fit(lit(), **parts)
    model = lit()
    again = search(**settings, name="a", budget=budget).fit(model, **parts)
    assert [e.values for e in again.history][:4] == [e.values for e in before.history]
    # The largest, the next one and the largest again; or the largest alone.
    assert model.validated.n == (1 if budget == 4 else 2 + 2)
    for name in ("a", "b"):  # which would take the values of the first
        with pytest.raises(StudyMismatchError, match=r"'val_loss' of .* is stored as .*, and is "):
            search(**settings, name=name, budget=budget).fit(lit(change), **parts)
    fresh = search(**{**settings, "storage": None}).fit(lit(change), **parts)
    assert fresh.history[0].values != before.history[0].values
    trusting = search(**settings, name="a", budget=4, checks=Checks(repeat=False))
    assert len(trusting.fit(lit(change), **parts).history) == budget


def test_other_hardware_is_told_where_values_differ(tmp_path: Path) -> None:
    data = DataLoader(digits(), 600)
    settings = {"storage": f"sqlite:///{tmp_path}/s.db", "objectives": {"val_loss": "min"}}
    settings |= {"name": "a", "budget": 2}
    parts = {"dataloaders": data, "train_dataloaders": TRAIN, "progress": False}
    first = search(**settings).fit(lit(), **parts).history[0].values["val_loss"]

    def store(value: float, hardware: str) -> None:
        with sqlite3.connect(tmp_path / "s.db") as connection:
            connection.execute(
                "UPDATE subnet_study SET versions = json_set(versions, '$.hardware', ?)",
                (hardware,),
            )
            connection.execute(
                "UPDATE subnet_evaluation SET record = json_set(record, '$.values.val_loss', ?) "
                "WHERE number = 0",
                (value,),
            )

    def run() -> None:
        search(**settings).fit(lit(), **parts)

    store(first * 1.0005, "an abacus")
    with warnings.catch_warnings():
        warnings.simplefilter("error", VersionWarning)
        run()
    store(first * 1.01, "an abacus")
    with pytest.warns(
        VersionWarning, match=r"It was measured on an abacus, and this is .* threads"
    ):
        run()


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
    assert model.validated.n == 0


def test_another_study_reuses_what_was_measured(model: LitMlp, tmp_path: Path) -> None:
    data, url = DataLoader(digits(), 600), f"sqlite:///{tmp_path}/s.db"
    first = search(storage=url, name="a", budget=12).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    before = model.validated.n
    second = search(storage=url, name="b", seed=1).fit(
        model, dataloaders=data, train_dataloaders=TRAIN, progress=False
    )
    assert model.validated.n == before
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
    validations = model.validated.n
    second = search(**settings(32), name="bs32").fit(model, Digits(), progress=False)
    assert model.validated.n == validations
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
    assert model.validated.n == 0
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
        history = run.fit(model, Digits(), progress=False).history
        column = history.column("size_mb")
        sizes[precision] = {e.subnet["width"]: x for e, x in zip(history, column, strict=True)}
    assert len({*sizes["32-true"].values()}) == len(sizes["32-true"]) > 1  # of slices
    for width in sizes["32-true"].keys() & sizes["bf16-true"].keys():
        assert sizes["bf16-true"][width] < 0.6 * sizes["32-true"][width]


def test_fast_dev_run_evaluates_a_few_subnets_and_keeps_nothing(
    model: LitMlp, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    trainer = quiet_trainer(fast_dev_run=True)
    result = search(trainer=trainer, storage=url).fit(model, Digits(), progress=False)
    assert len(result.history) == 3
    assert list(tmp_path.iterdir()) == []


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


def test_an_objective_that_is_never_logged(model: LitMlp) -> None:
    with pytest.raises(MeasurementError, match=r"no 'val_ac'\. Did you mean 'val_acc'") as told:
        search(objectives={"val_ac": "max"}).fit(model, Digits(), progress=False)
    assert "val_loss" in str(told.value)
    assert model._trainer is None


def test_lazy_layers_are_refused_also_those_with_statistics_alone() -> None:
    for lazy in (torch.nn.LazyLinear(10), torch.nn.LazyBatchNorm1d(affine=False)):
        model = LitMlp()
        model.net.last = torch.nn.Sequential(model.net.last, lazy)
        with pytest.raises(SearchError, match="LitMlp has lazy layers"):
            search().fit(model, datamodule=Digits())


def test_a_validation_step_that_logs_nothing() -> None:
    class Silent(LitMlp):
        def validation_step(self, batch: Any, _: int) -> None:
            self(batch[0])

    with pytest.raises(MeasurementError, match="logged nothing"):
        search().fit(Silent(), Digits(), progress=False)


def test_the_space_may_be_passed_by_the_model_only() -> None:
    with pytest.raises(SearchError, match="This search has no space"):
        search().ask()
    assert search().space is None
    with pytest.raises(SearchError, match="This search has no space"):
        search().profile()
    assert isinstance(search(space=SearchSpace(a=[1, 2])).space, SearchSpace)


def test_a_measure_of_another_package_under_a_logged_name_is_told(
    model: LitMlp, tmp_path: Path
) -> None:
    module = (
        "from lightning_subnet.costs import network_measure\n"
        "loss = network_measure('val_loss', exact=True)(lambda net, x: 123.0)\n"
    )
    points = "[lightning_subnet.measures]\nval_loss = demo_loss:loss\n"
    write_package(tmp_path, "demo_loss", {"demo_loss": module}, points)
    objectives = {"val_acc": "max", "val_loss": "min"}
    with (
        installed(MEASURES, tmp_path),
        pytest.warns(PluginWarning, match="'val_loss' is logged by LitMlp") as caught,
    ):
        result = search(objectives=objectives, budget=2).fit(model, Digits(), progress=False)
    assert len([w for w in caught if w.category is PluginWarning]) == 1
    assert {e.values["val_loss"] for e in result.history} == {123.0}


def test_a_metric_that_a_callback_logs_is_told_to_belong_into_the_module(model: LitMlp) -> None:
    class Logs(L.Callback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: LitMlp) -> None:
            pl_module.log("epoch_acc", 0.5)

    run = search(objectives={"epoch_acc": "max"}, trainer=quiet_trainer(callbacks=[Logs()]))
    with pytest.raises(
        MeasurementError, match=r"logs no 'epoch_acc' .*'Logs'\) do not run in a se"
    ):
        run.fit(model, Digits(), progress=False)
