# SPDX-License-Identifier: Apache-2.0
"""Make a pre-trained network elastic in one line, train an epoch, search it, and ship a file.

    python examples/compress_pretrained.py [--layers 20] [--budget 60] [--images 1000] [--smoke]

A CIFAR-10 ResNet-20 that nobody prepared: `elasticize` finds which channels belong together and
which blocks may be skipped. One epoch of sandwich sampling on 10,000 training images trains narrow
subnets beside the whole network; all learn the outputs of the network as it came. The search then
weighs accuracy against the latency of the file in ONNX Runtime, and the fastest subnet that loses
at most a point of accuracy is written as an ONNX file. Weights and images come from the folder that
LIGHTNING_SUBNET_DATA names; everything is written to compress_output/.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from bring_your_own import DATA, Cifar10, LitClassifier, accuracy, pretrained

from lightning_subnet import Latency, SubnetSampling, SubnetSearch, elasticize
from lightning_subnet.export import export

WHOLE = {"budget": 60, "images": 1000, "timed": 4, "seconds": 0.5, "train_every": 1,
         "calibration": 1024}  # fmt: skip
SMOKE = {"budget": 8, "images": 100, "timed": 1, "seconds": 0.05, "train_every": 40,
         "calibration": 128}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, choices=(20, 56), default=20)
    parser.add_argument("--budget", type=int, help="evaluations (60)")
    parser.add_argument("--images", type=int, help="validated per subnet (1000)")
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
    output = Path("compress_output")
    output.mkdir(exist_ok=True)
    data = Cifar10(size["images"], train_every=size["train_every"])

    net = elasticize(pretrained(layers=args.layers), torch.randn(2, 3, 32, 32), divisor=4)
    print(net.elastic_report)

    model = LitClassifier(net)
    model.example_input_array = torch.zeros(1, 3, 32, 32)
    sampling = SubnetSampling("sandwich", n_random=2, distill=pretrained(layers=args.layers))
    trainer = L.Trainer(
        max_epochs=1, limit_val_batches=0, accelerator="cpu", logger=False, callbacks=[sampling],
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)

    search = SubnetSearch(
        objectives={"val_acc": "max", "latency_ms": "min"},
        measures=[Latency(size["timed"], seconds=size["seconds"], runtime="onnxruntime")],
        budget=size["budget"],
        calibration_images=size["calibration"],
    )
    result = search.fit(model, data)
    print(result)

    whole = next(e for e in result.history if e.subnet == net.search_space().largest)
    enough = whole.values["val_acc"] - 0.01
    winner = result.best("latency_ms", where={"val_acc": f">= {enough:.4f}"})
    small = result.extract(winner)
    data.setup("fit")
    print(f"Of {len(data.test)} images that the search did not see:")
    for label, e, plain in (
        ("the whole network", whole, result.extract(whole)),
        ("the winner", winner, small),
    ):
        path = output / f"{label.split()[-1]}.onnx"
        export(plain, path, torch.zeros(1, 3, 32, 32))
        right = accuracy(plain, data.test_dataloader())
        print(f"  {label}: {right:.1%}, {e.values['latency_ms']:.2f} ms, "
              f"{path.stat().st_size / 1e6:.2f} MB")  # fmt: skip
    figure, ax = result.plot()
    ax.set_title(f"Pre-trained ResNet-{args.layers}, made elastic: {ax.get_title()}", fontsize=11)
    figure.savefig(output / "front.png", dpi=120)
    result.save(output / "result.json")
    print(f"Wrote network.onnx, winner.onnx, front.png and result.json into {output}/.")


if __name__ == "__main__":
    main()
