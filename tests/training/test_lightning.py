# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_subnet import SubnetMixin
from lightning_subnet.errors import SearchError
from tests.networks import Digits, LitMlp, digits, quiet_trainer, search

TRAIN = DataLoader(digits(), 100)


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
