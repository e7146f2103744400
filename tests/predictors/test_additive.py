# SPDX-License-Identifier: Apache-2.0
"""Additive against scikit-learn and kernels written by hand; degenerate input; measured data."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import kendalltau
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Kernel

from benchmarks import data as files
from lightning_subnet import Choice, SearchSpace
from lightning_subnet.predictors import additive as _additive
from lightning_subnet.predictors.additive import Additive, Effects, Warp
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make
from tests.problems import ROOT, conditional, data_file, grid, mixed
from tests.spaces import nested, property_test, spaces


def ops() -> SearchSpace:
    """Return a space with a group, choices that stand alone, categories and conditions."""
    op = Choice(["conv", "pool", "skip"], ordered=False)
    deep = Choice([8, 16, 24], when={"depth": [2, 3]})
    widths = {"width.0": [8, 16, 24], "width.1": deep, "width.2": deep}
    return SearchSpace({"depth": [1, 2, 3], "stem": [8, 16], "act": op, **widths, "op.0": op})


def sample(n: int = 40, seed: int = 0, *, bent: bool = False) -> tuple[np.ndarray, ...]:
    """Return features and values of n subnets, and features of 25 others."""
    X = ops().sample_indices(n + 25, seed)
    y = X @ np.array([2.0, 1, 0, 0.5, 0.7, 0.9, 0]) - 2.0 * (X[:, 2] == 1) + 0.3 * X[:, 0] * X[:, 6]
    y += 0.1 * np.random.default_rng(seed).normal(size=len(y))
    F, y = features(ops(), X), 7 - 5 * np.exp(-y) if bent else y
    return F[:n], y[:n], F[n:]


def fitted(n: int = 40, seed: int = 0, *, bent: bool = False) -> tuple[Additive, np.ndarray]:
    F, y, _ = sample(n, seed, bent=bent)
    predictor = make("additive", space=ops()).fit(F, y)
    assert isinstance(predictor, Additive)
    assert predictor.used == "additive"
    return predictor, y


class ByHand(Kernel):
    """The kernel by its definition, pair by pair, of one-hot rows."""

    def __init__(self, kernel: _additive._Kernel, of: Callable[[np.ndarray], np.ndarray]) -> None:
        self.kernel, self.of = kernel, of

    def _one(self, a: np.ndarray, b: np.ndarray) -> float:
        kernel, total = self.kernel, 1.0
        for (at, alike, _), weight in zip(kernel.parts, kernel.weights, strict=False):
            total += weight * (a - kernel.centre)[at] @ alike @ (b - kernel.centre)[at]

        def near(u: np.ndarray, v: np.ndarray) -> float:
            return float(np.exp(-(((u - v) * kernel.scale) ** 2).sum()))

        seen = kernel.A + kernel.centre
        centred = near(a, b) - np.mean([near(a, s) for s in seen])
        centred += np.mean([near(s, t) for s in seen for t in seen])
        centred -= np.mean([near(s, b) for s in seen])
        return float(total + kernel.weights[-1] * kernel.stretch * centred)

    def __call__(self, X: np.ndarray, Y: np.ndarray | None = None, eval_gradient: Any = 0) -> Any:
        A, B = (self.of(rows) for rows in (X, X if Y is None else Y))
        return np.array([[self._one(a, b) for b in B] for a in A])

    def diag(self, X: np.ndarray) -> np.ndarray:
        return np.array([self._one(a, a) for a in self.of(X)])

    def is_stationary(self) -> bool:
        return False


def regressor(predictor: Additive) -> GaussianProcessRegressor:
    kernel = ByHand(predictor._kernel, predictor._effects_of)
    return GaussianProcessRegressor(kernel, alpha=predictor._noise, optimizer=None)


def unwarped(warp: Warp, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values, and by the slope at them their standard deviations, by hand."""
    t, std = mean * warp.std + warp.mean, np.sqrt(variance) * warp.std
    if warp.side == 0:
        return t, std
    value = warp.edge - np.exp(-t) if warp.side > 0 else warp.edge + np.exp(t)
    return value, std * np.abs(warp.edge - value)


# Against scikit-learn


@pytest.mark.parametrize("bent", [False, True])
def test_the_posterior_is_that_of_scikit_learn(bent: bool) -> None:
    predictor, y = fitted(14, bent=bent)
    F, _, unseen = sample(14, bent=bent)
    assert bool(predictor.warp.side) == bent
    theirs = regressor(predictor).fit(F, predictor.warp.straight(y))
    mean, std = theirs.predict(unseen[:8], return_std=True)
    expected, spread = unwarped(predictor.warp, mean, std**2 + predictor._noise)
    ours, own = predictor._predict(unseen[:8])
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(own, spread, rtol=1e-5)
    np.testing.assert_allclose(predictor.predict(unseen[:8]), expected, rtol=1e-6)


@pytest.mark.parametrize("bent", [False, True])
def test_left_out_is_what_leaving_out_gives_at_the_same_weights(bent: bool) -> None:
    predictor, y = fitted(12, bent=bent)
    F, _, _ = sample(12, bent=bent)
    z = predictor.warp.straight(y)
    mean, std = predictor._fit(F, y)
    np.testing.assert_array_equal(predictor.out_of_fold, mean)
    gram = ByHand(predictor._kernel, predictor._effects_of)(F)
    for i in range(len(y)):
        rest = np.delete(np.arange(len(y)), i)
        noisy = gram[np.ix_(rest, rest)] + predictor._noise * np.eye(len(rest))
        at = gram[i, rest] @ np.linalg.solve(noisy, z[rest])
        left = gram[i, rest] @ np.linalg.solve(noisy, gram[rest, i])
        variance = gram[i, i] - left + predictor._noise
        expected, spread = unwarped(predictor.warp, at, variance)
        assert mean[i] == pytest.approx(expected, rel=1e-6)
        assert std[i] == pytest.approx(spread, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_no_step_lowers_the_posterior_density(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_additive, "_EDGES", ())  # one warp, so each step can be looked at
    rng = np.random.default_rng(seed)
    F, y, _ = sample(12 * (seed + 1), seed)
    y = rng.normal(size=len(y)) if seed == 3 else y  # values that no effect explains
    effects = Effects.of(ops())
    kernel = _additive._Kernel(F[:, : len(effects.basis)] @ effects.basis, effects.parts())
    grams, used = np.stack(kernel.grams), kernel.start > 0
    assert used.any()
    assert not used.all()  # choices that always exist have no effect of existing

    def density(weights: np.ndarray, noise: float) -> float:
        gram = 1.0 + np.tensordot(weights, grams, 1) + noise * np.eye(len(y))
        z = (y - y.mean()) / y.std()
        value = -0.5 * (np.linalg.slogdet(gram)[1] + z @ np.linalg.solve(gram, z))
        w, start = np.append(weights[used], noise), np.append(kernel.start[used], _additive._NOISE)
        return float(value - 0.5 * _additive._PRIOR * (np.log(w) + start / w).sum())

    def after(steps: int) -> tuple[np.ndarray, float]:
        monkeypatch.setattr(_additive, "_STEPS", steps)
        _, weights, noise = _additive._likeliest(kernel, y)
        assert (weights[~used] == 0).all()
        return weights, noise

    path = [density(*after(steps)) for steps in range(10)]
    assert (np.diff(path) > -1e-9).all()
    assert path[1] > path[0] + 0.01
    weights, noise = after(500)
    best = density(weights, noise)
    for _ in range(20):  # no nearby weights are likelier
        move = np.exp(0.2 * rng.normal(size=len(weights) + 1))
        assert density(weights * move[:-1], noise * move[-1]) < best + 1e-3


# The warp


@property_test
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=20).filter(lambda v: np.std(v) > 1e-3),
    st.sampled_from([-1, 0, 1]),
    st.sampled_from([0.3, 1.0, 3.0]),
)
def test_straight_and_back_are_inverse(values: list[float], side: int, beyond: float) -> None:
    y = np.array(values)
    warp = Warp.to(y, side, beyond)
    z = warp.straight(y)
    assert z.mean() == pytest.approx(0, abs=1e-6)
    assert z.std() == pytest.approx(1, abs=1e-6)
    assert (np.diff(z[np.argsort(y)]) >= 0).all()  # what is better stays better
    near = np.abs(z) < 5
    np.testing.assert_allclose(
        warp.back(z, z)[0][near], y[near], rtol=1e-6, atol=1e-6 * (np.abs(y).max() + y.std())
    )


@pytest.mark.parametrize("side", [-1, 0, 1])
def test_the_slope_is_the_derivative(side: int) -> None:
    y = np.random.default_rng(1).gamma(2.0, 3.0, size=15)
    warp, h = Warp.to(y, side, 0.3), 1e-5
    slopes = (warp.straight(y + h) - warp.straight(y - h)) / (2 * h)
    assert warp.log_slope(y) == pytest.approx(np.log(slopes).sum(), abs=1e-6)
    _, std = warp.back(warp.straight(y), np.ones(len(y)))
    np.testing.assert_allclose(std, 1 / slopes, rtol=1e-6)  # of a small step, by its slope


@pytest.mark.parametrize("side", [-1, 1])
def test_nothing_is_predicted_beyond_the_edge(side: int) -> None:
    warp = Warp.to(np.arange(10.0), side, 0.3)
    far, std = warp.back(np.array([-1e9, 1e9]), np.ones(2))
    assert np.isfinite(far).all()
    assert np.isfinite(std).all()
    assert (side * far < side * warp.edge).all()


@pytest.mark.parametrize("side", [-1, 1])
def test_a_value_that_saturates_is_learned_from_25(side: int) -> None:
    space = SearchSpace({f"width.{i}": [8, 16, 32, 64] for i in range(8)})
    errors: dict[str, list[float]] = {"additive": [], "ridge": []}
    for seed in range(3):
        X = space.sample_indices(200, seed)
        y = side * (80 - 20 * np.exp(-1.5 * X.mean(axis=1)))
        F = features(space, X)
        for name, found in errors.items():
            predictor = make(name, space=space).fit(F[:25], y[:25])
            found.append(float(np.abs(predictor.predict(F[25:]) - y[25:]).mean()))
            assert name == "ridge" or predictor.warp.side == side  # type: ignore[attr-defined] # Additive has it
    assert max(errors["additive"]) < 0.5 * min(errors["ridge"])


# Effects


@property_test
@given(spaces())
def test_effects_are_of_being_there_and_of_steps_or_values(space: SearchSpace) -> None:
    effects, subnets = Effects.of(space), space.sample(min(space.size, 40), rng=0)
    onehot = space.encode(subnets)
    A = onehot @ effects.basis
    expected = []
    for name, choice in space.choices.items():
        distinct = [v for i, v in enumerate(choice.values) if choice.representative(i) == i]
        at = [distinct.index(s.active[name]) if name in s.active else -1 for s in subnets]
        expected.append([i >= 0 for i in at])
        if choice.ordered:
            expected += [[i >= level for i in at] for level in range(1, len(distinct))]
        else:
            expected += [[i == level for i in at] for level in range(len(distinct))]
    np.testing.assert_array_equal(A, np.array(expected, dtype=float).T)
    np.testing.assert_allclose(A @ np.linalg.pinv(effects.basis), onehot, atol=1e-9)
    for at, alike, _ in effects.parts():
        assert np.array_equal(alike, alike.T), at
        assert np.linalg.eigvalsh(alike).min() > -1e-9 if len(at) else True
    covered = np.concatenate([at for at, _, _ in effects.parts()])
    assert set(covered) == set(range(A.shape[1]))


def test_a_kernel_on_effects_is_the_one_written_out() -> None:
    ks = [3, 5, 7]
    space = SearchSpace(
        {
            "depth": [1, 2],
            "ks.0": ks,
            "op": Choice(["conv", "skip"], ordered=False),
            "ks.1": Choice(ks, when={"depth": [2]}),
            "stem": [8, 16],
        }
    )
    subnets = list(space)
    assert len(subnets) == 2 * (2 * 3 + 2 * 9)
    # Effects by hand: a choice, where it stands, its step or value (None for being there).
    steps = [
        lambda s: s["depth"] == 2,
        lambda s: s["op"] == "conv",
        lambda s: s["op"] == "skip",
        lambda s: s["ks.0"] >= 5,
        lambda s: s["ks.0"] >= 7,
        lambda s: s.get("ks.1", 0) >= 5,
        lambda s: s.get("ks.1", 0) >= 7,
        lambda s: "ks.1" in s,
        lambda s: s["stem"] == 16,  # like no other, although it is a first step as well
    ]
    near = np.exp(-0.5 / 0.3)  # ks.1 stands half a network behind ks.0
    # Weights of a smooth part, of one that is the same everywhere, and of single effects.
    alone, single = np.eye(3) * (0.5 + 0.3), np.eye(3) * 0.3
    levels, blocks = np.array([[1, 0.6], [0.6, 1]]), np.array([[1, near], [near, 1]])
    ks_cov = np.kron(0.5 * blocks + 0.3, levels) + 0.3 * np.eye(4)
    C = np.zeros((9, 9))
    C[:3, :3], C[3:7, 3:7] = alone + single, ks_cov
    C[7, 7], C[8, 8] = 0.4 * (0.7 + 0.3), C[0, 0]
    A = np.array([[float(step(s.active)) for step in steps] for s in subnets])
    A -= A.mean(axis=0)
    expected = A @ C @ A.T
    expected /= expected.trace() / len(A)  # at the start it explains as much as the values vary
    effects = Effects.of(space)
    kernel = _additive._Kernel(space.encode(subnets) @ effects.basis, effects.parts())
    kernel.weigh(kernel.start)
    linear = kernel.gram() - 1 - kernel.weights[-1] * kernel.grams[-1]
    np.testing.assert_allclose(linear, expected, atol=1e-9)
    # The interactions: an RBF kernel in which the weighted effects are the length scales.
    scale = _additive._RATE * np.diag(C) / (A @ C @ A.T).trace() * len(A)
    apart = ((A[:, None] - A) ** 2 * scale).sum(axis=2)
    centring = np.eye(len(A)) - 1 / len(A)
    rbf = centring @ np.exp(-apart) @ centring
    np.testing.assert_allclose(kernel.grams[-1], rbf / rbf.trace() * len(A), atol=1e-9)


def test_steps_are_like_no_values_of_a_category() -> None:
    op = Choice(["a", "b", "c"], ordered=False)
    effects = Effects.of(SearchSpace({"x.0": [1, 2, 3], "x.1": op, "x.2": [1, 2, 3], "x.3": op}))
    for at, alike, _ in effects.parts():
        kinds = effects.ordered[at] | (effects.level[at] < 0)
        assert not alike[np.ix_(kinds, ~kinds)].any()
        assert np.linalg.eigvalsh(alike).min() > -1e-9


def test_near_blocks_have_effects_that_are_more_alike() -> None:
    space = SearchSpace({f"ks.{i}": [3, 5] for i in range(10)})
    effects = Effects.of(space)
    at, alike, _ = effects.parts()[0]
    first = alike[0]
    assert len(at) == 10
    assert (np.diff(first) < 0).all()
    X = np.vstack([np.zeros(10, dtype=int), np.eye(10, dtype=int)])  # each block by itself
    rows = space.sample_indices(40, 0)
    y = 1.0 * rows[:, 0] + 0.01 * np.random.default_rng(0).normal(size=40)
    predictor = make("additive", space=space).fit(features(space, rows), y)
    predicted = predictor.predict(features(space, X))
    gains = predicted[1:] - predicted[0]
    assert gains[0] > 5 * np.abs(gains[1:]).max()


# What a search may bring


def test_another_process_predicts_the_same() -> None:
    code = (
        "import numpy as np\n"
        "from lightning_subnet.predictors.masked_features import features\n"
        "from lightning_subnet.predictors.registry import make\n"
        "from tests.problems import conditional, mixed\n"
        "for space in (conditional(), mixed()):\n"
        "    X = space.sample_indices(30, 0); F = features(space, X)\n"
        "    made = make('additive', space=space).fit(F[:20], np.exp(-X.sum(axis=1))[:20])\n"
        "    assert made.used == 'additive'\n"
        "    print(*(v.tobytes().hex() for v in made.predict(F, return_std=True)))\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )
        for seed in ("0", "7")
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1] != ""


def test_a_fit_remembers_nothing_of_an_earlier_one() -> None:
    F, y, unseen = sample(50)
    predictor = make("additive", space=ops())
    for n in (10, 50, 20):
        fresh = make("additive", space=ops()).fit(F[:n], y[:n])
        again = predictor.fit(F[:n], y[:n])
        np.testing.assert_array_equal(again.predict(unseen), fresh.predict(unseen))


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(lambda y: 1e12 * y, id="huge"),
        pytest.param(lambda y: 1e-9 * y, id="tiny"),
        pytest.param(lambda y: -3 * y, id="negative"),
        pytest.param(lambda y: y - y.mean(), id="around zero"),
        pytest.param(lambda y: 1e9 + y, id="a small part"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_units_do_not_matter(values: Callable[[np.ndarray], np.ndarray]) -> None:
    F, y, unseen = sample(60)
    base, std = make("additive", space=ops()).fit(F, y).predict(unseen, return_std=True)
    given = values(y)
    factor = (given[y.argmax()] - given[y.argmin()]) / np.ptp(y)
    offset = given[0] - factor * y[0]
    predictor = make("additive", space=ops()).fit(F, given)
    assert predictor.used == "additive"
    mean, spread = predictor.predict(unseen, return_std=True)
    np.testing.assert_allclose((mean - offset) / factor, base, atol=1e-4)
    # Where the value is a small part, the least standard deviation is that of its size.
    least = 1e-6 * np.abs(given).mean()
    np.testing.assert_allclose(spread, np.maximum(std * abs(factor), least), rtol=1e-3)


@pytest.mark.parametrize("n", [6, 7, 9])
@pytest.mark.filterwarnings("error")
def test_six_rows_are_enough(n: int) -> None:
    F, y, unseen = sample(n)
    predictor = make("additive", space=ops()).fit(F, y)
    assert predictor.used == "additive"
    mean, std = predictor.predict(np.vstack([F, unseen]), return_std=True)
    assert (np.abs(mean - y.mean()) < 3 * np.ptp(y)).all()
    assert (std > 0).all()
    assert kendalltau(mean[:n], y).statistic > 0.8


@pytest.mark.filterwarnings("error")
def test_ties_and_one_value_that_differs() -> None:
    F, y, _ = sample(85)
    F, unseen, ties = F[:60], F[60:], np.round(y[:60] / 2)
    assert len(np.unique(ties)) < 8
    predictor = make("additive", space=ops()).fit(F, ties)
    assert predictor.used == "additive"
    assert kendalltau(predictor.predict(unseen), y[60:]).statistic > 0.6
    one = np.zeros(60)
    one[17] = 1.0
    predictor = make("additive", space=ops()).fit(F, one)
    assert predictor.used == "additive"
    assert (np.abs(predictor.predict(unseen)) < 2).all()


@pytest.mark.filterwarnings("error")
def test_rows_and_columns_that_do_not_vary() -> None:
    F, y, _ = sample(30)
    space = ops()
    same = np.repeat(F[:1], 30, axis=0)
    predictor = make("additive", space=space).fit(same, y)
    np.testing.assert_allclose(predictor.predict(F), y.mean(), atol=0.5 * y.std())
    few = np.array(F)
    few[:, :3] = F[0, :3]  # a depth that was never varied
    assert make("additive", space=space).fit(few, y).used == "additive"
    twice = make("additive", space=space).fit(np.vstack([F, F]), np.append(y, y + 0.01))
    assert kendalltau(twice.predict(F), y).statistic > 0.9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("outlier", [-1, 1])
def test_one_value_far_from_all_others_is_within_the_edge(bent: bool, outlier: int) -> None:
    space = grid(6, 4)
    X = space.sample_indices(200, 0)
    y = X.sum(axis=1) / 6.0 if not bent else 1 - np.exp(-outlier * X.sum(axis=1) / 6.0)
    skipped = np.setdiff1d(np.arange(200), _additive.spaced_rows(200, _additive._SEARCH_ROWS))[5]
    y[skipped] = y.mean() + outlier * 50 * y.std()
    flat = np.zeros(200)
    flat[skipped] = outlier  # the rows that weights are chosen on are all equal
    for values in (y, flat):
        predictor = make("additive", space=space).fit(features(space, X), values)
        assert predictor.used == "additive"
        assert np.isfinite(predictor.predict(features(space, X))).all()
        edge = predictor.warp.side * predictor.warp.edge  # type: ignore[attr-defined] # Additive has it
        assert not edge or (predictor.warp.side * values < edge).all()  # type: ignore[attr-defined] # Additive has it


def test_thousands_of_rows_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made, init = [], _additive._Kernel.__init__

    def noted(self: Any, rows: np.ndarray, parts: Any) -> None:
        made.append(len(rows))
        init(self, rows, parts)

    monkeypatch.setattr(_additive._Kernel, "__init__", noted)
    space = grid(8, 4)
    X = space.sample_indices(2500, 0)
    F, y = features(space, X), X @ np.arange(8.0) + np.sin(X[:, 0] * X[:, 1])
    predictor = make("additive", space=space).fit(F, y)
    assert predictor.used == "additive"
    assert sorted(made)[0] <= 122
    assert max(made) == 2000, "the time grows with the cube"
    assert predictor.out_of_fold.shape == (2500,)
    used = _additive.spaced_rows(2500, 2000)
    others = np.setdiff1d(np.arange(2500), used)
    np.testing.assert_allclose(predictor.out_of_fold[others], predictor.predict(F[others]))
    assert not np.allclose(predictor.out_of_fold[used], predictor.predict(F[used]))
    assert kendalltau(predictor.out_of_fold, y).statistic > 0.95


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(grid(4, 4).restricted_to(grid(4, 4).sample(60, rng=1)), id="pool"),
        pytest.param(grid(4, 4).narrowed_to({"x.0": [1, 3], "x.2": [2]}), id="narrowed"),
        pytest.param(conditional().narrowed_to({"depth": [2]}), id="without its last choices"),
        pytest.param(SearchSpace(width=list(range(20))), id="one choice"),
        pytest.param(SearchSpace(op=Choice(list(range(20)), ordered=False)), id="one category"),
        pytest.param(mixed(), id="values that mean the same"),
        pytest.param(
            SearchSpace(
                {
                    f"op.{i}": Choice(list("abcd"), ordered=False, same=[("a", "b")])
                    for i in range(2)
                }
                | {"op.2": Choice(list("xyz"), ordered=False)}
            ),
            id="categories that mean the same",
        ),
        pytest.param(nested(), id="conditions under conditions"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_space(space: SearchSpace) -> None:
    X = space.indices(list(space))
    rng = np.random.default_rng(0)
    X = X[rng.permutation(len(X))]
    F = features(space, X)
    y = space.encode(X) @ np.cumsum(rng.random(space.encode(X).shape[1]))
    half = len(X) * 2 // 3
    predictor = make("additive", space=space).fit(F[:half], y[:half])
    assert predictor.used == "additive"
    mean, std = predictor.predict(F, return_std=True)
    assert (std > 0).all()
    assert kendalltau(mean[:half], y[:half]).statistic > 0.9
    if any(choice.ordered for choice in space.choices.values()):  # else values are unseen
        assert kendalltau(mean[half:], y[half:]).statistic > 0.6


def test_without_a_space_every_column_is_by_itself() -> None:
    rng = np.random.default_rng(0)
    F = rng.random((60, 5))
    y = F @ np.arange(5.0)
    predictor = Additive().fit(F[:40], y[:40])
    assert predictor.effects is None  # type: ignore[attr-defined] # Additive has it
    assert np.abs(predictor.predict(F[40:]) - y[40:]).mean() < 0.1 * y.std()
    assert repr(Additive(random_state=3)) == "Additive(random_state=3)"


# Measured data


def hat(device: str) -> tuple[SearchSpace, np.ndarray, np.ndarray]:
    """Return space, rows and latencies of 2,000 subnets of the HAT Transformer."""
    table = np.genfromtxt(
        data_file(f"hat_latency/wmt14ende_{device}_all.csv"), delimiter=",", names=True
    )
    columns = {n: table[n] for n in table.dtype.names[:10] if np.ptp(table[n]) > 0}
    space = SearchSpace({name: np.unique(column).tolist() for name, column in columns.items()})
    X = np.stack([np.unique(c, return_inverse=True)[1] for c in columns.values()], axis=1)
    return space, X, table["latency_mean_encoder"] + table["latency_mean_decoder"]


def hwgpt(column: str) -> tuple[SearchSpace, np.ndarray, np.ndarray]:
    data_file("hwgpt_s.npz")
    space, X, columns = files.hwgpt()
    return space, X, columns[column]


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (hat, "cpu_xeon"),
        (hat, "gpu_titanxp"),
        (hwgpt, "perplexity"),
        (hwgpt, "latency_ms_a100"),
    ],
)
def test_measured_values_rank_as_with_ridge_after_50(table: Any, name: str) -> None:
    space, X, y = table(name)
    taus: dict[str, list[float]] = {"additive": [], "ridge": []}
    within = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(y))[:550]
        F = features(space, X[order])
        for kind, found in taus.items():
            predictor = make(kind, space=space).fit(F[:50], y[order[:50]])
            assert predictor.used == kind
            mean, std = predictor.predict(F[50:], return_std=True)
            found.append(kendalltau(mean, y[order[50:]]).statistic)
            if kind == "additive":
                within.append(np.mean(np.abs(mean - y[order[50:]]) < std))
    assert np.mean(taus["additive"]) > np.mean(taus["ridge"]) - 0.03, taus
    assert 0.45 < np.mean(within) < 0.9


def test_a_normal_fit_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (6, 12, 150):
            F, y, unseen = sample(n)
            make("additive", space=ops()).fit(F, y).predict(unseen, return_std=True)


def test_a_choice_of_thousands_of_values_has_effects_of_fifty() -> None:
    for ordered in (True, False):
        space = SearchSpace(a=Choice(range(10_000), ordered=ordered), b=[1, 2])
        X = space.sample_indices(60, 0)
        y = np.sin(X[:, 0] / 4000) + X[:, 1]
        fitted = make("additive", space=space).fit(features(space, X[:40]), y[:40])
        assert fitted.used == "additive"
        assert fitted.score(features(space, X[40:]), y[40:]) > 0.6
