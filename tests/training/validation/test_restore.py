# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import random
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_subnet.training.validation.restore import module_state, untouched
from tests.networks import Digits, LitMlp, quiet_trainer, search
from tests.problems import numpy_state


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


def test_state_of_a_module_that_was_moved_to_another_type_comes_back() -> None:
    model = LitMlp()
    model.training_step((torch.randn(8, 64), torch.arange(8)), 0).backward()
    model.accuracy(torch.eye(10), torch.arange(10))
    before = [(p, p.data_ptr(), p.grad, p.grad.clone()) for p in model.parameters()]
    with untouched(model), module_state(model):
        assert model.accuracy.update_count == 0
        model.double()
        model.accuracy(torch.eye(10), torch.ones(10, dtype=torch.long))
        model.validations, model.other = 7, 1
        assert model.dtype == torch.float64
    for p, address, gradient, value in before:
        assert (p.dtype, p.data_ptr()) == (torch.float32, address)
        assert p.grad is gradient
        assert torch.equal(p.grad, value)
    assert model.dtype == torch.float32
    assert model.accuracy.compute() == 1
    assert model.validations == 0
    assert not hasattr(model, "other")
