# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_subnet import SubnetSampling, SubnetSearch, SubnetSearchCallback
from lightning_subnet.errors import SearchError
from lightning_subnet.strategies import RandomSearch
from tests.networks import Digits, LitMlp, digits, quiet_trainer


def search(**settings: Any) -> SubnetSearch:
    default = {"objectives": {"val_acc": "max", "macs": "min"}, "budget": 5, "storage": None}
    default |= {"strategy": RandomSearch(batch_size=4), "name": "after", "calibration_images": 100}
    return SubnetSearch(**{**default, **settings})


def train(callbacks: list[Any], model: LitMlp | None = None, **options: Any) -> tuple[Any, Any]:
    L.seed_everything(0, verbose=False)
    model = LitMlp() if model is None else model
    trainer = quiet_trainer(**{"max_epochs": 3, "callbacks": callbacks, **options})
    data = Digits()
    trainer.fit(model, data)
    return model, trainer


class Order(L.Callback):
    """Remembers when training ended for it, and what the weights were."""

    def __init__(self) -> None:
        self.ended: list[torch.Tensor] = []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ended.append(pl_module.net.last.weight.detach().clone())


def test_it_searches_at_the_end_and_disturbs_nothing(tmp_path: Path) -> None:
    def others() -> list[Any]:
        return [
            EarlyStopping("val_acc", mode="max", patience=10),
            ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_last=True),
            Order(),
        ]

    outcomes = []
    for name in ("with", "without"):
        callbacks = others()
        callback = SubnetSearchCallback(search(), progress=False)
        if name == "with":
            callbacks.insert(0, callback)
        logger = CSVLogger(tmp_path, name=name)
        data_calls = Digits()
        L.seed_everything(0, verbose=False)
        model = LitMlp()
        trainer = quiet_trainer(
            max_epochs=3, callbacks=callbacks, logger=logger, enable_checkpointing=True
        )
        trainer.fit(model, data_calls)
        rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
        checkpoint = torch.load(callbacks[-2].best_model_path, weights_only=True)
        outcomes.append(
            {
                "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
                "buffers": torch.cat([b.double().flatten() for b in model.buffers()]),
                "steps": trainer.global_step,
                "best": callbacks[-2].best_model_score,
                "checkpoint": checkpoint["state_dict"]["net.last.weight"],
                "rng": torch.get_rng_state(),
                "calls": [c for c in data_calls.calls if c != "val_dataloader"],
                "training": model.training,
                "epochs": [row["val_acc"] for row in rows if row["val_acc"]],
            }
        )
        if name == "with":
            evaluations = [row for row in rows if row["search/val_acc"]]
            assert [row["step"] for row in evaluations] == [str(i) for i in range(5)]
            assert callback.result is not None
            assert len(callback.result.history) == 5
            assert callback.result.name.startswith("after-")
            assert model.trainer is trainer
    one, other = outcomes
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def test_the_largest_scores_what_validation_has_logged() -> None:
    callback = SubnetSearchCallback(
        search(calibration_images=0, objectives={"val_acc": "max"}), progress=False
    )
    _, trainer = train([SubnetSampling(n_random=1), callback])
    assert callback.result is not None
    largest = callback.result.history[0]
    assert largest.values["val_acc"] == pytest.approx(trainer.callback_metrics["val_acc"].item())


def test_averaged_weights_are_searched() -> None:
    weights: list[torch.Tensor] = []

    class Seen(LitMlp):
        def on_validation_epoch_start(self) -> None:
            weights.append(self.net.last.weight.detach().clone())

    callback, model = SubnetSearchCallback(search(), progress=False), Seen()
    train([callback, WeightAveraging()], model)
    assert torch.equal(weights[-1], model.net.last.weight)
    assert callback.result is not None


def test_the_best_checkpoint_is_searched_and_the_last_weights_come_back(tmp_path: Path) -> None:
    weights: list[torch.Tensor] = []

    class Worsening(LitMlp):
        """Logs less with every epoch, so the first checkpoint is the best."""

        def on_validation_epoch_end(self) -> None:
            weights.append(self.net.last.weight.detach().clone())
            self.log("score", -float(self.current_epoch))

    writer = ModelCheckpoint(tmp_path, monitor="score", mode="max", save_top_k=1)
    callback = SubnetSearchCallback(search(), weights="best", progress=False)
    order, model = Order(), Worsening()
    train([order, callback, writer], model, enable_checkpointing=True)
    best = torch.load(writer.best_model_path, weights_only=True)["state_dict"]["net.last.weight"]
    assert torch.equal(weights[-1], best)
    assert torch.equal(model.net.last.weight, order.ended[0])
    assert not torch.equal(best, order.ended[0])


def test_dataloaders_of_fit_and_a_study_per_training(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    names = []
    for lr_epochs in (1, 2, 2):
        callback = SubnetSearchCallback(search(storage=url), progress=False)
        L.seed_everything(0, verbose=False)
        loader = DataLoader(digits(), 300)
        quiet_trainer(max_epochs=lr_epochs, callbacks=[callback]).fit(LitMlp(), loader, loader)
        assert callback.result is not None
        names.append(callback.result.name)
    assert names[0] != names[1] == names[2]  # the last one went on with the study of its weights


def test_a_training_that_is_resumed_at_its_end_goes_on_with_its_study(tmp_path: Path) -> None:
    url, last = f"sqlite:///{tmp_path}/s.db", tmp_path / "last.ckpt"
    first = SubnetSearchCallback(search(storage=url, budget=3), progress=False)
    writer = ModelCheckpoint(tmp_path, save_last=True)
    train([first, writer], enable_checkpointing=True)
    again = SubnetSearchCallback(search(storage=url, budget=5), progress=False)
    L.seed_everything(1, verbose=False)
    trainer = quiet_trainer(max_epochs=3, callbacks=[again])
    L.seed_everything(0, verbose=False)
    trainer.fit(LitMlp(), Digits(), ckpt_path=last, weights_only=False)
    assert first.result is not None
    assert again.result is not None
    assert again.result.name == first.result.name
    assert len(again.result.history) == 5


def test_steps_see_the_epoch_and_the_datamodule_of_the_training() -> None:
    class Asking(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            assert isinstance(self.trainer.datamodule, Digits)
            super().validation_step(batch, i)
            self.log("epoch", float(self.current_epoch))
            self.log("steps", float(self.global_step))

    callback = SubnetSearchCallback(search(), progress=False)
    _, trainer = train([callback], Asking())
    assert callback.result is not None
    assert {e.values["epoch"] for e in callback.result.history} == {float(trainer.current_epoch)}
    assert {e.values["steps"] for e in callback.result.history} == {float(trainer.global_step)}


def test_modules_that_leave_the_sanity_check_or_build_their_network_late() -> None:
    class Late(LitMlp):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.net = self.net, None

        def configure_model(self) -> None:
            if self.net is None:
                self.net, self.late = self.late, None

        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            if not self.trainer.sanity_checking:
                super().validation_step(batch, i)

    callback = SubnetSearchCallback(search(), progress=False)
    train([callback], Late())
    assert callback.result is not None


def test_fast_dev_run(tmp_path: Path) -> None:
    callback = SubnetSearchCallback(search(storage=f"sqlite:///{tmp_path}/s.db"), progress=False)
    train([callback], fast_dev_run=True)
    assert callback.result is not None
    assert len(callback.result.history) == 3
    assert list(tmp_path.iterdir()) == []


def test_mistakes_show_before_training() -> None:
    class Counting(LitMlp):
        steps = 0

        def training_step(self, batch: Any, i: int) -> torch.Tensor:
            self.steps += 1
            return super().training_step(batch, i)

    class Plain(L.LightningModule):
        def validation_step(self, *_: Any) -> None: ...

        def training_step(self, *_: Any) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(nn.Linear(1, 1).parameters())

    unlogged = SubnetSearchCallback(search(objectives={"val_ac": "max", "macs": "min"}))
    model = Counting()
    with pytest.raises(SearchError, match=r"wants 'val_ac'.*Did you mean 'val_acc'"):
        train([unlogged], model)
    assert model.steps == 0
    with pytest.raises(SearchError, match="needs a ModelCheckpoint that monitors"):
        train([SubnetSearchCallback(search(), weights="best")], model)
    with pytest.raises(SearchError, match="no elastic part"):
        train([SubnetSearchCallback(search())], Plain())
    loader = DataLoader(digits(), 300)
    with pytest.raises(SearchError, match="no validation data"):
        quiet_trainer(callbacks=[SubnetSearchCallback(search())]).fit(model, loader)
    assert model.steps == 0
    with pytest.raises(SearchError, match="'last' or 'best'"):
        SubnetSearchCallback(search(), weights="first")
    with pytest.raises(SearchError, match="resume='must' cannot hold"):
        SubnetSearchCallback(search(resume="must"))
    with pytest.raises(SearchError, match="is not a SubnetSearch"):
        SubnetSearchCallback("nsga2")
