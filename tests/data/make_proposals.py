# SPDX-License-Identifier: Apache-2.0
"""Record in proposals.json what strategies propose, predictors predict and trainings draw.

Run with the package of commit 6ab0839, once: a later version proves itself against the file, so
it must not write it. In a checkout of that commit, to which tests/previous.py was added::

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/data/make_proposals.py FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning_subnet
from lightning_subnet import predictors
from tests import previous

PREDICTED_ON = ("conditional", "mixed", "wide")
REDUCED = ("single", "wide")
DIGITS = 9


def main(folder: Path) -> None:
    """Write the file."""
    root = Path(__file__).resolve().parents[2]
    assert Path(lightning_subnet.__file__).is_relative_to(root), "set PYTHONPATH to this checkout"
    warnings.simplefilter("ignore")
    data: dict[str, Any] = {
        "commit": "6ab0839",
        "proposals": {
            f"{label} | {problem} | {seed}": previous.proposals(label, problem, seed)
            for label, problem in previous.cases()
            for seed in previous.seeds_of(label)
        },
        "predictions": {
            f"{name} | {problem}": {
                part: [float(f"{value:.{DIGITS}g}") for value in values]
                for part, values in previous.predicted(name, problem).items()
            }
            for name in predictors.names()
            for problem in PREDICTED_ON
        },
        "reductions": {problem: previous.reduced(problem) for problem in REDUCED},
        "trained": {label: previous.trained(label) for label in previous.SAMPLINGS},
        "trained by rank": {
            f"{rank} of {n}": previous.trained_by_rank(rank, n) for rank, n in previous.RANKS
        },
    }
    text = json.dumps(data, indent=0)
    (folder / "proposals.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
