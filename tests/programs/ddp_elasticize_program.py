# SPDX-License-Identifier: Apache-2.0
"""Two processes make a network elastic, which they draw from seeds of their own, and train it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_subnet import Elasticize, SubnetSampling
from tests.networks import quiet_trainer
from tests.training.test_elasticize_callback import Plain, loader, network

if __name__ == "__main__":
    model, elastic = Plain(), Elasticize(widths=(0.5, 1))
    trainer = quiet_trainer(
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=2,
        callbacks=[SubnetSampling(), elastic],
    )
    torch.manual_seed(trainer.global_rank)
    model.net = network()
    trainer.fit(model, loader(shuffle=True))
    part = model.net
    state = {
        "hash": elastic.state_dict()["hash"],
        "values": dict(part.search_space().values),
        "weights": {k: v.detach() for k, v in part.named_parameters()},
    }
    torch.save(state, Path(sys.argv[1]) / f"{trainer.global_rank}.pt")
