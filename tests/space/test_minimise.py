# SPDX-License-Identifier: Apache-2.0
"""The rows of least score: exact where a space is enumerated, found by changes where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_subnet import SearchSpace
from lightning_subnet._types import Indices
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.minimise import least_rows
from tests.problems import conditional, grid, mixed


def away(goal: Indices):  # type: ignore[no-untyped-def] # a score
    return lambda X: np.abs(X - goal).sum(axis=1).astype(float)


@pytest.mark.parametrize("space", [grid(), conditional(), mixed()], ids=repr)
def test_a_small_space_is_looked_at_whole(space: SearchSpace) -> None:
    X = np.concatenate(list(space.index_blocks()))
    scores = np.random.default_rng(0).random(len(X))
    table = dict(zip(row_codes(X), scores, strict=True))
    rows = least_rows(
        space, lambda Z: np.array([table[c] for c in row_codes(Z)]),
        rng=np.random.default_rng(1), n=7,
    )  # fmt: skip
    assert [table[c] for c in row_codes(rows)] == np.sort(scores)[:7].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_a_hidden_subnet_of_a_large_space_is_found(seed: int) -> None:
    space = grid(30, 4)
    goal = space.sample_indices(1, rng=seed)
    rows = least_rows(space, away(goal), rng=np.random.default_rng(seed), n=3, n_sample=500)
    assert (rows[0] == goal).all()
    assert len(rows) == 3


def test_what_is_found_belongs_to_the_space() -> None:
    whole = grid(12, 4)
    part = whole.narrowed_to({"x.0": [0, 1], "x.3": [2, 3]})
    assert part.size > 200_000
    goal = whole.indices([whole.largest])
    rows = least_rows(part, away(goal), rng=np.random.default_rng(0), n=5)
    assert all(s in part for s in part.from_indices(rows))
    assert part.from_indices(rows)[0] == part.largest
    pool = whole.restricted_to(whole.sample(50, rng=0))
    best = least_rows(pool, away(goal), rng=np.random.default_rng(0))
    sums = [s.indices.sum() for s in pool]
    assert best[0].sum() == max(sums)


def test_the_same_seed_finds_the_same() -> None:
    space = grid(20, 4)
    score = lambda X: np.sin(X @ np.arange(1.0, 21)) + 1.0  # noqa: E731 - a rugged one
    one, two = (least_rows(space, score, rng=np.random.default_rng(5), n=4) for _ in range(2))
    assert np.array_equal(one, two)
