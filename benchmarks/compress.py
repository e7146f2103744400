# SPDX-License-Identifier: Apache-2.0
"""Pre-trained CIFAR-10 ResNets made elastic in one line: without training, and after one epoch.

    python -m benchmarks.compress [--networks resnet20] [--seeds 3] [--parts untrained epoch]
    python -m benchmarks.compress --report

"untrained": every inner group of channels at .75 and .5 of its width, sorted by the L1 or L2 norm
of what reads the channel or left as it is, statistics renewed on 2,048 training images that are
cropped and mirrored as the training's were; accuracy of 2,000 test images, and that of the whole.

"epoch": one epoch of `SubnetSampling` on 10,000 training images for blocks that may be skipped, and
for blocks and widths; then a search of 60 validations on 1,000 test images against MACs, of which
the best subnets within 50 % and 75 % of the MACs are judged on the other 1,000. Beside it a network
whose channels are cut to these MACs by their L1 norms and that is then fine-tuned alone: for as
many steps, and for as many passes as the super-network had (four to a step). A row is written as
soon as it is measured, and is not measured again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from typing import Any

import lightning as L
import pandas as pd
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.data import RESULTS, ROOT, data_folder
from benchmarks.search_efficiency import commit, write
from benchmarks.training import QUIET
from lightning_subnet import Subnet, SubnetSampling, SubnetSearch, elasticize, extract, recalibrate
from lightning_subnet._torch.macs import count_macs

WIDTHS, DIVISOR = (0.25, 0.5, 0.75, 1), 4
SHARES = (0.75, 0.5)
CALIBRATION, BUDGET = 2048, 60
KEYS = ["network", "part", "method", "share", "seed"]
OUT = RESULTS / "compress.csv"


def example() -> Any:
    """Return the module with network and data, examples/bring_your_own.py."""
    os.environ.setdefault("LIGHTNING_SUBNET_DATA", str(data_folder()))
    sys.path.insert(0, str(ROOT / "examples"))
    import bring_your_own

    return bring_your_own


def elastic_net(name: str, **options: Any) -> Any:
    net = example().pretrained(data_folder(), int(name.removeprefix("resnet"))).eval()
    options = {"widths": WIDTHS, "divisor": DIVISOR} | options
    return elasticize(net, torch.randn(2, 3, 32, 32), **options)


class Images(L.LightningDataModule):
    """Cropped and mirrored training images; half of the test images validate, half test."""

    def __init__(self) -> None:
        super().__init__()
        data = example().Cifar10(2000, data_folder())
        data.setup("fit")
        self.train = data.train
        x, y = data.val.tensors
        self.all = TensorDataset(x, y)
        self.val, self.test = TensorDataset(x[::2], y[::2]), TensorDataset(x[1::2], y[1::2])

    def train_dataloader(self) -> DataLoader:
        collate = example().as_trained
        return DataLoader(self.train, batch_size=128, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=250)


def renew(net: Any, data: Images, seed: int) -> None:
    """Renew the running statistics on augmented training images, the same for all networks."""
    torch.manual_seed(seed)
    recalibrate(net, (x for x, _ in data.train_dataloader()), max_images=CALIBRATION)


def accuracy(net: Any, images: TensorDataset) -> float:
    return example().accuracy(net, DataLoader(images, batch_size=250))


def at_width(net: Any, share: float) -> Subnet:
    """Return the subnet that has a share of the units of each group, and all blocks."""
    space = net.search_space()
    return space.subnet(
        {
            name: min(values, key=lambda v, top=values[-1]: abs(v - share * top))
            for name, values in space.values.items()
        }
    )


def untrained(name: str, seed: int, data: Images) -> None:
    net = example().pretrained(data_folder(), int(name.removeprefix("resnet")))
    save(name, "untrained", "own statistics", 1.0, seed, accuracy(net, data.all), 1.0)
    for method, importance in (("l1", "l1"), ("l2", "l2"), ("unsorted", None)):
        net = elastic_net(name, depth=False, importance=importance)
        whole = count_macs(extract(net, net.search_space().largest), torch.zeros(1, 3, 32, 32))
        for share in (1.0, *SHARES):
            plain = extract(net, at_width(net, share))
            renew(plain, data, seed)
            macs = count_macs(plain, torch.zeros(1, 3, 32, 32)) / whole
            save(name, "untrained", method, share, seed, accuracy(plain, data.all), macs)


def epoch(name: str, seed: int, data: Images) -> None:
    for method, options in (("depth", {"widths": (1,)}), ("width and depth", {})):
        if has(name, "epoch", method, SHARES[-1], seed):
            continue
        net = elastic_net(name, **options)
        L.seed_everything(seed, verbose=False)
        model = example().LitClassifier(net)
        sampling = SubnetSampling("sandwich", n_random=2, distill=True, label_weight=1, seed=seed)
        L.Trainer(max_epochs=1, limit_val_batches=0, callbacks=[sampling], **QUIET).fit(model, data)
        search = SubnetSearch(
            objectives={"val_acc": "max", "macs": "min"}, budget=BUDGET, seed=seed,
            calibration_images=1024, verify_front=False, trainer=L.Trainer(**QUIET),
        )  # fmt: skip
        model.example_input_array = torch.zeros(1, 3, 32, 32)
        result = search.fit(model, data, progress=False)
        whole = max(e.values["macs"] for e in result.history)
        for share in SHARES:
            best = result.best("val_acc", where={"macs": f"<= {share:.0%}"})
            plain = extract(net, best.subnet)
            renew(plain, data, seed)
            macs = best.values["macs"] / whole
            save(name, "epoch", method, share, seed, accuracy(plain, data.test), macs)
    for share in SHARES:
        net = elastic_net(
            name, widths=[i / 16 for i in range(1, 17)], divisor=1, depth=False, importance="l1"
        )
        subnet = of_macs(net, share)
        for method, epochs in (("L1, as many steps", 1), ("L1, as many passes", 4)):
            if has(name, "epoch", method, share, seed):
                continue
            L.seed_everything(seed, verbose=False)
            plain = extract(net, subnet)
            model = example().LitClassifier(plain)
            L.Trainer(max_epochs=epochs, limit_val_batches=0, **QUIET).fit(model, data)
            renew(plain, data, seed)
            whole = count_macs(extract(net, net.search_space().largest), torch.zeros(1, 3, 32, 32))
            macs = count_macs(plain, torch.zeros(1, 3, 32, 32)) / whole
            save(name, "epoch", method, share, seed, accuracy(plain, data.test), macs)


def of_macs(net: Any, share: float) -> Subnet:
    """Return the widest subnet of one share of all widths that has a share of the MACs at most."""
    x = torch.zeros(1, 3, 32, 32)
    whole = count_macs(extract(net, net.search_space().largest), x)
    subnets = [at_width(net, i / 16) for i in range(1, 17)]
    return [s for s in subnets if count_macs(extract(net, s), x) <= share * whole][-1]


def has(*key: Any) -> bool:
    if not OUT.exists():
        return False
    frame = pd.read_csv(OUT, dtype=str)
    return bool((frame[KEYS] == [str(k) for k in key]).all(axis=1).any())


def save(
    name: str, part: str, method: str, share: float, seed: int, acc: float, macs: float
) -> None:
    row = dict(zip(KEYS, (name, part, method, share, seed), strict=True))
    row |= {"accuracy": f"{acc:.4f}", "macs": f"{macs:.4f}", "commit": commit()}
    write(OUT, pd.DataFrame([row]), KEYS)
    print(row, flush=True)


def report() -> None:
    """Print means, and the range of the seeds."""
    frame = pd.read_csv(OUT)
    table = frame.groupby(KEYS[:-1], sort=False)[["accuracy", "macs"]].agg(["mean", "min", "max"])
    print(table.round(4).drop(columns=[("macs", "min"), ("macs", "max")]).to_string())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--parts", nargs="+", default=["untrained", "epoch"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="print what there is")
    args = parser.parse_args()
    if not args.report:
        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        data = Images()
        for name in args.networks:
            for seed in range(args.seeds):
                if "untrained" in args.parts and not has(name, "untrained", "unsorted", 0.5, seed):
                    untrained(name, seed, data)
                if "epoch" in args.parts:
                    epoch(name, seed, data)
    report()


if __name__ == "__main__":
    main()
