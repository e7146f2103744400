# SPDX-License-Identifier: Apache-2.0
"""The runs of the search efficiency benchmark: who searches, by which settings, and their curves.

`search_efficiency` makes the runs, `efficiency_report` prints their tables.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.curves import from_text
from benchmarks.data import RESULTS
from lightning_subnet.strategies import Strategy, names, resolve

CHECKPOINTS = (10, 20, 50, 100, 250, 800, 2000)
FOLDER = RESULTS / "efficiency"

# By label: the strategy's name and its settings. What names() does not have is skipped.
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "nsga2": ("nsga2", {"population": 50, "mutation": 0.02}),
    "linas": ("linas", {}),
    "weaknas-front": ("weaknas", {"reading": "front"}),
    "weaknas-bands": ("weaknas", {"reading": "bands"}),
    "nsganetv2": ("nsganetv2", {}),
    "local-search": ("local-search", {}),
    "full": ("full", {}),
    "bayesian": ("bayesian", {}),
    "hybrid": ("hybrid", {}),
}
# WeakNAS as published for NAS-Bench-201: 10 per round from the top 100.
ON_TABLES = {label: {"batch_size": 10, "top": 100} for label in ("weaknas-front", "weaknas-bands")}


def available() -> list[str]:
    """Return the labels whose strategies are there."""
    return [label for label, (name, _) in STRATEGIES.items() if name in names()]


def strategy_of(label: str, problem: str) -> Strategy:
    name, settings = STRATEGIES[label]
    more = {} if problem.startswith("ofa") else ON_TABLES.get(label, {})
    return type(resolve(name))(**settings, **more)


def settings_hash(strategy: Strategy) -> str:
    text = json.dumps({"name": strategy.name, **strategy.settings()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read(problem: str) -> pd.DataFrame:
    """Return the rows of a problem; hypervolumes as numbers."""
    path = FOLDER / f"{problem}.csv"
    if not path.exists():
        return pd.DataFrame(columns=["strategy", "settings", "seed", "validations", "curve"])
    return pd.read_csv(path, dtype={"settings": str, "commit": str}, keep_default_na=False)


def curves_of(frame: pd.DataFrame) -> dict[int, np.ndarray]:
    """Return curves by seed."""
    return {int(r.seed): from_text(str(r.curve), int(r.validations)) for r in frame.itertuples()}
