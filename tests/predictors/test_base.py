# SPDX-License-Identifier: Apache-2.0
"""Predictors against scikit-learn, SciPy and measured data; fallbacks, errors, determinism."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsRegressor

from lightning_subnet import Choice, Evaluation, History, SearchSpace
from lightning_subnet.errors import PredictorError, PredictorWarning
from lightning_subnet.predictors.auto import Auto
from lightning_subnet.predictors.base import Predictor, Ridge, kendall_tau
from lightning_subnet.predictors.kernel_regression import KernelRegression, Setting
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.quality import report
from lightning_subnet.predictors.registry import make, names
from tests.problems import (
    ROOT,
    assert_clear,
    conditional,
    data_file,
    grid,
    history_of,
    mixed,
    objectives_of,
    problem_of,
)


def sample(n: int = 60, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return features and values of a smooth function with some noise."""
    rng = np.random.default_rng(seed)
    F = rng.random((n, d))
    return F, 5 + F @ np.arange(d) + np.sin(4 * F[:, 0]) + 0.05 * rng.normal(size=n)


class Raises:
    """A regressor that cannot be fitted."""

    def get_params(self, deep: bool = True) -> dict:
        return {}

    def fit(self, F: np.ndarray, y: np.ndarray) -> Raises:
        msg = "out of luck"
        raise RuntimeError(msg)

    def predict(self, F: np.ndarray) -> np.ndarray:
        return np.zeros(len(F))


class Nan(Raises):
    """A regressor that predicts no numbers."""

    def fit(self, F: np.ndarray, y: np.ndarray) -> Nan:
        return self

    def predict(self, F: np.ndarray) -> np.ndarray:
        return np.full(len(F), np.nan)


# Features


def test_features_are_one_hot_then_numbers_then_group_means_and_mask_what_does_not_exist() -> None:
    space = conditional()
    X = space.indices([space.subnet(depth=2, ks=[3, 5, 7, 7])])
    F = features(space, X)[0]
    assert F[:15].tolist() == space.encode(X)[0].tolist()
    assert F[15:20].tolist() == pytest.approx([2 / 4, 3 / 7, 5 / 7, 0, 0])
    assert F[20:].tolist() == pytest.approx([(3 / 7 + 5 / 7) / 4])


def test_categorical_choices_have_no_order_and_other_values_count_by_position() -> None:
    space = SearchSpace(
        {"op": Choice(["conv", "skip"], ordered=False), "size": ["s", "m", "l"], "zero": [0.0, 1.0]}
    )
    F = features(space, space.indices([space.subnet(op="skip", size="m", zero=0.0)]))
    assert F[0, 7:].tolist() == pytest.approx([2 / 3, 0.0])


@pytest.mark.parametrize("space", [conditional(), mixed(), grid(3, 4)])
def test_different_subnets_have_different_features(space: SearchSpace) -> None:
    X = space.indices(list(space))
    assert len(np.unique(features(space, X), axis=0)) == space.size


# Rank correlation


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_that_of_scipy_with_ties_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 12, 80).astype(float), rng.integers(0, 9, 80).astype(float)
    assert kendall_tau(a, a + b)[0] == pytest.approx(kendalltau(a, a + b).statistic, abs=1e-6)


def test_tau_of_what_is_constant_is_zero() -> None:
    assert kendall_tau(np.ones(5), np.arange(5.0)).tolist() == [0.0]


# Against scikit-learn


def test_a_fixed_penalty_is_the_ridge_of_scikit_learn() -> None:
    F, y = sample()
    ours, theirs = Ridge(alpha=0.7).fit(F, y), SklearnRidge(alpha=0.7).fit(F, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)
    np.testing.assert_allclose(ours.predict(F), theirs.predict(F), rtol=1e-8)


def test_leave_one_out_is_what_leaving_out_gives() -> None:
    F, y = sample(25)
    setting = Setting(plain=True)
    error, alpha, left_out = KernelRegression(F, y, setting).leave_one_out()
    by_hand = [
        SklearnRidge(alpha=alpha).fit(np.delete(F, i, 0), np.delete(y, i)).predict(F[[i]])[0]
        for i in range(len(y))
    ]
    np.testing.assert_allclose(left_out, by_hand, rtol=1e-6)
    assert error == pytest.approx(np.mean((y - by_hand) ** 2), rel=1e-4)


@pytest.mark.parametrize("name", names())
def test_the_contract_of_scikit_learn(name: str) -> None:
    F, y = sample()
    copied = clone(make(name, random_state=3))
    assert copied.get_params() == make(name, random_state=3).get_params()
    assert cross_val_score(copied, F, y, cv=2).shape == (2,)
    assert copied.set_params(random_state=4).random_state == 4


# Every predictor


@pytest.mark.parametrize("name", names())
def test_mean_and_uncertainty(name: str) -> None:
    F, y = sample(160)
    fitted = make(name).fit(F[:100], y[:100])
    mean, std = fitted.predict(F[100:], return_std=True)
    assert fitted.used == name
    assert mean.shape == std.shape == (60,)
    assert np.array_equal(mean, fitted.predict(F[100:]))
    assert (std > 0).all()
    assert fitted.score(F[100:], y[100:]) > 0.6
    assert kendalltau(fitted.out_of_fold, y[:100]).statistic > 0.5  # and is not the fit itself
    assert not np.allclose(fitted.out_of_fold, fitted.predict(F[:100]))


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 10])
@pytest.mark.filterwarnings("ignore::lightning_subnet.errors.PredictorWarning")
def test_few_samples(name: str, n: int) -> None:
    F, y = sample(n)
    mean, std = make(name).fit(F, y).predict(np.vstack([F, F + 0.1]), return_std=True)
    assert np.isfinite(mean).all()
    assert (std > 0).all()


@pytest.mark.parametrize("name", names())
def test_a_constant_is_predicted_as_it_is_and_told(name: str) -> None:
    F, _ = sample(40)
    with pytest.warns(PredictorWarning, match="all equal; 'mean' takes its place"):
        fitted = make(name).fit(F, np.full(40, 7.0))
    mean, std = fitted.predict(F, return_std=True)
    assert (mean == 7.0).all()
    assert (std > 0).all()


@pytest.mark.parametrize("name", names())
def test_repeated_rows_and_columns_that_say_nothing(name: str) -> None:
    F, y = sample(30)
    F = np.hstack([np.vstack([F, F]), np.zeros((60, 2)), np.ones((60, 1))])
    fitted = make(name).fit(F, np.concatenate([y, y + 0.01]))
    assert fitted.used == name
    assert np.isfinite(fitted.predict(F)).all()
    make(name).fit(np.ones((20, 3)), np.arange(20.0)).predict(np.ones((2, 3)))


@pytest.mark.parametrize("name", ["ridge", "svr", "stack", "auto"])
def test_values_of_any_scale_and_sign(name: str) -> None:
    F, y = sample(60)
    base = make(name).fit(F, y - 7).predict(F)
    scaled = make(name).fit(F, (y - 7) * 1e9).predict(F)
    np.testing.assert_allclose(scaled / 1e9, base, atol=1e-6)


def test_the_logarithm_is_taken_where_it_ranks_better() -> None:
    F, y = sample(60)
    assert Ridge().fit(F, np.exp(2 * y)).setting.log
    assert not Ridge().fit(F, F @ np.arange(6) + 1).setting.log


def test_a_normal_fit_warns_of_nothing() -> None:
    F, y = sample(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in names():
            make(name).fit(F, y).predict(F, return_std=True)
        for n in (4, 6, 9):
            make("auto").fit(F[:n], y[:n])


def test_another_process_predicts_the_same() -> None:
    code = (
        "import numpy as np\n"
        "from lightning_subnet.predictors.registry import make, names\n"
        "F = np.random.default_rng(0).random((40, 5)); y = F.sum(1) + F[:, 0] * F[:, 1]\n"
        "for name in names():\n"
        "    fitted = make(name, random_state=1).fit(F, y)\n"
        "    print(name, *(v.tobytes().hex() for v in fitted.predict(F + .1, return_std=True)))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        ).stdout
        for seed in ("0", "7")
    }
    assert len(outputs) == 1


def test_ridge_needs_no_scikit_learn() -> None:
    code = (
        "import sys, numpy as np\n"
        "from lightning_subnet.predictors.registry import make\n"
        "F = np.random.default_rng(0).random((20, 3)); make('ridge').fit(F, F[:, 0]).predict(F)\n"
        "assert not {'sklearn', 'torch', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Fallbacks


def test_too_few_samples_are_told_once() -> None:
    F, y = sample(6)
    with pytest.warns(PredictorWarning, match="'boosting' needs 10 samples or more; 'ridge'"):
        fitted = make("boosting").fit(F, y)
    assert fitted.used == "ridge"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("boosting").fit(F, y)


class RaisesNumbers(Raises):
    """A regressor whose errors have numbers, and one other error."""

    def __init__(self, other: bool = False) -> None:
        self.other = other

    def get_params(self, deep: bool = True) -> dict:
        return {"other": self.other}

    def fit(self, F: np.ndarray, y: np.ndarray) -> Raises:
        if self.other:
            raise KeyError(len(F))
        msg = f"the pivot {y.min()} of {len(F)} is too small"
        raise ValueError(msg)


def test_one_cause_is_told_once_whatever_its_numbers() -> None:
    F, y = sample(30)
    with pytest.warns(PredictorWarning, match="of 30 is too small") as caught:
        make(RaisesNumbers()).fit(F, y)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(RaisesNumbers()).fit(F[:20], y[:20])
    with pytest.warns(PredictorWarning, match="raised KeyError"):
        make(RaisesNumbers(other=True)).fit(F, y)


def test_a_predictor_that_raises_is_replaced_and_named() -> None:
    F, y = sample(30)
    with pytest.warns(PredictorWarning, match="'Raises' raised RuntimeError: out of luck; 'ridge'"):
        fitted = make(Raises()).fit(F, y)
    assert np.array_equal(fitted.predict(F), make("ridge").fit(F, y).predict(F))
    with pytest.warns(PredictorWarning, match="NaN or infinity; 'ridge'"):
        make(Nan()).fit(F, y)
    with pytest.warns(PredictorWarning, match="'auto' raised ValueError: none of its candidates"):
        Auto([Raises()]).fit(F, y)


def test_the_uncertainty_of_left_out_rows_is_that_of_what_predicts() -> None:
    F, y = sample(30)
    ridge = make("ridge").fit(F, y)
    assert ridge.out_of_fold_std.shape == (30,)
    assert (ridge.out_of_fold_std > 0).all()
    within = np.abs(y - ridge.out_of_fold) <= ridge.out_of_fold_std * (1 + 1e-9)
    assert 0.68 <= within.mean() <= 0.75
    with pytest.warns(PredictorWarning, match="'Raises' raised"):
        other = make(Raises()).fit(F, y)
    assert np.array_equal(other.out_of_fold_std, ridge.out_of_fold_std)


def test_auto_mixes_a_member_that_was_replaced_on_more_rows() -> None:
    class OnlyFew(SklearnRidge):
        def fit(self, X: np.ndarray, y: np.ndarray) -> OnlyFew:
            if len(X) > 100:
                msg = "too many rows"
                raise ValueError(msg)
            return super().fit(X, y)

    F, y = sample(111)
    auto = Auto([OnlyFew()])
    with pytest.warns(
        PredictorWarning, match="'OnlyFew' raised ValueError: too many rows; 'ridge'"
    ):
        auto.fit(F, y)  # it is chosen on the first 100 rows
    assert auto.used == "auto"
    np.testing.assert_array_equal(auto.out_of_fold, make("ridge").fit(F, y).out_of_fold)


# Estimators of the user


@pytest.mark.parametrize("estimator", [KNeighborsRegressor(3), GaussianProcessRegressor()])
def test_a_regressor_of_scikit_learn_plugs_in(estimator: object) -> None:
    F, y = sample(50)
    fitted = make(estimator).fit(F, y)
    mean, std = fitted.predict(F + 0.01, return_std=True)
    assert fitted.used == type(estimator).__name__
    assert mean.shape == std.shape == (50,)
    assert (std > 0).all()
    assert not hasattr(estimator, "n_features_in_")  # a copy was fitted
    auto = Auto(["ridge", estimator]).fit(F, y)
    assert set(auto.scores) == {"ridge", type(estimator).__name__}


def test_a_predictor_is_copied_with_its_settings() -> None:
    given = Ridge(alpha=2.0, random_state=5)
    copied = make(given)
    assert copied is not given
    assert copied.get_params() == {"alpha": 2.0, "random_state": 5}


# The choice


def test_auto_takes_what_ranks_better_and_says_how_it_scored() -> None:
    rng = np.random.default_rng(0)
    F = rng.random((80, 3))
    y = np.sin(9 * F[:, 0]) + F[:, 1] ** 2
    auto = Auto(("ridge", "stack")).fit(F, y)
    assert auto.chosen == ("stack",)
    assert auto.scores["stack"][0] > auto.scores["ridge"][0] + 0.1
    assert auto.scores["stack"][1] >= 0
    assert auto.weights == (1.0,)


def test_auto_mixes_what_the_samples_do_not_tell_apart() -> None:
    rng = np.random.default_rng(0)
    F = rng.random((25, 6))
    y = F @ np.arange(1.0, 7.0) + rng.normal(0, 3, 25)
    auto = Auto(("ridge", "svr")).fit(F, y)
    assert auto.chosen == ("ridge", "svr")
    assert sum(auto.weights) == pytest.approx(1)
    assert min(auto.weights) > 0.05
    unseen = rng.random((7, 6))
    alone = [make(name).fit(F, y).predict(unseen, return_std=True) for name in auto.chosen]
    mean, std = auto.predict(unseen, return_std=True)
    draws = rng.choice(2, 200_000, p=auto.weights)
    for i in range(len(unseen)):
        at = np.array([[m[i], s[i]] for m, s in alone])[draws]
        drawn = rng.normal(at[:, 0], at[:, 1])
        assert mean[i] == pytest.approx(drawn.mean(), abs=0.03 * std[i])
        assert std[i] == pytest.approx(drawn.std(), rel=0.02)


def test_the_weights_of_auto_are_shares_of_bootstrap_draws() -> None:
    rng = np.random.default_rng(1)
    y = rng.normal(size=12)
    predictions = [y + rng.normal(size=12) for _ in range(3)]
    predictions[2][4] = np.nan  # no tree left it out
    wins = np.zeros(3)
    for w in np.random.default_rng(0).dirichlet(np.ones(12), 256):
        taus = [
            sum(
                w[i] * w[j] * ((p[i] > p[j]) * 2 - 1) * ((y[i] > y[j]) * 2 - 1)
                for i in range(12)
                for j in range(12)
                if i != j and np.isfinite([p[i], p[j]]).all()
            )
            for p in predictions
        ]
        wins[int(np.argmax(taus))] += 1
    assert Auto()._shares(predictions, y).tolist() == (wins / 256).tolist()


def test_the_choice_depends_on_the_rows_and_not_on_earlier_fits() -> None:
    F, y = sample(130)
    grown = Auto()
    for n in range(5, 131, 25):
        grown.fit(F[:n], y[:n])
        fresh = Auto().fit(F[:n], y[:n])
        assert grown.chosen == fresh.chosen
        assert np.array_equal(grown.predict(F), fresh.predict(F))


def test_the_choice_is_made_anew_as_the_history_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    decided, decide = [], Auto._decide

    def noted(self: Auto, F: np.ndarray, y: np.ndarray) -> None:
        decided.append(len(y))
        decide(self, F, y)

    monkeypatch.setattr(Auto, "_decide", noted)
    F, y = sample(200)
    auto = Auto(("ridge",))
    for n in range(20, 201, 5):
        auto.fit(F[:n], y[:n])
    assert decided == [20, 25, 29, 35, 42, 50, 59, 70, 84, 100, 118, 141, 168, 200]


# Messages


def test_data_that_nothing_can_learn_from() -> None:
    F, y = sample(20)
    bad = F.copy()
    bad[4, 2] = np.nan
    for call, parts in (
        (lambda: make("ridge").fit(bad, y), ["F[4, 2] is nan"]),
        (lambda: make("ridge").fit(F, np.where(y == y[3], np.inf, y)), ["y[3] is inf"]),
        (lambda: make("ridge").fit(F, y[:5]), ["(5,)", "20 rows"]),
        (lambda: make("ridge").fit(F[:0], y[:0]), ["one value"]),
        (lambda: make("ridge").fit(F[0], y), ["(6,)", "matrix"]),
        (lambda: make("ridge").predict(F), ["not fitted"]),
        (lambda: make("ridge").fit(F, y).predict(F[:, :2]), ["2 columns", "6"]),
        (lambda: make("ridge").fit(F, y).predict(bad), ["F[4, 2]"]),
        (lambda: Ridge().set_params(aplha=1), ["aplha"]),
    ):
        with pytest.raises(PredictorError) as caught:
            call()
        assert_clear(caught.value, *parts)


def test_no_rows_to_predict() -> None:
    F, y = sample(20)
    mean, std = make("auto").fit(F, y).predict(F[:0], return_std=True)
    assert mean.shape == std.shape == (0,)


# The report


@pytest.mark.filterwarnings("ignore::lightning_subnet.errors.PredictorWarning")
def test_the_report_has_a_row_for_each_measure() -> None:
    problem = problem_of(grid(4, 4))
    history = history_of(problem, problem.space.sample(40, rng=0), failed=lambda i: i % 4 == 0)
    table = report(problem.space, history, ["f0", "cost", "unknown"])
    assert table.index.tolist() == ["f0", "cost", "unknown"]
    assert table.n.tolist() == [30, 30, 0]
    assert (table.tau[["f0", "cost"]] > 0.8).all()
    assert table.mape["cost"] < 5
    assert set(table.predictor["f0"].split("+")) <= {"ridge", "svr", "stack", "additive"}
    assert np.isnan(table.tau["unknown"])
    subnet = problem.space.sample(1, rng=0)[0]
    one = History(problem.space, [Evaluation(0, subnet, objectives_of(subnet))])
    assert report(problem.space, one, ["f0"]).predictor.tolist() == ["mean"]


# Measured data


def hat(device: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features and latencies of 2,000 subnets of the HAT Transformer."""
    table = np.genfromtxt(
        data_file(f"hat_latency/wmt14ende_{device}_all.csv"), delimiter=",", names=True
    )
    columns = {n: table[n] for n in table.dtype.names[:10] if np.ptp(table[n]) > 0}
    space = SearchSpace({name: np.unique(column).tolist() for name, column in columns.items()})
    X = np.stack([np.unique(c, return_inverse=True)[1] for c in columns.values()], axis=1)
    return features(space, X), table["latency_mean_encoder"] + table["latency_mean_decoder"]


# PEERS.md: the linear model on HAT's latencies with 100 samples, median of ten seeds; the margin is
# that of three seeds.
@pytest.mark.parametrize(
    ("device", "peer"), [("cpu_raspberrypi", 0.845), ("cpu_xeon", 0.88), ("gpu_titanxp", 0.819)]
)
def test_real_latencies_rank_as_well_as_the_best_peer_does(device: str, peer: float) -> None:
    F, y = hat(device)
    taus, within = [], []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(y))
        unseen, seen = order[:500], order[500:600]
        fitted: Predictor = make("auto").fit(F[seen], y[seen])
        mean, std = fitted.predict(F[unseen], return_std=True)
        taus.append(kendalltau(mean, y[unseen]).statistic)
        within.append([np.mean(np.abs(mean - y[unseen]) < k * std) for k in (1, 2)])
    assert np.median(taus) > peer - 0.02
    one, two = np.mean(within, axis=0)
    assert 0.5 < one < 0.85
    assert two > 0.8


@pytest.mark.filterwarnings("ignore::lightning_subnet.errors.PredictorWarning")
@pytest.mark.parametrize("fails", ["nan", "raises"])
def test_a_predictor_that_fails_after_its_fit_is_replaced(fails: str) -> None:
    class Late(SklearnRidge):
        def predict(self, X: np.ndarray) -> np.ndarray:
            if len(X) <= 60:
                return super().predict(X)
            if fails == "raises":
                raise ValueError("too many rows")
            return np.full(len(X), np.nan)

    F, y = sample(160)
    fitted = make(Late()).fit(F[:50], y[:50])
    assert fitted.used == "Late"
    mean, std = fitted.predict(F, return_std=True)
    assert fitted.used == "ridge"
    np.testing.assert_array_equal(mean, make("ridge").fit(F[:50], y[:50]).predict(F))
    assert np.isfinite(std).all()
