# SPDX-License-Identifier: Apache-2.0
"""Shares of variance against functions whose first-order indices are known."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from lightning_subnet import Choice, Measure, SearchSpace
from lightning_subnet._types import Indices
from lightning_subnet.errors import ObjectiveError, SearchError
from lightning_subnet.results.sensitivity import Analysis, dimensions, explained, turned_down
from tests.problems import assert_clear


def grid(n_values: int, n_choices: int = 3) -> SearchSpace:
    return SearchSpace({f"x.{i}": list(range(n_values)) for i in range(n_choices)})


def ishigami(X: Indices, n_values: int) -> np.ndarray:
    """Ishigami and Homma, 1990, with a = 7, b = 0.1 on an even grid over [-pi, pi]."""
    x = np.linspace(-math.pi, math.pi, n_values)[X]
    return np.sin(x[:, 0]) + 7 * np.sin(x[:, 1]) ** 2 + 0.1 * x[:, 2] ** 4 * np.sin(x[:, 0])


def product(X: Indices) -> np.ndarray:
    """Product of 1 + a z with z = -1, 1: its indices are a**2 / (prod(1 + a**2) - 1)."""
    return np.prod(1 + _SIZES * (2.0 * X - 1), axis=1)


_SIZES = np.array([0.8, 0.4, 0.2, 0.0])
_SHARES = _SIZES**2 / (np.prod(1 + _SIZES**2) - 1)


def analysis(space: SearchSpace, by: str = "choice", seed: int = 0) -> Analysis:
    return Analysis(space, dimensions(space, by=by), seed)


def exact(name: str, fn: Any) -> Measure:
    return Measure(name, fn, unit="u", exact=True, takes="indices")


def test_indices_of_ishigami_are_those_of_the_whole_table() -> None:
    n, space = 9, grid(9)
    table = ishigami(np.array(list(itertools.product(range(n), repeat=3))), n).reshape(n, n, n)
    others = [(1, 2), (0, 2), (0, 1)]
    expected = [table.mean(axis=axes).var() / table.var() for axes in others]
    sensitivity = analysis(space).of_exact(exact("f", lambda X: ishigami(X, n)))
    np.testing.assert_allclose(sensitivity.share, expected, atol=1e-12)
    assert sensitivity.share[2] == pytest.approx(0, abs=1e-12)  # x3 acts through x1 alone
    assert sensitivity.rest == pytest.approx(1 - sum(expected), abs=1e-12)
    assert sensitivity.rest > 0.2
    assert sensitivity.share_error.tolist() == [0, 0, 0]
    assert sensitivity.basis == "all 729 subnets"
    at = table[-1, -1, -1]
    below = [table[0, -1, -1] - at, table[-1, 0, -1] - at, table[-1, -1, 0] - at]
    np.testing.assert_allclose(sensitivity.change, below, atol=1e-12)


def test_a_large_grid_is_sampled_and_has_errors() -> None:
    n = 60
    space = grid(n)
    assert space.size == 216_000
    x = np.linspace(-math.pi, math.pi, n)
    a, b, c = np.sin(x), 7 * np.sin(x) ** 2, 1 + 0.1 * x**4
    total = (a**2).mean() * (c**2).mean() + b.var()  # a has mean 0, and is independent of the rest
    expected = np.array([(a * c.mean()).var(), b.var(), 0]) / total
    sensitivity = analysis(space).of_exact(exact("f", lambda X: ishigami(X, n)))
    assert sensitivity.basis == "a sample of 20,000 subnets"
    assert (np.abs(sensitivity.share - expected) < 4 * sensitivity.share_error).all()
    assert (sensitivity.share_error < 0.02).all()
    assert (sensitivity.share_error > 0).all()
    assert abs(sensitivity.rest - (1 - expected.sum())) < 4 * sensitivity.rest_error


def test_a_product_and_a_sum() -> None:
    space = grid(2, 4)
    sensitivity = analysis(space).of_exact(exact("f", product))
    np.testing.assert_allclose(sensitivity.share, _SHARES, atol=1e-12)
    weights = np.array([1.0, 2, 3, 4])
    sensitivity = analysis(space).of_exact(exact("f", lambda X: 5 + X @ weights))
    np.testing.assert_allclose(sensitivity.share, weights**2 / (weights**2).sum(), atol=1e-12)
    np.testing.assert_allclose(sensitivity.change, -weights)
    assert (sensitivity.largest, sensitivity.unit) == (15, "u")
    assert sensitivity.rest == pytest.approx(0, abs=1e-12)
    together = analysis(space, by="group").of_exact(exact("f", lambda X: 5 + X @ weights))
    assert together.share.tolist() == pytest.approx([1])
    assert together.change.tolist() == [-10]


conditional = SearchSpace(
    {
        "depth": [1, 2, 3],
        "ks.0": [3, 5],
        "ks.1": Choice([3, 5, 7], when={"depth": [2, 3]}),
        "ks.2": Choice([3, 5], when={"depth": [3]}),
        "skip": Choice(["a", "b", "c"], ordered=False),
        "small": Choice([0, 1], when={"depth": [1]}),
    }
)


def cost(X: Indices) -> np.ndarray:
    on = conditional.active(X)
    blocks = np.where(on[:, 1:4], 10 * (1 + X[:, 1:4]), 0).sum(axis=1)
    return blocks + np.array([0.0, 5, -7])[X[:, 4]] + np.where(on[:, 5], 2.0 * X[:, 5], 0)


def test_a_conditional_choice_counts_where_it_exists() -> None:
    X = np.concatenate(list(conditional.index_blocks()))
    y = cost(X)
    sensitivity = analysis(conditional).of_exact(exact("cost", cost))
    active = conditional.active(X)
    for j, name in enumerate(conditional.names):  # by the definition, in another way
        groups = defaultdict(list)
        for row, value, on in zip(X, y, active, strict=True):
            if on[j]:
                groups[row[j]].append(value)
        here = [v for values in groups.values() for v in values]
        between = sum(len(v) * (np.mean(v) - np.mean(here)) ** 2 for v in groups.values())
        assert sensitivity.share[j] == pytest.approx(between / len(y) / y.var()), name
    # A sum has no interactions; what the existence of a block costs is the share of the depth.
    assert sensitivity.rest == pytest.approx(0, abs=1e-12)
    assert sensitivity.change[:4].tolist() == [-50, -10, -20, -10]
    assert sensitivity.change[4] == -7  # of a categorical choice, the greatest
    assert np.isnan(sensitivity.change[5])  # the largest subnet does not have it
    assert np.isnan(sensitivity.change_error[5])
    assert sensitivity.share[5] > 0


def test_what_is_turned_down() -> None:
    parts = {part.name: part for part in dimensions(conditional, by="group")}
    assert list(parts) == ["depth", "ks.*", "skip", "small"]
    rows = conditional.from_indices(turned_down(conditional, parts["ks.*"]))
    assert [row.grouped()["ks"] for row in rows] == [[3, 3, 3]]
    rows = conditional.from_indices(turned_down(conditional, parts["depth"]))
    assert [(row["depth"], row.grouped()["ks"]) for row in rows] == [(1, [5, 3, 3])]
    rows = conditional.from_indices(turned_down(conditional, parts["skip"]))
    assert [row["skip"] for row in rows] == ["b", "c"]
    assert len(turned_down(conditional, parts["small"])) == 0
    narrow = conditional.narrowed_to({"depth": [2, 3], "skip": ["b", "c"]})
    rows = narrow.from_indices(turned_down(narrow, dimensions(narrow, by="choice")[0]))
    assert [row["depth"] for row in rows] == [2]
    assert all(row in narrow for row in rows)


def test_a_whole_small_space_that_was_measured_is_exact() -> None:
    space = grid(2, 4)
    X = np.concatenate(list(space.index_blocks()))
    order = np.random.default_rng(0).permutation(len(X))
    sensitivity = analysis(space).of_values("acc", "", X[order], product(X[order]))
    np.testing.assert_allclose(sensitivity.share, _SHARES, atol=1e-12)
    assert sensitivity.basis == "all 16 subnets, measured"
    assert sensitivity.change[0] == pytest.approx(product(X[7:8])[0] - product(X[15:])[0])
    with pytest.raises(SearchError) as caught:
        analysis(space).of_values("acc", "", X[:10], product(X[:10]))
    assert_clear(caught.value, "'acc' was measured on 10 of 16 subnets", "at least 20")


wide = SearchSpace({f"k.{i}": [1, 2, 3, 4] for i in range(6)})
SLOPES = np.array([3.0, 2, 1, 0.5, 0, 0])


def accuracy(X: Indices, noise: float, rng: np.random.Generator) -> np.ndarray:
    joint = 0.7 * (X[:, 0] - 1.5) * (X[:, 1] - 1.5)
    return X @ SLOPES + joint + noise * rng.normal(size=len(X))


def true_shares(noise: float) -> np.ndarray:
    own = SLOPES**2 * 1.25  # of 0, 1, 2, 3
    return own / (own.sum() + 0.49 * 1.25**2 + noise**2)


def test_shares_of_a_sample_have_errors_that_hold() -> None:
    far, estimates, errors = [], [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        X = wide.sample_indices(150, rng)
        sensitivity = analysis(wide, seed=seed).of_values("acc", "", X, accuracy(X, 1.0, rng))
        far.append(np.abs(sensitivity.share - true_shares(1.0)))
        estimates.append(sensitivity.share)
        errors.append(sensitivity.share_error)
    assert (np.mean(far, axis=0) < 0.05).all()
    # The errors are those that happen, within a factor: of all figures, and of the greatest shares.
    assert np.mean(np.array(far) < 2 * np.array(errors) + 0.01) > 0.85
    ratio = np.mean(errors, axis=0)[:3] / np.std(estimates, axis=0)[:3]
    assert ((ratio > 0.4) & (ratio < 2.5)).all()
    bias = np.mean(estimates, axis=0) - true_shares(1.0)
    assert np.abs(bias).max() < 0.03


def test_a_history_that_is_not_uniform_is_weighed_anew() -> None:
    """Two choices that a search moved together: the means of the second are those of the first."""
    rng = np.random.default_rng(0)
    X = wide.sample_indices(300, rng)
    copied = rng.random(len(X)) < 0.7
    X[copied, 4] = X[copied, 0]
    X = np.unique(X, axis=0)
    y = X @ SLOPES
    raw = explained(wide, X, y, complete=False) / y.var()
    sensitivity = analysis(wide).of_values("acc", "", X, y)
    assert raw[4] > 0.15
    assert sensitivity.share[4] < 0.01
    expected = true_shares(0) * (1 + 0.49 * 1.25**2 / (14.25 * 1.25))
    np.testing.assert_allclose(sensitivity.share, expected, atol=0.02)
    assert sensitivity.change[0] == pytest.approx(-9, rel=0.05)
    assert sensitivity.change_error[0] < 0.5


def test_noise_gives_shares_to_nothing() -> None:
    rng = np.random.default_rng(1)
    X = wide.sample_indices(200, rng)
    sensitivity = analysis(wide).of_values("acc", "", X, rng.normal(size=200))
    assert (sensitivity.share < 0.05).all()
    assert sensitivity.rest > 0.85
    constant = analysis(wide).of_exact(exact("one", lambda X: np.ones(len(X))))
    assert constant.share.tolist() == [0] * 6
    assert constant.rest == 0


def test_a_measure_that_takes_its_time_is_taken_of_a_sample_and_of_what_is_turned_down() -> None:
    asked: list[int] = []

    def slow(subnets: list[Any]) -> list[tuple[float, float]]:
        asked.append(len(subnets))
        return [(10.0 + 2 * s["k.0"] + s["k.1"], 0.1) for s in subnets]

    sensitivity = analysis(wide).of_measured(Measure("ms", slow, unit="ms"), 60)
    assert asked == [60 + 6 + 1]
    assert sensitivity.largest == 22
    np.testing.assert_allclose(sensitivity.change, [-6, -3, 0, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(sensitivity.change_error, np.hypot(0.1, 0.1))
    np.testing.assert_allclose(sensitivity.share, [0.8, 0.2, 0, 0, 0, 0], atol=0.02)
    assert "60 evaluations, predicted by ridge (R² 1.00 on left-out ones)" in sensitivity.basis
    few = analysis(grid(2, 4)).of_measured(Measure("f", lambda s: [1.0 * x["x.0"] for x in s]), 30)
    assert few.basis == "all 16 subnets, measured"
    assert few.share.tolist() == pytest.approx([1, 0, 0, 0])


def test_the_same_seed_gives_the_same_report_and_no_global_state_is_touched() -> None:
    rng = np.random.default_rng(2)
    X = wide.sample_indices(80, rng)
    y = accuracy(X, 1.0, rng)
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not change
    one, other = (analysis(wide).of_values("acc", "", X, y) for _ in range(2))
    assert one.share.tolist() == other.share.tolist()
    assert one.share_error.tolist() == other.share_error.tolist()
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002 - as above


def test_values_that_are_no_numbers() -> None:
    with pytest.raises(ObjectiveError, match="'f' is not a finite number for 8 of 16 subnets"):
        analysis(grid(2, 4)).of_exact(exact("f", lambda X: np.where(X[:, 0], np.nan, 1.0)))
