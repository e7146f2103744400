# SPDX-License-Identifier: Apache-2.0
"""The measured data: where it lies, and its columns as the index rows of a space.

The folder is named by LIGHTNING_SUBNET_DATA (default ../shared/data); its README has the contents.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_subnet import Choice, SearchSpace
from lightning_subnet.errors import SearchError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, SCRATCH = HERE / "results", HERE / "scratch"

OFA_NAMES = ("d", "ks", "e")


def data_folder() -> Path:
    """Return the folder with the measured data.

    Raises:
        SearchError: It is not there.
    """
    folder = Path(os.environ.get("LIGHTNING_SUBNET_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        msg = f"The measured data is not at {folder}. Set LIGHTNING_SUBNET_DATA to its folder."
        raise SearchError(msg)
    return folder


def rows_of(space: SearchSpace, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return canonical index rows; a value that no choice has belongs to a choice that is off."""
    X = np.zeros((len(next(iter(columns.values()))), len(space.names)), dtype=np.int64)
    for j, (name, choice) in enumerate(space.choices.items()):
        index = {value: i for i, value in enumerate(choice.values)}
        X[:, j] = [index.get(value, 0) for value in columns[name].tolist()]
    return space.canonical(X)


def values_in(column: np.ndarray) -> list:
    return np.unique(column).tolist()


def columns_of(data: Mapping[str, np.ndarray], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return one column per choice of arrays (n, k): `ks.0`, `ks.1`, ..."""
    return {f"{name}.{i}": c for name in names for i, c in enumerate(data[name].T)}


def ofa_space(more: Mapping[str, Choice]) -> SearchSpace:
    """Return the space of `ElasticMobileNetV3()`, OFA's, with further choices."""
    choices = {f"d.{s}": Choice([2, 3, 4]) for s in range(5)}
    for name, values in (("ks", [3, 5, 7]), ("e", [3, 4, 6])):
        for i in range(20):
            when = {f"d.{i // 4}": [d for d in (2, 3, 4) if d > i % 4]} if i % 4 > 1 else {}
            choices[f"{name}.{i}"] = Choice(values, when=when)
    return SearchSpace({**choices, **more})


def hwgpt() -> tuple[SearchSpace, np.ndarray, dict[str, np.ndarray]]:
    """Return the space of HW-GPT-Bench (small), its 10,000 measured rows, and their values."""
    with np.load(data_folder() / "hwgpt_s.npz") as data:
        depths = values_in(data["n_layer"])
        columns = {k: data[k] for k in ("embed_dim", "n_layer")}
        columns |= columns_of(data, ("n_head", "mlp_ratio"))
        choices = {}
        for name, column in columns.items():
            layer = int(name.split(".")[1]) if "." in name else 0
            deep = [d for d in depths if d > layer]
            when = {"n_layer": deep} if len(deep) < len(depths) else {}
            choices[name] = Choice(values_in(column[data["n_layer"] > layer]), when=when)
        choices["bias"] = Choice([False, True], ordered=False)
        space = SearchSpace(choices)
        X = rows_of(space, columns | {"bias": data["bias"]})
        targets = ("perplexity", *(k for k in data.files if k.startswith("latency_ms_")))
        return space, X, {name: data[name] for name in targets}
