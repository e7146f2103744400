# SPDX-License-Identifier: Apache-2.0
"""A search in one or two processes; writes the result of each process as JSON.

python ddp_search_program.py DEVICES FOLDER [unreduced | failing | callback]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Subset

from lightning_subnet import SubnetSearch, SubnetSearchCallback
from lightning_subnet.strategies import NSGA2
from tests.networks import LitMlp, digits, quiet_trainer


class Data(L.LightningDataModule):
    """101 samples to validate on: eleven batches of at most ten, for two processes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def prepare_data(self) -> None:
        with (self.folder / "prepared").open("a") as file:
            file.write("x")

    def setup(self, stage: str) -> None:
        order = torch.randperm(1797).tolist()  # unseeded, as many datamodules split
        self.train = Subset(digits(), order[:400])
        self.val = Subset(digits(), order[400:501])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=40, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=10)


class Counting(LitMlp):
    """Counts its validation samples over all processes."""

    def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, i)
        self.log("samples", float(len(batch[0])), reduce_fx="sum", sync_dist=True)
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("own_acc", right)  # not reduced
        if self.net.width == 8 and FAILING:
            msg = "no"
            raise ValueError(msg)


FAILING = "failing" in sys.argv


def main() -> None:
    devices, folder = int(sys.argv[1]), Path(sys.argv[2])
    mode = sys.argv[3] if len(sys.argv) > 3 else ""
    L.seed_everything(0, verbose=False)
    model = Counting()
    data = Data(folder)
    trainer = quiet_trainer(
        devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2
    )
    search = SubnetSearch(
        objectives={"own_acc" if mode == "unreduced" else "val_acc": "max", "macs": "min"},
        constraints={"samples": "<= 1000"},
        strategy=NSGA2(population=4),
        budget=9,
        storage=f"sqlite:///{folder}/search.db",
        name="ddp",
        trainer=None if mode == "callback" else trainer,
        calibration_images=100,
    )
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    report: dict[str, Any] = {}
    try:
        if mode == "callback":
            callback = SubnetSearchCallback(search, progress=False)
            trainer.callbacks.append(callback)
            trainer.fit(model, data)
            result = callback.result
            report["training_trainer"] = model.trainer is trainer
        else:
            result = search.fit(model, data, progress=False)
            (folder / "again").mkdir(exist_ok=True)
            again = search.replace(resume="must").fit(model, Data(folder / "again"), progress=False)
            report["again"] = [e.number for e in again.history]
        assert result is not None
        rank = trainer.global_rank
        report["history"] = [{**e.to_json(), "seconds": 0} for e in result.history]
        report["front"] = [e.number for e in result.front]
        report["weights"] = float(sum(p.double().sum() for p in model.parameters()))
    except Exception as error:
        rank = trainer.global_rank
        report["error"] = f"{type(error).__name__}: {error}"
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
