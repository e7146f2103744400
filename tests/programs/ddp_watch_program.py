# SPDX-License-Identifier: Apache-2.0
"""A training with and without SubnetValidation under 2-process gloo DDP; ranks write what came.

python -m tests.programs.ddp_watch_program OUT
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Subset

from lightning_subnet import SubnetSampling, SubnetValidation
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import Source
from tests.networks import LitMlp, digits, quiet_trainer


class Synced(LitMlp):
    def validation_step(self, batch: Any, _: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)


def main() -> None:
    out, told = sys.argv[1], {}
    data = digits()
    train = DataLoader(Subset(data, range(300)), 25, shuffle=True)
    val = DataLoader(Subset(data, range(300, 500)), 50)  # 4 batches, 2 in each process
    for name in ("without", "with"):
        callback = SubnetValidation(calibration_images=100)
        writer = ModelCheckpoint(f"{out}/{name}", monitor="val_acc", mode="max")
        own = [callback] if name == "with" else []
        L.seed_everything(0, verbose=False)
        model = Synced()
        trainer = quiet_trainer(
            max_epochs=2,
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            callbacks=[*own, SubnetSampling(n_random=1), writer],
            enable_checkpointing=True,
        )
        trainer.fit(model, train, val)
        state = b"".join(v.numpy().tobytes() for v in model.state_dict().values())
        told[name] = {
            "weights": hashlib.sha256(state).hexdigest(),
            "best": (Path(writer.best_model_path).name, float(writer.best_model_score)),
            "latest": callback.latest or None,
        }
    rank = trainer.global_rank
    space = model.net.search_space()
    source = Source(dataloaders=val, train_dataloaders=train, calibration_images=100)
    torch.distributed.destroy_process_group()
    with TrainerEvaluator(model, source, trainer=quiet_trainer(devices=1)) as evaluator:
        ends = {"smallest": space.smallest, "largest": space.largest}
        told["alone"] = {name: evaluator.evaluate(subnet) for name, subnet in ends.items()}
    Path(f"{out}/rank{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
