# SPDX-License-Identifier: Apache-2.0
"""Features of subnets for predictors, 0 where a choice does not exist."""

from __future__ import annotations

import numpy as np

from lightning_subnet._types import Floats, Indices
from lightning_subnet.space.space import SearchSpace


def features(space: SearchSpace, X: Indices) -> Floats:
    """Return the masked features (n, d) of canonical index rows X (n, n_choices).

    The columns are the one-hot columns of `space.encode`; each choice's value relative to its
    greatest one (its position, if its values are not numbers, or nothing if they have no order);
    and the mean over each numbered group such as `ks.0, ks.1`. A choice that does not exist is 0.

    Example:
        >>> space = SearchSpace({"depth": [1, 2], "width": [8, 16, 32]})
        >>> features(space, space.indices([space.largest]))
        array([[0., 1., 0., 0., 1., 1., 1.]])
    """
    mask = space.active(X)
    numbers = np.zeros(X.shape)
    ordered = np.array([choice.ordered for choice in space.choices.values()])
    for j, choice in enumerate(space.choices.values()):
        values = np.arange(1.0, len(choice.values) + 1)
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in choice.values):
            numeric = np.array(choice.values, dtype=float)
            values = numeric if np.abs(numeric).max() > 0 else values
        numbers[:, j] = (values / np.abs(values).max())[X[:, j]]
    numbers *= mask & ordered
    groups: dict[str, list[int]] = {}
    for j, name in enumerate(space.names):
        stem, dot, tail = name.rpartition(".")
        if dot and tail.isdigit() and ordered[j]:
            groups.setdefault(stem, []).append(j)
    means = [numbers[:, at].mean(axis=1) for at in groups.values() if len(at) > 1]
    return np.column_stack([space.encode(X), numbers[:, ordered], *means])
