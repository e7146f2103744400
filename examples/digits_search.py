# SPDX-License-Identifier: Apache-2.0
"""Train an elastic MobileNetV3 on handwritten digits, search it, take the chosen subnet out.

Everything is written to demo_output/; a second run goes on where the first one stopped.
"""

import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import Latency, SubnetSampling, SubnetSearch
from lightning_subnet.supernets import ElasticMobileNetV3


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

(output := Path("demo_output")).mkdir(exist_ok=True)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
torch.set_num_threads(1)  # so small a network gains nothing from more
L.seed_everything(0, verbose=False)
model = LitDigits()
if (output / "supernet.pt").exists():
    model.load_state_dict(torch.load(output / "supernet.pt"))
else:
    print(f"Training {model.net.search_space()}")
    trainer = L.Trainer(
        max_epochs=16, check_val_every_n_epoch=16, accelerator="cpu", logger=False,
        callbacks=[SubnetSampling("sandwich", distill=True)], enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, *loaders)
    torch.save(model.state_dict(), output / "supernet.pt")

# Latency is of eager torch; runtime="compile", "onnxruntime" or "openvino" times what ships there.
search = SubnetSearch(
    objectives={"val_acc": "max", "latency_ms": "min", "macs": "min"},
    measures=[Latency(batch_size=64, seconds=1)], budget=72,
    storage=f"sqlite:///{output}/search.db", name="digits",
)  # fmt: skip
# BatchNorm is recalibrated for each subnet on what the training saw, here the images as they are.
result = search.fit(model, dataloaders=loaders[1], train_dataloaders=loaders[0])
best = result.best("val_acc", where={"latency_ms": "<= 60%"})
net = result.extract(best)  # an ordinary nn.Module, with no trace of elasticity
right = (net(val.tensors[0]).argmax(1) == val.tensors[1]).float().mean()
torch.save(net, output / "best.pt")
result.save(output / "result.json")
figure, axes = result.plot("latency_ms", "val_acc")
axes.set_title(f"Elastic MobileNetV3 on digits: {axes.get_title()}")
figure.savefig(output / "front.png", dpi=120)
print(result, f"\n\nLargest subnet: {result.history[0]}\nBest in 60 % of its time: {best}")
print(f"Extracted: accuracy {right:.4f}, outputs differ by at most {net.parity:.1e}, {net.sliced=}")
print(f"Wrote best.pt, front.png and result.json into {output}/.")
