# SPDX-License-Identifier: Apache-2.0
"""The main job on real data: train an elastic network on digits, then search its front.

    python examples/digits_search.py

Writes the trained weights, the study and a picture of the front into demo_output/. A second run
finds them there and goes on where the first one stopped; remove the folder to begin anew.
"""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from elastic_digits import DigitsData, ElasticDigits

from lightning_subnet import SubnetSearch
from lightning_subnet.strategies import NSGA2

OUTPUT = Path("demo_output")


def trained(data: DigitsData) -> ElasticDigits:
    """Train the super-network with an ordinary Trainer, or load what an earlier run trained."""
    L.seed_everything(0, verbose=False)
    model, weights = ElasticDigits(), OUTPUT / "supernet.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        print(f"The super-network comes from {weights}.")
        return model
    start = time.perf_counter()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=40, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    torch.save(model.state_dict(), weights)
    print(f"Trained the super-network in {time.perf_counter() - start:.0f} s.")
    return model


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", ".*(many workers|LeafSpec).*"
    )  # noise of Lightning on small data
    torch.set_num_threads(1)  # so small a network gains nothing from more
    OUTPUT.mkdir(exist_ok=True)
    data = DigitsData()
    model = trained(data)
    search = SubnetSearch(
        objectives={"val_acc": "max", "macs": "min"},
        strategy=NSGA2(population=13),
        budget=40,
        storage=f"sqlite:///{OUTPUT}/search.db",
        name="digits",
    )
    print(search.profile(model, data))
    start = time.perf_counter()
    result = search.fit(model, data)
    print(f"\nSearched for {time.perf_counter() - start:.1f} s.\n{result}\n")

    largest = result.history[0]
    best = result.best("val_acc", where={"macs": "<= 50%"})
    for label, e in (("Largest subnet", largest), ("Best within half of its MACs", best)):
        print(f"{label}: {e.values['val_acc']:.2%} at {e.values['macs']:,.0f} MACs")
    print(f"  which is {best.subnet}")

    figure, ax = result.plot()
    ax.set_title(f"Elastic network on handwritten digits: {ax.get_title()}")
    figure.savefig(OUTPUT / "front.png", dpi=120)
    result.save(OUTPUT / "result.json")
    print(f"\nWrote {OUTPUT}/front.png and {OUTPUT}/result.json.")


if __name__ == "__main__":
    main()
