# SPDX-License-Identifier: Apache-2.0
"""One super-network, two hardware settings, two fronts, and each front measured under the other.

Everything is written to demo_output/; a second run goes on where the first one stopped. `--smoke`
is a short run of the same, into demo_output/smoke, whose figures mean nothing.
"""

import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import Latency, SubnetSampling, SubnetSearch
from lightning_subnet.supernets import ElasticMobileNetV3

SMOKE = "--smoke" in sys.argv[1:]
EPOCHS, SEEDS, BUDGET, SECONDS, DRAWS = (1, 2, 6, 0.01, 10) if SMOKE else (30, 3, 36, 0.2, 200)
FLOOR = 0.5 if SMOKE else 0.95  # accuracies below it are of no use, and count nothing


class LitDigits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = ElasticMobileNetV3.tiny(n_classes=10, dropout=0.0)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-2, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


digits = load_digits()  # 1,797 scans of 8 x 8 pixels: 1,078 to train on, 719 to validate on
x, y = torch.tensor(digits.images[:, None] / 16 - 0.5).float(), torch.tensor(digits.target)
parts = train_test_split(range(len(y)), test_size=0.4, random_state=0, stratify=y)
train, val = (TensorDataset(x[rows], y[rows]) for rows in parts)
loaders = DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=256)

output = Path("demo_output/smoke" if SMOKE else "demo_output")
output.mkdir(parents=True, exist_ok=True)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
torch.set_num_threads(1)  # so small a network gains nothing from more
L.seed_everything(0, verbose=False)
model = LitDigits()
if (output / "supernet.pt").exists():  # that of digits_search.py is the same
    model.load_state_dict(torch.load(output / "supernet.pt"))
else:
    trainer = L.Trainer(
        max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS, accelerator="cpu",
        callbacks=[SubnetSampling("sandwich", distill=True)], enable_checkpointing=False,
        logger=False,
    )  # fmt: skip
    trainer.fit(model, *loaders)
    torch.save(model.state_dict(), output / "supernet.pt")

# One sample in eager torch is all overhead, so operators count; a batch in a compiled runtime is
# arithmetic, so multiply-accumulates count. One thread each: two would wait for each other, which
# on a shared machine says more about its other users than about the subnet.
runtime = "onnxruntime" if find_spec("onnx") and find_spec("onnxruntime") else "eager"
if runtime == "eager":
    print("ONNX Runtime is not installed (lightning-subnet[onnx]), so both settings are eager.")
settings = {
    "eager batch 1": Latency(seconds=SECONDS),
    f"{runtime} batch 64": Latency(batch_size=64, runtime=runtime, seconds=SECONDS),
}
# `specialise` would do this in one call, but starts each search from the fronts of those before,
# which helps the later ones: here they are compared, so each has its budget for itself.
results = [
    {
        label: SubnetSearch(
            objectives={"val_acc": "max", "latency_ms": "min"}, measures=[latency],
            budget=BUDGET, seed=seed, name=f"{label}/{seed}",
            storage=f"sqlite:///{output}/hardware.db",  # shared: no subnet is validated twice
            verify_front=False,  # all fronts are measured anew below
        ).fit(model, dataloaders=loaders[1], train_dataloaders=loaders[0])
        for label, latency in settings.items()
    }
    for seed in range(SEEDS)
]  # fmt: skip

# Whatever is on a front is timed anew, once under either setting: a front was chosen by its own
# times, the lucky ones among them, and is now judged by others.
net, image = model.net, val.tensors[0][:1]
union = list({e.subnet: None for one in results for result in one.values() for e in result.front})
times, whole = {}, {}
for on, latency in settings.items():
    measure = latency.bind(net, image)
    ((whole[on], _),) = measure([net.search_space().largest])
    times[on] = dict(zip(union, measure(union), strict=True))


def volume(result, on, latencies):
    """Return the share of the square [FLOOR, 1] x [0, time of the largest subnet] it dominates."""
    there = result.remeasure(latencies, name="latency_ms")
    return there.hypervolume({"val_acc": FLOOR, "latency_ms": whole[on]}) / (1 - FLOOR) / whole[on]


def slower(result, other):
    """Return the share of time that the other front takes more, at the accuracies of this one."""

    def time(front, least):
        fast = [e.values["latency_ms"] for e in front if e.values["val_acc"] >= least]
        return min(fast, default=np.inf)

    levels = {e.values["val_acc"] for e in result.front if e.values["val_acc"] >= FLOOR}
    ratios = [time(other.front, level) / time(result.front, level) for level in levels]
    return np.median(ratios) - 1 if ratios else np.nan


rng = np.random.default_rng(0)
print(
    f"\nShare of the square: accuracy {FLOOR} to 1, latency 0 to that of the largest subnet\n"
    f"(mean and range of {SEEDS} seeds)\n\n{'front of':24}"
    + "".join(f"{'under ' + on:>28}" for on in settings)
)
for of in settings:
    cells = [[volume(one[of], on, times[on]) for one in results] for on in settings]
    print(f"{of:24}" + "".join(f"{np.mean(c):14.3f} ({min(c):.3f}-{max(c):.3f})" for c in cells))
print()
for on, of in zip(settings, reversed(settings), strict=True):
    losses = []
    for draw in range(DRAWS + 1):  # the values as they are, and then as their errors allow
        latencies = {
            subnet: (value + (draw > 0) * error * rng.standard_normal(), error)
            for subnet, (value, error) in times[on].items()
        }
        here, there = ([volume(one[k], on, latencies) for one in results] for k in (on, of))
        losses.append(np.subtract(here, there))
    low, high = np.percentile(np.mean(losses[1:], axis=1), [2.5, 97.5])
    ahead = int((losses[0] > 0).sum())
    more = [
        slower(*(one[k].remeasure(times[on], name="latency_ms") for k in (on, of)))
        for one in results
    ]
    verdict = "specialising pays" if ahead == SEEDS and low > 0 else "no difference is shown"
    print(
        f"Under {on}, the front of {of} loses {np.mean(losses[0]):.3f} of the square\n"
        f"  ({low:.3f} to {high:.3f} by the errors of the times; in {ahead} of {SEEDS} seeds)"
        f"\n  and takes {100 * np.median(more):+.0f} % time at equal accuracy "
        f"({100 * min(more):+.0f} to {100 * max(more):+.0f} % by seed): {verdict}."
    )

print(f"\n{'mean of the front of':24}{'blocks':>8}{'expansion':>11}{'kernel':>8}")
for of in settings:
    chosen = [e.subnet.grouped() for one in results for e in one[of].front]
    blocks = np.mean([sum(g["d"]) for g in chosen])
    rest = [np.mean([np.mean(g[name]) for g in chosen]) for name in ("e", "ks")]
    print(f"{of:24}{blocks:8.2f}{rest[0]:11.2f}{rest[1]:8.2f}")

FigureCanvasAgg(figure := Figure(figsize=(10, 4.2), layout="constrained"))
for axes, on in zip(figure.subplots(1, 2, sharey=True), settings, strict=True):
    for of, colour, marker in zip(settings, ("#0072B2", "#D55E00"), "os", strict=True):
        for seed, one in enumerate(results):
            front = one[of].remeasure(times[on], name="latency_ms").front
            points = sorted((e.values["latency_ms"], e.values["val_acc"]) for e in front)
            axes.step(
                *zip(*points, strict=True), where="post", color=colour, marker=marker,
                markersize=4, alpha=0.7, label=None if seed else f"front of {of}",
            )  # fmt: skip
    axes.set(title=f"measured: {on}", xlabel="latency_ms (less is better)")
    axes.grid(alpha=0.3)
axes.legend(loc="lower right")
figure.axes[0].set_ylabel("val_acc (more is better)")
figure.savefig(output / "hardware_fronts.png", dpi=120)
print(f"\nWrote hardware_fronts.png into {output}/.")
if SMOKE:
    print("This was a smoke run: its figures mean nothing.")
