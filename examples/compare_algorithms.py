# SPDX-License-Identifier: Apache-2.0
"""Compare search strategies, one of them your own, on an elastic network trained on digits.

No subnet is validated twice: runs share values, and each counts in every run. Everything is written
to demo_output/; a second call goes on where the first one stopped.
"""

import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

from lightning_subnet import Choice, SearchSpace, SubnetMixin, SubnetSampling, SubnetSearch, compare
from lightning_subnet.elasticity import ElasticLinear
from lightning_subnet.strategies import NSGA2, Strategy, fill

EPOCHS, SEEDS, BUDGET = 100, 10, 100
WIDTHS, DEPTHS = [4, 6, 8, 12, 16, 24, 32, 48, 64], [1, 2, 3, 4]


class ElasticMlp(SubnetMixin, L.LightningModule):  # 7,380 subnets of up to four hidden layers
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.ModuleList(ElasticLinear(64, 64) for _ in DEPTHS)
        self.last, self.depth = ElasticLinear(64, 10), 4

    def search_space(self):
        widths = {f"width.{i}": Choice(WIDTHS, when={"depth": DEPTHS[i:]}) for i in range(1, 4)}
        return SearchSpace({"depth": DEPTHS, "width.0": WIDTHS, **widths})

    def activate(self, subnet):
        self.depth = subnet["depth"]
        for layer, width in zip(self.hidden, subnet.grouped()["width"], strict=True):
            layer.active_out = width

    def forward(self, x):
        for layer in self.hidden[: self.depth]:
            x = layer(x).relu()
        return self.last(x)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


class Neighbours(Strategy):  # your own strategy: after 20 draws, one choice away from the front
    name, batch_size = "neighbours", 10

    def propose(self, problem, history, n, rng, pending=()):
        space, front = problem.space, problem.front(history)

        def draw(k, rng):
            if len(history) < 20:
                return space.sample_indices(k, rng)
            near = space.neighbours(front[rng.integers(len(front))].subnet)
            return space.indices([near[i] for i in rng.permutation(len(near))[:2]])

        return fill(problem, history, pending, n, rng, draw)  # new, distinct, feasible


digits = load_digits()  # 1,797 scans of 8 x 8 pixels: 1,078 to train on, 719 to validate on
x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
parts = train_test_split(range(len(y)), test_size=0.4, random_state=0, stratify=y)
data = L.LightningDataModule.from_datasets(
    *(TensorDataset(x[rows], y[rows]) for rows in parts), batch_size=128
)
(output := Path("demo_output")).mkdir(exist_ok=True)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|pin_memory).*")
torch.set_num_threads(1)  # so small a network gains nothing from more
L.seed_everything(0, verbose=False)
model = ElasticMlp()
if (output / "mlp.pt").exists():
    model.load_state_dict(torch.load(output / "mlp.pt"))
else:
    trainer = L.Trainer(
        max_epochs=EPOCHS, limit_val_batches=0, accelerator="cpu", logger=False,
        callbacks=[SubnetSampling("sandwich")], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(model, data)
    torch.save(model.state_dict(), output / "mlp.pt")

search = SubnetSearch(objectives={"val_acc": "max", "macs": "min"}, storage=None, name="mlp")
table = compare(
    ["random", NSGA2(population=20), "hybrid", Neighbours()], search, model=model, datamodule=data,
    seeds=range(SEEDS), budget=BUDGET, storage=f"sqlite:///{output}/compare.db",
    bounds={"val_acc": (1.0, 0.5), "macs": (0, 17_024)},  # best and worst: the unit square
)  # fmt: skip
target = f"random@{BUDGET}"  # the median of random search in the end
print(table.summary().to_string())
print(f"\nEvaluations to {target}\n{table.evaluations_to(target).to_string()}")
print(f"\nAhead of random, seed by seed\n{table.paired('random').to_string(index=False)}")
table.plot_hypervolume()[0].savefig(output / "compare_curves.png", dpi=120)
figure, axes = table.plot_attainment()
axes.set(xscale="log", ylim=(0.6, 1.0))
figure.savefig(output / "compare_attainment.png", dpi=120)
print(f"\nWrote compare_curves.png and compare_attainment.png into {output}/.")
