# SPDX-License-Identifier: Apache-2.0
"""Train a small BERT of transformers with dict batches, make it elastic, search it, and save it.

    python examples/transformers_bert.py [--smoke]

A `BertForMaskedLM` learns to fill in characters of Shakespeare, is made elastic in one line (heads,
feed-forward widths and layers), and trained a little more as a super-network. The search weighs its
loss against MACs, and what comes out is a `BertForMaskedLM` with smaller layers. The text comes
from the folder that LIGHTNING_SUBNET_DATA names; everything is written to bert_output/. Needs
transformers, which this package does not install.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

from lightning_subnet import SubnetSampling, SubnetSearch, elasticize

TEXT = Path(os.environ.get("LIGHTNING_SUBNET_DATA", "../shared/data")) / "tinyshakespeare.txt"
LENGTH, MASKED = 64, 0.15
WHOLE = {"steps": 600, "elastic": 300, "windows": 256, "budget": 40}
SMOKE = {"steps": 4, "elastic": 3, "windows": 32, "budget": 8}


class LitBert(L.LightningModule):
    """An ordinary LightningModule around a model that takes keyword arguments."""

    def __init__(self, net: BertForMaskedLM, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.net(**batch)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self(**batch).loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.log("val_loss", self(**batch).loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.01)


class Masked:
    """Makes batches of windows in which some characters are masked, always alike in validation.

    Args:
        vocab: Number of characters; the mask is the token after the last.
        seed: None draws anew each time.
    """

    def __init__(self, vocab: int, seed: int | None = None) -> None:
        self.vocab, self.seed = vocab, seed

    def __call__(self, windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = torch.stack(windows)
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        masked = torch.rand(tokens.shape, generator=generator) < MASKED
        return {
            "input_ids": tokens.masked_fill(masked, self.vocab),
            "attention_mask": torch.ones_like(tokens),
            "labels": tokens.masked_fill(~masked, -100),
        }


def characters(windows: int) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Return windows of nine tenths of the text, some of the last tenth, and the vocabulary."""
    text = TEXT.read_text()
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([letters[letter] for letter in text])
    cut = len(tokens) * 9 // 10
    train = list(tokens[:cut].unfold(0, LENGTH, LENGTH // 2))
    spread = list(tokens[cut:].unfold(0, LENGTH, LENGTH))
    return train, spread[:: len(spread) // windows][:windows], len(letters)


def trainer(steps: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_steps=steps, limit_val_batches=0, accelerator="cpu", logger=False,
        callbacks=list(callbacks), enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a minute instead of ten")
    size = SMOKE if parser.parse_args().smoke else WHOLE
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`).*")
    if not TEXT.is_file():
        raise SystemExit(f"There is no {TEXT}: set LIGHTNING_SUBNET_DATA. Nothing was done.")
    L.seed_everything(0, verbose=False)
    output = Path("bert_output")
    output.mkdir(exist_ok=True)

    windows, held_out, vocab = characters(size["windows"])
    train = DataLoader(windows, 64, shuffle=True, collate_fn=Masked(vocab), drop_last=True)
    val = DataLoader(held_out, 64, collate_fn=Masked(vocab, seed=0))
    net = BertForMaskedLM(
        BertConfig(vocab_size=vocab + 1, hidden_size=128, num_hidden_layers=4,
                   num_attention_heads=4, intermediate_size=512, max_position_embeddings=LENGTH)
    )  # fmt: skip
    trainer(size["steps"]).fit(LitBert(net, 1e-3), train)

    example = next(iter(val))
    net = elasticize(net, {"input_ids": example["input_ids"][:2]})
    print(net.elastic_report)
    model = LitBert(net, 3e-4)
    sampling = SubnetSampling("sandwich", n_random=2)
    trainer(size["elastic"], sampling).fit(model, train)

    search = SubnetSearch(objectives={"val_loss": "min", "macs": "min"}, budget=size["budget"])
    result = search.fit(model, dataloaders=val, train_dataloaders=train)
    print(result)
    whole = next(e for e in result.history if e.subnet == net.search_space().largest)
    winner = result.best("val_loss", where={"macs": "<= 50%"})
    for label, e in (("The whole network", whole), ("Best within half of its MACs", winner)):
        small = result.extract(e)
        n = sum(p.numel() for p in small.parameters())
        print(f"{label}: loss {e.values['val_loss']:.3f}, {n / 1e6:.2f} M parameters, "
              f"{len(small.bert.encoder.layer)} layers, a {type(small).__name__}")  # fmt: skip
    torch.save(small.state_dict(), output / "winner.pt")
    result.save(output / "result.json")
    print(f"Wrote winner.pt and result.json into {output}/.")


if __name__ == "__main__":
    main()
