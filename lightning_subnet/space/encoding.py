# SPDX-License-Identifier: Apache-2.0
"""Index rows as numbers for models, with choices that do not exist masked."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Indices
from lightning_subnet.errors import SpaceError
from lightning_subnet.space.choices import Choices

Encoding = Literal["onehot", "ordinal"]


def encode(choices: Choices, X: Indices, kind: Encoding) -> npt.NDArray[np.float64]:
    """Return features (n, d) of canonical rows X (n, n_choices); see `SearchSpace.encode`."""
    mask = choices.active(X)
    if kind == "ordinal":
        steps = np.array([len(values) for values in choices.values])
        return np.asarray(np.where(mask, (X + 1) / steps, 0.0))
    if kind != "onehot":
        msg = f"The encoding {kind!r} is unknown; it is 'onehot' or 'ordinal'."
        raise SpaceError(msg)
    starts = np.cumsum([0, *(len(d) for d in choices.distinct)])
    features = np.zeros((len(X), starts[-1]))
    for j, distinct in enumerate(choices.distinct):
        at = np.flatnonzero(mask[:, j])
        features[at, starts[j] + np.searchsorted(distinct, X[at, j])] = 1.0
    return features


def column_names(choices: Choices, kind: Encoding) -> list[str]:
    """Return the names of the columns of `encode`."""
    if kind == "ordinal":
        return list(choices.names)
    return [
        f"{name}={values[i]}"
        for name, values, distinct in zip(
            choices.names, choices.values, choices.distinct, strict=True
        )
        for i in distinct
    ]
