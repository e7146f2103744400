# SPDX-License-Identifier: Apache-2.0
"""Train HAT's elastic Transformer on English-German captions, and search BLEU against latency.

    python examples/translate.py [--smoke]

Multi30k comes from the folder that LIGHTNING_SUBNET_DATA names; `pip install
'lightning-subnet[text]'` brings sacrebleu and sentencepiece. A search validates every subnet, so
BLEU is that of greedy decoding on the first 200 of the 1,014 validation sentences; the chosen
subnet is then tested with a beam on the 1,000 test sentences. Latency is that of one sentence:
the encoder and 20 decoder steps. Everything is written to translate_output/.
"""

from __future__ import annotations

import argparse
import gzip
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_subnet import Latency, SubnetSampling, SubnetSearch
from lightning_subnet.supernets import ElasticDecoding, ElasticTransformer

DATA = Path(os.environ.get("LIGHTNING_SUBNET_DATA", "../shared/data")) / "multi30k"
WHOLE = {"pairs": 29_000, "vocab": 2000, "epochs": 5, "val": 200, "test": 1000, "budget": 60,
         "timed_steps": 20, "seconds": 0.5}  # fmt: skip
SMOKE = {"pairs": 500, "vocab": 300, "epochs": 1, "val": 20, "test": 20, "budget": 13,
         "timed_steps": 5, "seconds": 0.02}  # fmt: skip
STEPS = 40  # the most tokens of a translation
Pairs = tuple[list[str], list[str]]


def read(name: str, n: int) -> Pairs:
    files = (DATA / f"{name}.{language}.gz" for language in ("en", "de"))
    source, target = (gzip.decompress(f.read_bytes()).decode().splitlines()[:n] for f in files)
    return source, target


class Words:
    """Byte-pair encoding that both languages share: pad 0, begin 1, end 2, unknown 3."""

    def __init__(self, texts: list[str], vocab: int) -> None:
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab, model_type="bpe",
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, num_threads=1, minloglevel=2,
        )  # fmt: skip
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    def batches(self, pairs: Pairs, size: int) -> list[tuple[torch.Tensor, ...]]:
        """Batches of sentences of like lengths: source, target, and which sentences they are."""
        rows = [
            (torch.tensor([*self.model.encode(s), 2]), torch.tensor([1, *self.model.encode(t), 2]))
            for s, t in zip(*pairs, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), len(rows[i][1])))
        batches = []
        for start in range(0, len(order), size):
            at = order[start : start + size]
            source, target = (
                pad_sequence([rows[i][j] for i in at], batch_first=True)[:, :100] for j in (0, 1)
            )
            batches.append((source, target, torch.tensor(at)))
        return batches

    def text(self, tokens: torch.Tensor) -> list[str]:
        rows = [[t for t in row if t > 2] for row in tokens.tolist()]
        return self.model.decode(rows)


class LitTranslator(L.LightningModule):
    def __init__(self, net: ElasticTransformer, words: Words, references: list[str]) -> None:
        super().__init__()
        self.net, self.words, self.references = net, words, references
        self.said: dict[int, str] = {}

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.net(source, target[:, :-1])[target[:, 1:] != 0]  # (tokens, vocab)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        source, target, _ = batch
        wanted = target[:, 1:]
        return F.cross_entropy(self(source, target), wanted[wanted != 0], label_smoothing=0.1)

    def validation_step(self, batch: Any, _: int) -> None:
        source, _, at = batch
        texts = self.words.text(self.net.generate(source, STEPS))
        self.said |= dict(zip(at.tolist(), texts, strict=True))

    def on_validation_epoch_end(self) -> None:
        rows, said = sorted(self.said), self.said
        self.said = {}
        self.log("val_bleu", bleu([said[i] for i in rows], [self.references[i] for i in rows]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 4e-3, total_steps=steps, pct_start=0.2
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def bleu(texts: list[str], references: list[str]) -> float:
    import sacrebleu

    return float(sacrebleu.corpus_bleu(texts, [references]).score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a minute instead of a quarter hour")
    size = SMOKE if parser.parse_args().smoke else WHOLE
    if not DATA.is_dir():
        raise SystemExit(f"There is no {DATA}: set LIGHTNING_SUBNET_DATA. Nothing was done.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`).*")
    (output := Path("translate_output")).mkdir(exist_ok=True)
    L.seed_everything(0, verbose=False)

    train, val = read("train", size["pairs"]), read("val", size["val"])
    words = Words([*train[0], *train[1]], size["vocab"])
    net = ElasticTransformer.small(
        vocab=size["vocab"], enc_depths=(2,), attend=(1, 2), source_length=17, target_length=18
    )
    model = LitTranslator(net, words, val[1])
    loaders = (
        DataLoader(words.batches(train, 128), batch_size=None, shuffle=True),
        DataLoader(words.batches(val, 100), batch_size=None),
    )
    trainer = L.Trainer(
        max_epochs=size["epochs"], limit_val_batches=0, accelerator="cpu", gradient_clip_val=1.0,
        # Not distill=True: in so short a training the teacher knows too little to teach.
        callbacks=[SubnetSampling("sandwich", n_random=1)],
        logger=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    if (output / "supernet.pt").exists():
        model.load_state_dict(torch.load(output / "supernet.pt"))
    else:
        print(f"Training {net.search_space()}")
        trainer.fit(model, loaders[0])
        torch.save(model.state_dict(), output / "supernet.pt")

    # Timed is the network as it is used: the encoder once, then steps of the decoder.
    latency = Latency(seconds=size["seconds"]).bind(
        ElasticDecoding(net, n_steps=size["timed_steps"]), torch.randint(4, size["vocab"], (1, 17))
    )
    search = SubnetSearch(
        objectives={"val_bleu": "max", "latency_ms": "min"}, measures=[latency],
        budget=size["budget"], storage=f"sqlite:///{output}/search.db", name="multi30k",
    )  # fmt: skip
    result = search.fit(model, dataloaders=loaders[1])  # LayerNorm: nothing to recalibrate
    print(result)
    whole = result.history[0]
    best = result.best("val_bleu", where={"latency_ms": "<= 75%"})
    test = read("test_2016_flickr", size["test"])
    batches = words.batches(test, 100)
    for label, e in (("Largest subnet", whole), ("Best within 75 % of its latency", best)):
        plain = result.extract(e)  # an ordinary network
        texts: dict[int, str] = {}
        for source, _, at in batches:
            texts |= dict(zip(at.tolist(), words.text(plain.beam(source, STEPS)[0]), strict=True))
        score = bleu([texts[i] for i in range(len(texts))], test[1])
        print(
            f"{label}: {e.values['val_bleu']:.1f} BLEU in the search, {score:.1f} on test with a "
            f"beam of 4, {e.values['latency_ms']:.2f} ms\n  {test[0][0]} -> {texts[0]}"
        )
    figure, ax = result.plot("latency_ms", "val_bleu")
    ax.set_title(f"Elastic Transformer on Multi30k: {ax.get_title()}", fontsize=11)
    figure.savefig(output / "front.png", dpi=120)
    result.save(output / "result.json")
    print(f"Wrote {output}/front.png and {output}/result.json.")


if __name__ == "__main__":
    main()
