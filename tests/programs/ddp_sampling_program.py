# SPDX-License-Identifier: Apache-2.0
"""SubnetSampling steps under 2-process gloo DDP; ranks save batches, gradients and subnets.

python -m tests.programs.ddp_sampling_program OUT KIND GOAL ACCUMULATED

KIND is batchnorm or plain; GOAL is distill, labels or ranks. One step; of `ranks` four, and the
gradients of the first.
"""

from __future__ import annotations

import sys

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from lightning_subnet import SubnetSampling
from tests.networks import quiet_trainer
from tests.training.test_subnet_sampling import LitNet, Unnormalised, gradients, loader


class Save(Callback):
    def __init__(self, path: str) -> None:
        self.path = path
        self.batches: list[list[torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, _: object, __: object, batch: list, ___: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: object, module: LitNet, _: object) -> None:
        self.gradients.append(gradients(module))
        told = {
            "gradients": self.gradients[0],
            "batches": self.batches,
            "seen": [subnet.to_json() for subnet in module.seen if subnet is not None],
        }
        torch.save(told, f"{self.path}/rank{module.global_rank}.pt")


def main() -> None:
    out, kind, goal, accumulated = sys.argv[1:]
    torch.manual_seed(0)
    model = LitNet() if kind == "batchnorm" else Unnormalised()
    ranks = goal == "ranks"
    sampling = (
        SubnetSampling("ranks") if ranks else SubnetSampling(n_random=2, distill=goal == "distill")
    )
    trainer = quiet_trainer(
        max_steps=4 if ranks else 1,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        accumulate_grad_batches=int(accumulated),
        callbacks=[sampling, Save(out)],
    )
    trainer.fit(model, loader(n=32, size=4))
    torch.save(model.state_dict(), f"{out}/weights{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
