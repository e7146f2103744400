# SPDX-License-Identifier: Apache-2.0
"""Search a network that nobody trained as a super-network: a pre-trained CIFAR-10 ResNet-56.

    python examples/bring_your_own.py [--budget 100] [--images 500] [--smoke]

24 of its 27 residual blocks, all but the first of a stage, may be skipped: 2^24 subnets, without
any training. Of 2,000 test images so many are validated per subnet, and the others, which the
search does not see, test the winner before and after one epoch of fine-tuning on 10,000 training
images. Weights and images come from the folder that LIGHTNING_SUBNET_DATA names; everything is
written to byo_output/.
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
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import Latency, SearchSpace, Subnet, SubnetSearch
from lightning_subnet.strategies import Hybrid
from lightning_subnet.supernets import skippable_blocks

DATA = Path(os.environ.get("LIGHTNING_SUBNET_DATA", "../shared/data"))
WHOLE = {"budget": 100, "images": 500, "timed": 8, "seconds": 1, "gentle": 15, "first": 12,
         "calibration": 512, "verify": True, "train_every": 1, "test_every": 1}  # fmt: skip
SMOKE = {"budget": 10, "images": 100, "timed": 1, "seconds": 0.1, "gentle": 6, "first": 2,
         "calibration": 128, "verify": False, "train_every": 10, "test_every": 4}  # fmt: skip


# Someone else's network, as it is published: nothing in it knows of subnets.


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.grown = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.grown:  # fewer pixels, and more channels: zeros on both sides
            half = self.grown // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + x)


class ResNet(nn.Module):
    def __init__(self, blocks: int = 9) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for s in (1, 2, 3):
            first = Block(widths[s - 1], widths[s], 1 if s == 1 else 2)
            rest = [Block(widths[s], widths[s], 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{s}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


def pretrained(data: Path = DATA, layers: int = 56) -> ResNet:
    net = ResNet((layers - 2) // 6)
    (path,) = (data / "cifar10_resnet").glob(f"resnet{layers}-*.th")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    net.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return net


# What makes it searchable: all blocks but the first of each stage may be left out.


def searchable(net: ResNet) -> nn.Module:
    blocks = [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(1, len(net.layer1))]
    return skippable_blocks(net, torch.zeros(1, 3, 32, 32), blocks=blocks)


class LitClassifier(L.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Return bytes (..., 3, 32, 32) as the network was trained to take them."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (images / 255 - mean) / std


def as_trained(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop each image with 4 black pixels around it at random, and mirror half of them.

    So the pre-training did, and BatchNorm's statistics are renewed on what the training saw: on
    the images as they are, which have no black edges, they would cost it a point of accuracy.
    """
    images = []
    for image, _ in samples:
        top, left, mirror = (int(torch.randint(n, ())) for n in (9, 9, 2))
        crop = F.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
        images.append(crop.flip(2) if mirror else crop)
    return normalised(torch.stack(images)), torch.stack([label for _, label in samples])


class Cifar10(L.LightningDataModule):
    """Every so many-th training image; of the test images so many validate, and others test."""

    def __init__(
        self, images: int, data: Path = DATA, train_every: int = 1, test_every: int = 1
    ) -> None:
        super().__init__()
        self.images, self.data = images, data
        self.train_every, self.test_every = train_every, test_every

    def setup(self, stage: str) -> None:
        arrays = np.load(self.data / "cifar10_small.npz")  # sorted by class

        def part(name: str, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
            x, y = (torch.tensor(arrays[f"{name}_{letter}"][rows]) for letter in "xy")
            return x.permute(0, 3, 1, 2), y.long()

        validated = np.arange(len(arrays["test_y"])) % (len(arrays["test_y"]) // self.images) == 0
        others = np.flatnonzero(~validated)[:: self.test_every]
        # Bytes to train on: `as_trained` crops them before it normalises them.
        self.train = TensorDataset(*part("train", slice(None, None, self.train_every)))
        self.val, self.test = (
            TensorDataset(normalised(x), y)
            for x, y in (part("test", validated), part("test", others))
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=128, shuffle=True, collate_fn=as_trained)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=125)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=125)


def gentle(space: SearchSpace, n: int) -> list[Subnet]:
    """Return subnets that skip ten blocks to one: at random half of all are, which is too many."""
    rng, names = np.random.default_rng(0), list(space.names)
    skipped = [set(rng.choice(names, 10 - i * 10 // n, replace=False)) for i in range(n)]
    return [space.subnet({name: int(name not in some) for name in names}) for some in skipped]


@torch.no_grad()
def accuracy(net: nn.Module, loader: DataLoader) -> float:
    net.eval()
    right = [net(x).argmax(1) == y for x, y in loader]
    net.train()
    return torch.cat(right).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, help="evaluations (100)")
    parser.add_argument("--images", type=int, help="validated per subnet (500)")
    parser.add_argument("--smoke", action="store_true", help="a minute instead of a quarter hour")
    args = parser.parse_args()
    options = {"budget": args.budget, "images": args.images}
    size = SMOKE if args.smoke else WHOLE
    size = size | {name: value for name, value in options.items() if value is not None}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`).*")
    if not DATA.is_dir():
        raise SystemExit(f"There is no {DATA}: set LIGHTNING_SUBNET_DATA. Nothing was done.")
    L.seed_everything(0, verbose=False)
    output = Path("byo_output")
    output.mkdir(exist_ok=True)

    net = searchable(pretrained())
    search = SubnetSearch(
        objectives={"val_acc": "max", "latency_ms": "min"},
        measures=[Latency(size["timed"], seconds=size["seconds"])],
        warm_start=gentle(net.search_space(), size["gentle"]),
        strategy=Hybrid(first=size["first"]),
        budget=size["budget"],
        storage=f"sqlite:///{output}/search.db",
        name=f"resnet56-{size['images']}",
        calibration_images=size["calibration"],
        verify_front=size["verify"],
    )
    model, data = LitClassifier(net), Cifar10(size["images"])
    result = search.fit(model, data)
    print(result)

    whole = result.history[0]
    best = result.best("val_acc", where={"latency_ms": "<= 80%"})
    for label, e in (("The whole network", whole), ("Best within 80 % of its latency", best)):
        blocks = sum(e.subnet.values())
        print(f"{label}: {blocks} of 24 blocks, {e.values['val_acc']:.1%}, "
              f"{e.values['latency_ms']:.2f} ms")  # fmt: skip

    # The winner is trained on as any other module: what was skipped is no longer in it.
    images = Cifar10(size["images"], train_every=size["train_every"], test_every=size["test_every"])
    images.setup("fit")
    module = result.to_module(model, best)
    tested = {
        "the whole network": accuracy(result.extract(whole), images.test_dataloader()),
        "the winner": accuracy(module, images.test_dataloader()),
    }
    trainer = L.Trainer(
        max_epochs=1, limit_val_batches=0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, images.train_dataloader())
    tested["the winner after fine-tuning"] = accuracy(module, images.test_dataloader())
    print(f"Of {len(images.test)} images that the search did not see:")
    for label, share in tested.items():
        print(f"  {label}: {share:.1%}")
    torch.save(module.net.state_dict(), output / "best.pt")
    figure, ax = result.plot()
    ax.set_title(f"Pre-trained ResNet-56, blocks skipped: {ax.get_title()}", fontsize=11)
    figure.savefig(output / "front.png", dpi=120)
    result.save(output / "result.json")
    print(f"Wrote best.pt, front.png and result.json into {output}/.")


if __name__ == "__main__":
    main()
