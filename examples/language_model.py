# SPDX-License-Identifier: Apache-2.0
"""Train an elastic GPT on the characters of Shakespeare, and search perplexity against MACs.

    python examples/language_model.py [--smoke]

The text comes from the folder that LIGHTNING_SUBNET_DATA names; nine tenths train, and perplexity
(per character) is that of 256 windows of 64 characters, spread over the last tenth. MACs are exact
and looked up, for one window. Everything is written to language_output/.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from lightning_subnet import SubnetSampling, SubnetSearch
from lightning_subnet.supernets import ElasticGPT

TEXT = Path(os.environ.get("LIGHTNING_SUBNET_DATA", "../shared/data")) / "tinyshakespeare.txt"
CONTEXT = 64
WHOLE = {"steps": 900, "windows": 256, "budget": 80}
SMOKE = {"steps": 6, "windows": 16, "budget": 13}


class LitGPT(L.LightningModule):
    def __init__(self, net: ElasticGPT) -> None:
        super().__init__()
        self.net, self.losses = net, []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.net(tokens).flatten(0, 1)  # (characters, vocab)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[:, :-1]), batch[:, 1:].flatten())

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.losses.append(F.cross_entropy(self(batch[:, :-1]), batch[:, 1:].flatten()).item())

    def on_validation_epoch_end(self) -> None:
        losses, self.losses = self.losses, []
        self.log("perplexity", math.exp(sum(losses) / len(losses)))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 5e-3, total_steps=steps, pct_start=0.2
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def windows(text: torch.Tensor, starts: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(torch.stack([text[s : s + CONTEXT + 1] for s in starts.tolist()]).split(size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    size = SMOKE if parser.parse_args().smoke else WHOLE
    if not TEXT.is_file():
        raise SystemExit(f"There is no {TEXT}: set LIGHTNING_SUBNET_DATA. Nothing was done.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`).*")
    (output := Path("language_output")).mkdir(exist_ok=True)
    L.seed_everything(0, verbose=False)

    characters = TEXT.read_text()
    alphabet = sorted(set(characters))
    number = {c: i for i, c in enumerate(alphabet)}
    text = torch.tensor([number[c] for c in characters])
    train, val = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    starts = torch.randint(len(train) - CONTEXT - 1, (64 * size["steps"],))
    spread = torch.linspace(0, len(val) - CONTEXT - 1, size["windows"]).long()
    loaders = (
        DataLoader(windows(train, starts, 64), batch_size=None),
        DataLoader(windows(val, spread, 64), batch_size=None),
    )
    net = ElasticGPT.tiny(vocab=len(alphabet), context=CONTEXT)
    model = LitGPT(net)
    if (output / "supernet.pt").exists():
        model.load_state_dict(torch.load(output / "supernet.pt"))
    else:
        print(f"Training {net.search_space()}")
        trainer = L.Trainer(
            max_epochs=1, limit_val_batches=0, accelerator="cpu", gradient_clip_val=1.0,
            # Not distill=True: in so short a training the teacher knows too little to teach.
            callbacks=[SubnetSampling("sandwich", n_random=1)],
            logger=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, loaders[0])
        torch.save(model.state_dict(), output / "supernet.pt")

    search = SubnetSearch(
        objectives={"perplexity": "min", "macs": "min"}, budget=size["budget"],
        storage=f"sqlite:///{output}/search.db", name="shakespeare",
    )  # fmt: skip
    result = search.fit(model, dataloaders=loaders[1])  # LayerNorm: nothing to recalibrate
    print(result)
    whole = result.history[0]
    best = result.best("perplexity", where={"macs": "<= 50%"})
    for label, e in (("Largest subnet", whole), ("Best within half of its MACs", best)):
        print(f"{label}: perplexity {e.values['perplexity']:.2f}, {e.values['macs'] / 1e6:.1f} M")
    plain = result.extract(best)  # an ordinary network
    prompt = torch.tensor([[number[c] for c in "ROMEO:"]])
    tokens = plain.generate(
        prompt, CONTEXT - 6, temperature=0.7, generator=torch.Generator().manual_seed(0)
    )
    print("ROMEO:" + "".join(alphabet[i] for i in tokens[0]))
    figure, ax = result.plot("macs", "perplexity")
    ax.set_title(f"Elastic GPT on Shakespeare: {ax.get_title()}", fontsize=11)
    figure.savefig(output / "front.png", dpi=120)
    result.save(output / "result.json")
    print(f"Wrote {output}/front.png and {output}/result.json.")


if __name__ == "__main__":
    main()
