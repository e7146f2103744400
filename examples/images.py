# SPDX-License-Identifier: Apache-2.0
"""Train an elastic ResNet on small photographs, and search accuracy against MACs.

    python examples/images.py [--smoke]

10,000 images of CIFAR-10 train it, from the folder that LIGHTNING_SUBNET_DATA names. Of 2,000
others every second one is validated in the search, and the rest tests the winner. MACs are exact
and looked up; latency, of one image, is measured beside them. Everything is written to
images_output/, that of --smoke to images_output/smoke/.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_subnet import Latency, SubnetSampling, SubnetSearch
from lightning_subnet.supernets import ElasticResNet

IMAGES = Path(os.environ.get("LIGHTNING_SUBNET_DATA", "../shared/data")) / "cifar10_small.npz"
WHOLE = {"train": 10_000, "val": 1000, "epochs": 32, "budget": 80, "seconds": 0.2}
SMOKE = {"train": 500, "val": 100, "epochs": 1, "budget": 13, "seconds": 0.02}


def photographs(train: int, val: int, path: Path = IMAGES) -> list[TensorDataset]:
    """Return images to train on, to validate and to test: evenly, as they are sorted by class."""
    with np.load(path) as data:
        arrays = {name: data[name] for name in ("train_x", "train_y", "test_x", "test_y")}
    step, other = len(arrays["train_y"]) // train, len(arrays["test_y"]) // val
    parts = [("train", 0, step), ("test", 0, other), ("test", other // 2, other)]
    mean, std = torch.tensor([[0.491, 0.482, 0.447], [0.247, 0.243, 0.262]])[..., None, None]
    datasets = []
    for name, start, by in parts:
        x = torch.tensor(arrays[f"{name}_x"][start::by]).permute(0, 3, 1, 2)
        y = torch.tensor(arrays[f"{name}_y"][start::by]).long()
        datasets.append(TensorDataset(((x / 255 - mean) / std).contiguous(), y))
    return datasets


def augmented(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift each image by up to four pixels and mirror half of them, all of a batch at once."""
    x, y = default_collate(samples)
    n, channels, height, width = x.shape
    down, right = torch.randint(9, (2, n, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)  # (n, pixels)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
    x = F.pad(x, (4, 4, 4, 4))
    return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]], y


class LitImages(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.05, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 5e-3, total_steps=steps, pct_start=0.2
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def network() -> ElasticResNet:
    """Return a size that two cores can train: 16 x 16 pixels behind the stem, then 8 and 4."""
    return ElasticResNet.small(
        strides=(2, 1, 2, 2, 1), widths=(32, 64, 128), depths=(0, 1), expansions=(0.25, 0.5, 1.0)
    )


@torch.no_grad()
def accuracy(net: nn.Module, images: TensorDataset) -> float:
    right = [net(x).argmax(1) == y for x, y in DataLoader(images, batch_size=250)]
    return torch.cat(right).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a minute instead of a quarter hour")
    smoke = parser.parse_args().smoke
    size = SMOKE if smoke else WHOLE
    if not IMAGES.is_file():
        raise SystemExit(f"There is no {IMAGES}: set LIGHTNING_SUBNET_DATA. Nothing was done.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`).*")
    output = Path("images_output", "smoke") if smoke else Path("images_output")
    output.mkdir(parents=True, exist_ok=True)
    L.seed_everything(0, verbose=False)

    train, val, test = photographs(size["train"], size["val"])
    model = LitImages(network())
    if (output / "supernet.pt").exists():
        model.load_state_dict(torch.load(output / "supernet.pt"))
    else:
        print(f"Training {model.net.search_space()}")
        trainer = L.Trainer(
            max_epochs=size["epochs"], limit_val_batches=0, accelerator="cpu",
            callbacks=[SubnetSampling("sandwich", n_random=1, distill=True, label_weight=1)],
            logger=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        batches = DataLoader(train, 64, shuffle=True, collate_fn=augmented, drop_last=True)
        trainer.fit(model, batches)
        torch.save(model.state_dict(), output / "supernet.pt")

    search = SubnetSearch(
        objectives={"val_acc": "max", "macs": "min"},
        measures=[Latency(batch_size=1, seconds=size["seconds"])], budget=size["budget"],
        storage=f"sqlite:///{output}/search.db", name="cifar10",
    )  # fmt: skip
    # BatchNorm is recalibrated for each subnet on what the training saw, so augmented too.
    as_trained = DataLoader(train, 128, shuffle=True, collate_fn=augmented)
    result = search.fit(model, dataloaders=DataLoader(val, 250), train_dataloaders=as_trained)
    print(result)
    whole = result.history[0]
    best = result.best("val_acc", where={"macs": "<= 50%"})
    for label, e in (("Largest subnet", whole), ("Best within half of its MACs", best)):
        plain = result.extract(e)  # an ordinary network
        print(
            f"{label}: {e.values['val_acc']:.1%} in the search, {accuracy(plain, test):.1%} of "
            f"{len(test)} other images, {e.values['macs'] / 1e6:.1f} M MACs, "
            f"{sum(p.numel() for p in plain.parameters()) / 1e3:.0f} k parameters, "
            f"{e.values['latency_ms']:.2f} ms"
        )
    torch.save(plain, output / "best.pt")
    figure, ax = result.plot("macs", "val_acc")
    ax.set_title(f"Elastic ResNet on CIFAR-10: {ax.get_title()}", fontsize=11)
    figure.savefig(output / "front.png", dpi=120)
    result.save(output / "result.json")
    print(f"Wrote best.pt, front.png and result.json into {output}/.")


if __name__ == "__main__":
    main()
