# SPDX-License-Identifier: Apache-2.0
"""One SubnetSampling step under 2-process gloo DDP; ranks save batches and gradients.

python -m tests.programs.ddp_sampling_program OUT (batchnorm|plain) (distill|labels) ACCUMULATED
"""

from __future__ import annotations

import sys

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from lightning_subnet import SubnetSampling
from tests.networks import quiet_trainer
from tests.test_callbacks import LitNet, Unnormalised, gradients, loader


class Save(Callback):
    def __init__(self, path: str) -> None:
        self.path = path
        self.batches: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, _: object, __: object, batch: list, ___: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: object, module: LitNet, _: object) -> None:
        told = {"gradients": gradients(module), "batches": self.batches}
        torch.save(told, f"{self.path}/rank{module.global_rank}.pt")


def main() -> None:
    out, kind, goal, accumulated = sys.argv[1:]
    torch.manual_seed(0)
    model = LitNet() if kind == "batchnorm" else Unnormalised()
    trainer = quiet_trainer(
        max_steps=1,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        accumulate_grad_batches=int(accumulated),
        callbacks=[SubnetSampling(n_random=2, distill=goal == "distill"), Save(out)],
    )
    trainer.fit(model, loader(n=32, size=4))
    torch.save(model.state_dict(), f"{out}/weights{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
