# SPDX-License-Identifier: Apache-2.0
"""Statistics over seeds against enumeration, SciPy and known answers."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap, rankdata

from lightning_subnet.errors import SearchError
from lightning_subnet.experiments.statistics import (
    against,
    evaluations_to,
    holm,
    median_interval,
    signed_rank,
    target_of,
)
from tests.spaces import error_of

INF = float("inf")
CURVES = {
    "slow": np.array([[0.1, 0.2, 0.3, 0.4], [0.0, 0.1, 0.2, 0.2], [0.2, 0.3, 0.3, 0.3]]),
    "fast": np.array([[0.1, 0.4, 0.5, 0.6], [0.1, 0.2, 0.4, 0.5], [0.2, 0.2, 0.3, 0.3]]),
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_evaluations_to_a_target_count_from_one() -> None:
    assert evaluations_to(CURVES["slow"], 0.3).tolist() == [3, INF, 2]
    assert evaluations_to(CURVES["slow"], 0.05).tolist() == [1, 2, 1]
    assert evaluations_to(np.array([[0.1 + 0.2]]), 0.3).tolist() == [1]
    assert evaluations_to(np.array([[0.3]]), 0.1 + 0.2).tolist() == [1], "but for rounding"


def test_the_bootstrap_of_three_is_known() -> None:
    # Of the 27 resamples of three values 7 have the lowest as their median, and 7 the highest.
    ends = {c: median_interval([5.0, 1.0, 9.0], confidence=c).tolist() for c in (0.95, 0.5, 0.4)}
    assert ends == {0.95: [1, 5, 9], 0.5: [1, 5, 9], 0.4: [5, 5, 5]}


@pytest.mark.parametrize("n", [5, 10, 11, 20])
def test_the_interval_is_that_of_scipy(n: int) -> None:
    values = np.random.default_rng(n).gumbel(size=n)
    low, median, high = median_interval(values)
    theirs = bootstrap(
        (values,), np.median, method="percentile", n_resamples=5000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert median == np.median(values)
    gap = np.diff(np.sort(values)).max()  # draws differ, and the ends are among few values
    assert (low, high) == (pytest.approx(theirs.low, abs=gap), pytest.approx(theirs.high, abs=gap))


@pytest.mark.parametrize("n", [10, 15])
def test_the_interval_covers_the_true_median(n: int) -> None:
    drawn = np.random.default_rng(7).exponential(size=(n, 2000))
    low, _, high = median_interval(drawn)
    assert 0.91 < np.mean((low <= np.log(2)) & (np.log(2) <= high)) < 0.99


def test_each_column_is_on_its_own_and_the_order_of_seeds_says_nothing() -> None:
    values = np.random.default_rng(3).normal(size=(7, 4))
    together = median_interval(values)
    assert together.shape == (3, 4)
    for j in range(4):
        np.testing.assert_array_equal(together[:, j], median_interval(values[::-1, j]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0], [4, 4, 4]),
        ([3.0, INF], [3, INF, INF]),
        ([INF, INF], [INF, INF, INF]),
        ([1.0, 2.0, 3.0, 4.0, INF], [1, 3, INF]),
        ([2.0] * 9 + [INF], [2, 2, 2]),
    ],
)
def test_runs_that_never_arrive_count(values: list[float], expected: list[float]) -> None:
    assert median_interval(values).tolist() == expected


def test_the_lower_median_is_what_half_of_the_seeds_do_not_exceed() -> None:
    assert median_interval([3.0, INF], lower=True).tolist() == [3, 3, INF]
    assert median_interval([1.0, 2.0, 3.0, INF], lower=True)[1] == 2
    np.testing.assert_array_equal(
        median_interval([4.0, 1.0, 2.0], lower=True), median_interval([4.0, 1.0, 2.0])
    )


@pytest.mark.parametrize("confidence", [0, 1, 95, float("nan")])
def test_a_confidence_is_a_share(confidence: float) -> None:
    message = error_of(SearchError, lambda: median_interval([1.0], confidence=confidence))
    assert f"confidence={confidence!r}" in message


def enumerated(differences: list[float]) -> float:
    """Return the p value of the signed-rank test by going through all signs."""
    d = np.array([x for x in differences if x])
    ranks = rankdata(np.abs(d))
    statistic = abs((ranks * np.sign(d)).sum())
    signs = np.array(list(itertools.product([-1, 1], repeat=len(d))))
    return float(np.mean(np.abs(signs @ ranks) >= statistic - 1e-9))


@pytest.mark.parametrize(
    "differences",
    [
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        [0.1, -0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        [0.1, 0.1, -0.1, 0.3, 0.3],
        [0.0, 0.0, 0.2, -0.1, 0.5, 0.5],
        [0.3],
        [0.5, -0.5],
        [1.0] * 10,
    ],
)
def test_the_signed_rank_test_is_exact(differences: list[float]) -> None:
    assert signed_rank(differences) == pytest.approx(enumerated(differences))


def test_pairs_that_do_not_differ_show_nothing() -> None:
    assert signed_rank([0.0] * 5) == 1
    assert signed_rank([1e-16, -1e-17, 0.0]) == 1, "rounding is no difference"
    assert signed_rank([]) == 1
    assert 0 < signed_rank([0.1, 0.1, -0.1] * 20) < 1, "many ties"


def test_holm_is_the_published_procedure() -> None:
    p = [0.01, 0.01, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.03, 0.03, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1, 1]
    assert holm([0.04]).tolist() == [0.04]
    assert len(holm([])) == 0


def test_differences_are_taken_by_seed() -> None:
    rows = against("slow", CURVES, [2, 4], confidence=0.95)
    assert [(row["strategy"], row["at"]) for row in rows] == [("fast", 2), ("fast", 4)]
    first, last = rows
    # fast less slow: .2, .1, -.1 after two and .2, .3, 0 after four
    assert first["median"] == pytest.approx(0.1)
    assert (first["low"], first["high"]) == (pytest.approx(-0.1), pytest.approx(0.2))
    assert first["mean"] == pytest.approx(0.2 / 3)
    assert (first["better"], first["worse"]) == (2, 1)
    assert (last["better"], last["worse"]) == (2, 0), "one is equal"
    assert last["p"] == last["p_holm"] == 0.5


def test_the_correction_is_for_the_number_of_strategies() -> None:
    rng = np.random.default_rng(0)
    curves = {"base": rng.random((9, 3))}
    curves |= {name: curves["base"] + rng.normal(0.1, 0.1, (9, 3)) for name in "abc"}
    rows = against("base", curves, [1, 3], confidence=0.95)
    assert [row["strategy"] for row in rows] == list("aabbcc")
    for k in (1, 3):
        block = [row for row in rows if row["at"] == k]
        assert [row["p_holm"] for row in block] == holm([row["p"] for row in block]).tolist()
        assert max(row["p_holm"] / row["p"] for row in block) == pytest.approx(3)


def test_seeds_that_one_of_them_lacks_are_no_pairs() -> None:
    nan = np.full((1, 4), np.nan)
    curves = {"slow": np.vstack([CURVES["slow"], nan]), "fast": np.vstack([CURVES["fast"], nan])}
    assert against("slow", curves, [4], confidence=0.9) == against(
        "slow", CURVES, [4], confidence=0.9
    )
    apart = {"slow": np.vstack([CURVES["slow"][:1], nan]), "fast": np.vstack([nan, nan])}
    message = error_of(SearchError, lambda: against("slow", apart, [4], confidence=0.9))
    assert "'fast' and 'slow' have no seed in common" in message


def test_a_target_may_be_the_median_of_a_strategy() -> None:
    assert target_of(CURVES, 0.25) == 0.25
    assert target_of(CURVES, np.float64(0.25)) == 0.25
    assert target_of(CURVES, "fast@4") == 0.5
    assert target_of({"a@b": CURVES["slow"]}, "a@b@1") == 0.1


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("fats@4", "Did you mean 'fast'?"),
        ("fast", "'strategy@evaluations'"),
        ("fast@0", "1..4"),
        ("fast@5", "1..4, such as 'slow@4'"),
        ("fast@x", "'slow@4'"),
        (0.0, "positive hypervolume"),
        (-1, "positive hypervolume"),
        (INF, "positive hypervolume"),
        (float("nan"), "positive hypervolume"),
        (True, "target=True"),
        (None, "such as 'slow@4'"),
    ],
)
def test_bad_targets_are_refused(target: Any, part: str) -> None:
    message = error_of(SearchError, lambda: target_of(CURVES, target))
    assert part in message
    assert f"target={target!r}" in message
