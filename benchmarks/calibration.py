# SPDX-License-Identifier: Apache-2.0
"""What BatchNorm should be recalibrated on: how many training images, and through which transforms.

    python -m benchmarks.calibration [--networks resnet20 mobilenet] [--seeds 3]
    python -m benchmarks.calibration --report

Three networks that were trained with augmentation (a random crop of the padded image, mirrored at
random): the pre-trained CIFAR-10 ResNet-20 and ResNet-56 of examples/bring_your_own.py, and an
elastic MobileNetV3 that is trained here by the recipe of examples/images.py. Statistics are renewed
on the first 64 to 4,096 of the training images in the order of a seed, in batches of 128, plain or
through the training's augmentation. Accuracy is that of 2,000 test images for the whole ResNets,
which have statistics of their own to compare with, and of 1,000 for 15 subnets of the ResNet-56 (2,
4 and 8 of its blocks skipped at random, 5 subnets each) and 16 of the MobileNetV3. Kendall's tau
compares the accuracies of the subnets with those of the largest augmented calibration, mean of the
other seeds. One thread; seconds are of the processor, told as a share of validating 1,000 images. A
row is written as soon as it is measured, and is not measured again: 40 minutes of an idle core.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks.data import RESULTS, ROOT, SCRATCH, data_folder
from benchmarks.search_efficiency import commit, write
from benchmarks.training import QUIET
from lightning_subnet import SearchSpace, Subnet, SubnetSampling, recalibrate
from lightning_subnet.elasticity.batchnorm import batch_norms
from lightning_subnet.supernets import ElasticMobileNetV3

NETWORKS = ("resnet20", "mobilenet", "resnet56")
WAYS = ("plain", "augmented")
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
BATCH, SEEDS, EPOCHS = 128, 3, 8
SKIPPED, EACH = (2, 4, 8), 5
KEYS = ["network", "subnet", "way", "images", "seed"]
OUT = RESULTS / "calibration.csv"
OWN, WHOLE = "own", "whole"  # the statistics that a network came with; all of a ResNet


@dataclass(frozen=True)
class Case:
    """A trained network, the subnets of it that are measured, and its images.

    Args:
        net: The network, with BatchNorm statistics of its own.
        subnets: The subnets by label; None is a network without choices.
        train: Training images.
        ways: By name, the function that makes a batch (n, 3, 32, 32) of samples.
        tests: Images (2000, 3, 32, 32) and classes (2000,) by which a network is judged.
        known: Which of them the network as it came gets right, (2000,).
    """

    net: Any
    subnets: dict[str, Subnet | None]
    train: Dataset
    ways: dict[str, Callable[[list[Any]], Any]]
    tests: tuple[torch.Tensor, ...]
    known: np.ndarray


def example(name: str) -> Any:
    """Return the module of an example."""
    os.environ.setdefault("LIGHTNING_SUBNET_DATA", str(data_folder()))
    sys.path.insert(0, str(ROOT / "examples"))
    return __import__(name)


@cache
def case_of(name: str) -> Case:
    made = elastic_mobilenet() if name == "mobilenet" else resnet(int(name.removeprefix("resnet")))
    net, subnets, train, ways, (x, y) = made
    net = net.to(memory_format=torch.channels_last)  # faster on a CPU
    tests = x.contiguous(memory_format=torch.channels_last), y
    return Case(net, subnets, train, ways, tests, right(net, tests))


def resnet(layers: int) -> tuple[Any, ...]:
    """Return a pre-trained ResNet; of the ResNet-56 also subnets that skip blocks."""
    byo = example("bring_your_own")
    net, subnets = byo.pretrained(data_folder(), layers), {WHOLE: None}
    if layers == 56:
        net = byo.searchable(net)
        space = net.search_space()
        subnets = {WHOLE: space.largest, **skipping(space)}
    data = byo.Cifar10(2000, data_folder())
    data.setup("fit")

    def plain(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return byo.normalised(x), y

    ways = {"plain": plain, "augmented": byo.as_trained}
    return net, subnets, data.train, ways, data.val.tensors


def skipping(space: SearchSpace) -> dict[str, Subnet]:
    """Return by label, "4 skipped, 0" and so on, subnets that skip blocks at random."""
    rng, names = np.random.default_rng(0), list(space.names)
    subnets = {}
    for skipped, i in product(SKIPPED, range(EACH)):
        some = set(rng.choice(names, skipped, replace=False))
        choices = {name: int(name not in some) for name in names}
        subnets[f"{skipped} skipped, {i}"] = space.subnet(choices)
    return subnets


def elastic_mobilenet() -> tuple[Any, ...]:
    """Return an elastic MobileNetV3, trained here once, with 16 of its subnets."""
    images = example("images")
    train, val, test = images.photographs(10_000, 1000, data_folder() / "cifar10_small.npz")
    L.seed_everything(0, verbose=False)
    model = images.LitImages(
        ElasticMobileNetV3.tiny(
            in_channels=3, image_size=32, n_classes=10, dropout=0.0, strides=(2, 2, 2)
        )
    )
    path = SCRATCH / "calibration" / f"mobilenet-{EPOCHS}.pt"
    if not path.exists():
        sampling = SubnetSampling("sandwich", n_random=1, distill=True, label_weight=1)
        loader = DataLoader(train, 64, shuffle=True, collate_fn=images.augmented, drop_last=True)
        trainer = L.Trainer(max_epochs=EPOCHS, limit_val_batches=0, callbacks=[sampling], **QUIET)
        trainer.fit(model, loader)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    space = model.net.search_space()
    drawn = [space.largest, space.smallest, *space.sample(14, rng=0)]
    tests = tuple(torch.cat(pair) for pair in zip(val.tensors, test.tensors, strict=True))
    ways = {"plain": default_collate, "augmented": images.augmented}
    return model.net, {str(i): s for i, s in enumerate(drawn)}, train, ways, tests


def statistics(net: nn.Module, images: torch.Tensor) -> Iterator[tuple[int, float]]:
    """Give a network the statistics of ever more images (n, 3, 32, 32).

    Each image is passed once, as statistics are averages over samples: those of a thousand images
    and of the next thousand average to those of both.

    Yields:
        So many images, and the seconds that recalibration on them took.
    """
    buffers = [b for layer in batch_norms(net) for b in layer.buffers() if b.is_floating_point()]
    means: list[torch.Tensor] = []
    done, seconds = 0, 0.0
    for n in SIZES:
        if done < BATCH:  # less than a batch is a batch by itself
            done, seconds = 0, 0.0
        start = time.process_time()
        recalibrate(net, images[done:n].split(BATCH), max_images=n - done)
        seconds += time.process_time() - start
        share = (n - done) / n
        pairs = zip(means or buffers, buffers, strict=True)
        means = [torch.lerp(mean, new, share) for mean, new in pairs]
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean)
        yield n, seconds
        done = n


@torch.inference_mode()
def right(net: nn.Module, tests: tuple[torch.Tensor, ...]) -> np.ndarray:
    """Return for each image whether its class is predicted, (n,)."""
    net.eval()
    batches = zip(*(part.split(125) for part in tests), strict=True)
    return np.concatenate([(net(x).argmax(1) == y).numpy() for x, y in batches])


def judged(net: nn.Module, case: Case, label: str) -> dict[str, Any]:
    """Return the accuracy, how many answers are right in one way only, and the seconds of 1,000."""
    by = 1 if label == WHOLE else 2
    start = time.process_time()
    answers = right(net, tuple(part[::by] for part in case.tests))
    seconds = (time.process_time() - start) * 1000 / len(answers)
    return {
        "accuracy": round(float(answers.mean()), 5),
        "changed": int((answers != case.known).sum()) if label == WHOLE else "",
        "validation": round(seconds, 3),
        "commit": commit(),
    }


@cache
def calibration_images(name: str, way: str, seed: int) -> torch.Tensor:
    """Return training images (4096, 3, 32, 32), which are the same for all subnets."""
    case = case_of(name)
    torch.manual_seed(seed)
    order = torch.randperm(len(case.train))[: max(SIZES)].tolist()
    x, _ = case.ways[way]([case.train[i] for i in order])
    return x.contiguous(memory_format=torch.channels_last)


def measure(networks: list[str], seeds: int) -> None:
    """Measure what is not there."""
    done = set()
    if OUT.exists():
        frame = pd.read_csv(OUT, dtype=str)
        done = {*zip(frame.network, frame.subnet, frame.way, frame.seed, strict=True)}
    jobs = [
        (seed, name, label, way)
        for seed, name in product(range(seeds), networks)
        for label, way in product(case_of(name).subnets, (OWN, *WAYS))
        if way != OWN or (label == WHOLE and not seed)
    ]
    for seed, name, label, way in sorted(jobs, key=lambda job: job[2] != WHOLE):  # these first
        if (name, label, way, str(seed)) not in done:
            case, subnet = case_of(name), case_of(name).subnets[label]
            keys = {"network": name, "subnet": label, "way": way, "seed": seed}
            if way == OWN:  # as it came: nothing is renewed yet
                rows = [keys | {"images": 0, "seconds": ""} | judged(case.net, case, label)]
            else:
                if subnet is not None:
                    case.net.activate(subnet)
                images = calibration_images(name, way, seed)
                rows = [
                    keys | {"images": n, "seconds": round(took, 3)} | judged(case.net, case, label)
                    for n, took in statistics(case.net, images)
                ]
            write(OUT, pd.DataFrame(rows), KEYS)
            print(name, label, way, seed, [row["accuracy"] for row in rows], file=sys.stderr)


def report() -> None:
    """Print what is there."""
    frame = pd.read_csv(OUT)
    frame["points"] = frame.accuracy * 100
    own = frame[frame.way == OWN].set_index("network").points
    frame = frame[frame.way != OWN]
    frame["kind"] = frame.network + " " + frame.subnet.str.split(",").str[0]
    frame.loc[frame.network == "mobilenet", "kind"] = "mobilenet"
    largest = frame[(frame.way == "augmented") & (frame.images == max(SIZES))]
    means = largest.groupby(["network", "subnet"]).points.mean().to_dict()
    means |= {(network, WHOLE): value for network, value in own.items()}
    pairs = zip(frame.network, frame.subnet, strict=True)
    frame["loss"] = frame.points - [means.get(pair, np.nan) for pair in pairs]
    there = ", ".join(f"{name} {value:.2f} %" for name, value in own.items())
    print(f"Accuracy, points, less that of the own statistics of a whole network ({there}), or")
    print(f"less that on {max(SIZES):,} augmented images, mean of the seeds (subnets); and the")
    print("standard deviation among seeds")
    groups = frame.groupby(["kind", "way", "images"])
    spread = frame.groupby(["kind", "way", "images", "subnet"]).loss.std().groupby(level=[0, 1, 2])
    table = groups.loss.mean().map("{:+.2f}".format) + spread.mean().map(" ({:.2f})".format)
    print(table.unstack().to_string())

    print(
        "\nKendall's tau of subnets, to the mean of the other seeds' largest augmented calibration"
    )
    print(taus(frame).unstack().round(3).to_string())

    frame["share"] = frame.seconds / frame.validation
    shares = frame.groupby(["network", "images"]).share.median().unstack()
    print("\nSeconds of a recalibration, as a share of validating 1,000 images")
    print(shares.round(2).to_string())

    whole = frame[(frame.subnet == WHOLE) & (frame.way == "augmented")]
    se = np.sqrt(whole.changed.astype(float)) / 2000 * 100  # of a paired difference near zero
    table = se.groupby([whole.network, whole.images]).mean().unstack().round(2)
    print("\nStandard error of that difference on 2,000 images, points (own and augmented)")
    print(table.to_string())


def taus(frame: pd.DataFrame) -> pd.Series:
    """Return Kendall's tau by network, way and number of images, mean of the seeds."""
    rows = []
    for network, part in frame[frame.subnet != WHOLE].groupby("network"):
        table = part.pivot_table("points", ["way", "images", "seed"], "subnet")
        table = table.dropna(axis=1)  # subnets that are measured in all ways
        if "augmented" not in table.index.get_level_values("way"):
            continue
        largest = table.loc["augmented", max(SIZES)]
        for (way, images, seed), values in table.iterrows():
            others = largest.drop(seed, errors="ignore")
            if len(others):
                tau = kendalltau(values, others.mean()).statistic
                rows.append({"network": network, "way": way, "images": images, "tau": tau})
    keys = ["network", "way", "images"]
    return pd.DataFrame(rows, columns=[*keys, "tau"]).groupby(keys).tau.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="orders of the training images")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    args = parser.parse_args()
    pd.set_option("display.width", 200)
    if not args.report:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        measure(args.networks, args.seeds)
    report()


if __name__ == "__main__":
    main()
