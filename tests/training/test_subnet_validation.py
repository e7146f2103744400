# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_subnet import SearchSpace, SubnetSampling, SubnetValidation
from lightning_subnet.errors import InvalidSubnetError, SearchError
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import Source
from tests.networks import Digits, LitMlp, digits, quiet_trainer
from tests.problems import assert_clear

ROOT = Path(__file__).resolve().parents[2]


class InForce(LitMlp):
    """With its largest subnet in force: a new ElasticMlp is another network than that."""

    def __init__(self) -> None:
        super().__init__()
        self.net.activate(self.net.search_space().largest)


class Adam(InForce):
    """With an optimizer that has a state, and what a careless module gathers."""

    ran: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []

    def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, i)
        self.gathered.append(i)
        self.ran.append("step")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Drawing(Digits):
    """Whose hooks draw random numbers, as a random_split in them does."""

    def train_dataloader(self) -> DataLoader:
        torch.rand(1)
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader:
        np.random.rand()  # noqa: NPY002 - as users' code does
        return super().val_dataloader()


class Watched(L.Callback):
    """What a callback behind sees at the end of each validation, and the gradients then."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if "/" not in k}
        grads = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
        self.seen.append(
            [
                *(metrics, trainer.global_step, pl_module.accuracy.compute().item()),
                *(pl_module.training, pl_module.validations, list(pl_module.gathered)),
                *(torch.get_rng_state().tolist(), random.getstate()),
                np.random.get_state()[1].tolist(),  # noqa: NPY002 - the state that must not change
                [g.tolist() for g in grads],
                *(str(pl_module.net.active_subnet), trainer.state.stage, trainer.state.fn),
            ]
        )


def trained(folder: Path, callbacks: list[Any], **options: Any) -> dict[str, Any]:
    """Train under everything that could be disturbed; return all that must not be."""
    L.seed_everything(0, verbose=False)
    Adam.ran = []
    watched = Watched()
    writer = ModelCheckpoint(folder, monitor="val_acc", mode="max", save_top_k=2)
    stopping = EarlyStopping("val_acc", mode="max", patience=10)
    model, data = Adam(), Drawing()
    trainer = quiet_trainer(
        **{
            "max_epochs": 2,
            "callbacks": [*callbacks, watched, stopping, writer],
            "enable_checkpointing": True,
            "val_check_interval": 3,  # of 6 batches: in the middle of an accumulation
            "accumulate_grad_batches": 2,
            **options,
        }
    )
    trainer.fit(model, data)
    saved = torch.load(writer.best_model_path, weights_only=True)
    return {
        "seen": watched.seen,
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "optimizer": saved["optimizer_states"],
        "saved": saved["state_dict"],
        "best": (Path(writer.best_model_path).name, float(writer.best_model_score)),
        "kept": {Path(k).name: float(v) for k, v in writer.best_k_models.items()},
        "patience": (stopping.wait_count, float(stopping.best_score)),
        "step": (trainer.global_step, trainer.current_epoch),
        "rng": torch.get_rng_state(),
        "flags": [child.training for child in model.modules()],
        "calls": [call for call in data.calls if call != "val_dataloader"],
        "ran": len(Adam.ran),
        "own trainer": model.trainer is trainer,
        "metrics": {k: v.item() for k, v in trainer.callback_metrics.items() if "/" not in k},
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("sampled", [False, True])
def test_a_training_is_the_same_with_and_without_it(tmp_path: Path, sampled: bool) -> None:
    extra = [SubnetSampling(n_random=1)] if sampled else []
    outcomes = []
    for name in ("with", "without"):
        own = [SubnetValidation(calibration_images=100)] if name == "with" else []
        options = {"accumulate_grad_batches": 1} if sampled else {}
        outcomes.append(trained(tmp_path / name, [*own, *extra], **options))
    one, other = outcomes
    assert one.pop("ran") > 2 * other.pop("ran")  # it did validate
    for key, value in one.items():
        assert same(value, other[key]), key
    assert len(one["seen"]) >= 4


def evaluated(model: Any, data: Any, subnets: list[Any], images: int, **loaders: Any) -> list[Any]:
    """What the evaluator of a search says of these subnets and weights."""
    source = Source(data, calibration_images=images, **loaders)
    with TrainerEvaluator(model, source, trainer=quiet_trainer()) as evaluator:
        return [evaluator.evaluate(subnet) for subnet in subnets]


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_values_are_those_of_a_search(tmp_path: Path, epochs: int) -> None:
    model = LitMlp()
    space = model.net.search_space()
    phone = space.subnet(width=8, sharpen=2)
    callback = SubnetValidation(named={"phone": phone, "tv": dict(phone)}, calibration_images=100)
    logger = CSVLogger(tmp_path)
    L.seed_everything(0, verbose=False)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback], logger=logger)
    g = torch.Generator().manual_seed(0)
    train = DataLoader(digits(), 100, shuffle=True, generator=g)
    val = DataLoader(torch.utils.data.Subset(digits(), range(300)), 64)
    trainer.fit(model, train, val)
    given = {"dataloaders": val, "train_dataloaders": train}
    told = evaluated(model, None, [space.smallest, space.largest, phone], 100, **given)
    assert callback.names == ("smallest", "largest", "phone", "tv")
    assert [callback.latest[n] for n in callback.names] == [*told, told[2]]
    assert set(told[0]) == {"val_acc", "val_loss"}
    assert len({told[i]["val_loss"] for i in range(3)}) == 3
    assert 0.1 < told[1]["val_acc"] <= 1
    logged = {f"{k}/{n}": v for n in callback.names for k, v in callback.latest[n].items()}
    for name, value in logged.items():
        assert trainer.callback_metrics[name].item() == pytest.approx(value, abs=1e-6)
        assert trainer.logged_metrics[name].item() == pytest.approx(value, abs=1e-6)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    ours, normal = ([r for r in rows if r[k]] for k in ("val_acc/smallest", "val_acc"))
    assert [(r["epoch"], r["step"]) for r in ours] == [(r["epoch"], r["step"]) for r in normal]
    assert len(ours) == epochs
    for name, value in logged.items():
        assert float(ours[-1][name]) == pytest.approx(value, abs=1e-6)


def test_it_can_be_monitored(tmp_path: Path) -> None:
    callback = SubnetValidation(["smallest"], calibration_images=100)
    told: list[float] = []

    class Keep(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                told.append(callback.latest["smallest"]["val_loss"])

    writer = ModelCheckpoint(tmp_path, monitor="val_loss/smallest", mode="min")
    stopping = EarlyStopping("val_loss/smallest", patience=9)
    trainer = quiet_trainer(
        max_epochs=3, callbacks=[writer, callback, stopping, Keep()], enable_checkpointing=True
    )
    L.seed_everything(0, verbose=False)
    trainer.fit(LitMlp(), Digits())
    assert len(told) == 3
    assert float(writer.best_model_score) == pytest.approx(min(told))
    assert float(stopping.best_score) == pytest.approx(min(told))
    assert set(callback.latest) == {"smallest"}


def test_every_second_validation_also_after_a_resume(tmp_path: Path) -> None:
    at: list[int] = []

    class Noted(SubnetValidation):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before = self.latest
            super().on_validation_end(trainer, pl_module)
            if self.latest is not before:
                at.append(trainer.current_epoch)

    def run(epochs: int, ckpt: Path | None = None) -> None:
        callback = Noted(["largest"], every_n_validations=2, calibration_images=100)
        writer = ModelCheckpoint(tmp_path, save_last=True)
        trainer = quiet_trainer(
            max_epochs=epochs, callbacks=[callback, writer], enable_checkpointing=True
        )
        L.seed_everything(0, verbose=False)
        trainer.fit(LitMlp(), Digits(), ckpt_path=ckpt, weights_only=False)

    run(3)
    assert at == [1]
    run(6, tmp_path / "last.ckpt")
    assert at == [1, 3, 5]


def test_several_dataloaders() -> None:
    model, callback = LitMlp(), SubnetValidation(calibration_images=100)
    model.validation_step = lambda batch, i, dataloader_idx=0: model.log(  # type: ignore[method-assign] # another step
        "val_loss", F.cross_entropy(model(batch[0]), batch[1])
    )
    loader = DataLoader(digits(), 400)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader, [loader, loader])
    names = {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}
    assert set(callback.latest["smallest"]) == names


def test_workers_that_are_kept_go_on_with_the_epoch() -> None:
    outcomes = []
    for own in ([], [SubnetValidation(calibration_images=100)]):
        L.seed_everything(0, verbose=False)
        data = torch.utils.data.Subset(digits(), range(200))
        train = DataLoader(data, 50, shuffle=True, num_workers=1, persistent_workers=True)
        model = InForce()
        quiet_trainer(max_epochs=1, callbacks=own, val_check_interval=2).fit(
            model, train, DataLoader(data, 100)
        )
        outcomes.append({k: v.clone() for k, v in model.state_dict().items()})
    assert same(*outcomes)


def test_averaged_weights_are_those_that_are_validated() -> None:
    norms: list[float] = []
    averages: list[float] = []

    class Keep(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            average = trainer.callbacks[-2]._average_model.module
            averages.append(average.net.last.weight.norm().item())

    class Seen(InForce):
        def on_validation_epoch_end(self) -> None:
            norms.append(self.net.last.weight.detach().norm().item())

    outcomes = []
    for own in ([], [SubnetValidation(["largest"], calibration_images=100)]):
        norms.clear()
        L.seed_everything(0, verbose=False)
        model = Seen()
        callbacks = [*own, WeightAveraging(), Keep()]
        quiet_trainer(max_epochs=2, callbacks=callbacks, num_sanity_val_steps=0).fit(
            model, Digits()
        )
        outcomes.append((list(norms), {k: v.clone() for k, v in model.state_dict().items()}))
    (alone, state), (both, other) = outcomes
    # The module's hook comes when Lightning's has swapped the averages out again; ours only then.
    assert same(state, other)
    assert both[::2] == alone
    assert both[1::2] == averages[-2:]
    assert both[1] != both[0]


def test_the_subnets_of_a_sampler_that_makes_the_module_elastic() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(64, 10), 1

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return F.cross_entropy(self.layer(batch[0]) * self.scale, batch[1])

        def validation_step(self, batch: Any, i: int) -> None:
            self.log("val_loss", self.training_step(batch, i))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    space = SearchSpace(scale=[1, 2, 4])
    sampling = SubnetSampling(
        n_random=1, space=space, activate=lambda m, s: setattr(m, "scale", s["scale"])
    )
    callback, model = SubnetValidation(), Plain()
    loader = DataLoader(digits(), 600)
    quiet_trainer(max_epochs=1, callbacks=[callback, sampling]).fit(model, loader, loader)
    losses = [callback.latest[name]["val_loss"] for name in callback.names]
    assert losses[0] != losses[1]
    assert model.scale == 4


def test_where_nothing_is_in_force_the_largest_is_from_the_start() -> None:
    model, seen = LitMlp(), []
    model.net.register_forward_pre_hook(lambda net, _: seen.append((net.training, net.sharpen)))
    loader = DataLoader(digits(), 600)
    callback = SubnetValidation(calibration_images=100)
    quiet_trainer(max_epochs=2, callbacks=[callback]).fit(model, loader, loader)
    assert model.net.active_subnet == model.net.search_space().largest
    assert {sharpen for training, sharpen in seen if training} == {3}


def test_other_stages_are_left_alone() -> None:
    callback, model = SubnetValidation(calibration_images=100), LitMlp()
    quiet_trainer(callbacks=[callback]).validate(model, Digits(), verbose=False)
    assert callback.latest == {}


def test_mistakes_show_before_training() -> None:
    model = LitMlp()

    def train(callback: SubnetValidation, **options: Any) -> None:
        loader = DataLoader(digits(), 600)
        options = {"train_dataloaders": loader, "val_dataloaders": loader} | options
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, **options)

    for arguments, parts in [
        ({"subnets": ["smalest"]}, ["'smalest'", "Did you mean 'smallest'", "named="]),
        ({"subnets": []}, ["no subnets"]),
        ({"named": {"largest": {}}}, ["the name 'largest'"]),
        ({"named": {3: {}}}, ["the name 3"]),
        ({"named": {"phone": 5}}, ["named['phone'] is 5", "space.subnet(...)"]),
        ({"every_n_validations": 0}, ["every_n_validations=0", "from 1"]),
        ({"every_n_validations": 1.5}, ["every_n_validations=1.5"]),
        ({"calibration_images": -1}, ["calibration_images=-1", "from 0"]),
    ]:
        with pytest.raises(SearchError) as caught:
            SubnetValidation(**arguments)
        assert_clear(caught.value, *parts)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InvalidSubnetError) as wrong:
        train(SubnetValidation(named={"phone": {"width": 5, "sharpen": 1}}))
    assert_clear(wrong.value, "named['phone']", "'width' cannot be 5", "4, 8, 16, 32")
    other = SearchSpace(depth=[1, 2]).largest
    with pytest.raises(InvalidSubnetError, match="'depth' is not a choice of this space"):
        train(SubnetValidation(named={"phone": other}))
    with pytest.raises(SearchError, match="no validation data"):
        train(SubnetValidation(), val_dataloaders=None)

    def by_name(batch: list[Any]) -> dict[str, torch.Tensor]:
        return dict(enumerate(torch.utils.data.default_collate(batch)))

    mapped = DataLoader(digits(), 600, collate_fn=by_name)
    with pytest.raises(SearchError, match=r"a dict.*calibration_step\(batch\)"):
        train(SubnetValidation(), train_dataloaders=mapped)
    model.eval()
    for name, value in model.state_dict().items():
        if "norm" not in name:  # the sanity check does not train either
            assert torch.equal(value, before[name]), name


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.programs.ddp_watch_program", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in (0, 1):  # each has BatchNorm statistics of its own
        one, other = (told[rank][name] for name in ("with", "without"))
        assert one["weights"] == other["weights"]
        assert one["best"] == other["best"]
    assert told[0]["with"]["latest"] == told[1]["with"]["latest"]
    assert told[0]["without"]["latest"] is None
    for name, values in told[0]["alone"].items():  # one process, all of the data
        assert told[0]["with"]["latest"][name] == pytest.approx(values, abs=1e-6)
