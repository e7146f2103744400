# SPDX-License-Identifier: Apache-2.0
"""Gaussian processes against scikit-learn, GPyTorch and BoTorch; the predictor on measured data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple

import numpy as np
import pytest
import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.kernels import CategoricalKernel
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import LinearKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from scipy.optimize import check_grad
from scipy.stats import kendalltau
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct

from lightning_subnet import Choice, SearchSpace
from lightning_subnet.errors import PredictorWarning
from lightning_subnet.predictors import _gpytorch as _gp, gaussian_process as _gaussian
from lightning_subnet.predictors.gaussian_process import GP, Gaussian, Kernel
from lightning_subnet.predictors.kernel_regression import Setting, squared_distances
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make
from tests.predictors.test_base import hat

KERNEL = Kernel(0.8, 0.6, 0.7, 0.3, 1.4, 0.05)
FAR = 1e9  # a length scale at which a column does not matter


def space() -> SearchSpace:
    ops = Choice(["conv", "pool", "skip"], ordered=False)
    return SearchSpace(
        {"depth": [1, 2, 3]}
        | {f"width.{i}": [8, 16, 24, 32] for i in range(3)}
        | {f"op.{i}": ops for i in range(3)}
    )


def sample(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features (n, d), standardised values (n,), and features of unseen subnets (25, d)."""
    X = space().sample_indices(n + 25, seed)
    F = features(space(), X)
    y = X[:, 0] * X[:, 1] + np.sin(X[:, 2]) - 2.0 * (X[:, 4] == 1) + (X[:, 5] == X[:, 6])
    y = (y - y[:n].mean()) / y[:n].std()
    return F[:n], y[:n], F[n:]


def lengths(gp: Gaussian) -> list[np.ndarray]:
    """Return the length scale of each feature in the RBF and in the Hamming part."""
    made = []
    scales = (gp.kernel.rbf_length, gp.kernel.hamming_length)
    for of, scale, length in zip(gp.columns, gp.scales, scales, strict=True):
        each = np.full(len(gp.weight), FAR)
        each[of] = length / scale
        made.append(each)
    return made


def single_task_gp(gp: Gaussian, F: np.ndarray) -> SingleTaskGP:
    """Return BoTorch's model with the same kernel, on centred features."""
    d = F.shape[1]
    linear = LinearKernel(ard_num_dims=d)
    linear.variance = torch.tensor(np.maximum(gp.kernel.linear * gp.weight**2, 1e-12))
    covariance = linear
    for each, variance in zip(lengths(gp), (gp.kernel.rbf, gp.kernel.hamming), strict=True):
        part = ScaleKernel(RBFKernel(ard_num_dims=d))
        part.base_kernel.lengthscale, part.outputscale = torch.tensor(each), variance
        covariance = covariance + part
    model = SingleTaskGP(
        torch.tensor(F - gp.centre),
        torch.tensor(gp.z)[:, None],
        likelihood=GaussianLikelihood(noise_constraint=GreaterThan(1e-7)),
        covar_module=covariance,
        mean_module=ZeroMean(),
        outcome_transform=None,
    ).double()
    model.likelihood.noise = gp.kernel.noise
    return model.eval()


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep BoTorch from compiling a kernel for half a minute."""
    monkeypatch.setattr(logei, "_load_attempted", True, raising=False)


# Against scikit-learn


def test_the_posterior_is_that_of_scikit_learn() -> None:
    F, z, unseen = sample()
    gp = Gaussian(F, z, KERNEL)
    numbers, indicators = lengths(gp)
    weight = gp.weight  # scikit-learn's linear kernel has no weights: they go into the columns
    kernel = (
        ConstantKernel(KERNEL.linear) * DotProduct(1e-9)
        + ConstantKernel(KERNEL.rbf) * RBF(numbers * weight + 1e-12)
        + ConstantKernel(KERNEL.hamming) * RBF(indicators * weight + 1e-12)
    )
    theirs = GaussianProcessRegressor(kernel, alpha=KERNEL.noise, optimizer=None)
    theirs.fit(gp.rows[0], z)
    mean, cov = theirs.predict(gp.blocks(unseen)[0], return_cov=True)
    ours, std = gp.predict(unseen)
    np.testing.assert_allclose(ours, mean, atol=1e-8)
    np.testing.assert_allclose(std**2, np.diag(cov) + KERNEL.noise, atol=1e-8)
    joint_mean, joint = _gp.posterior_of(gp, unseen)
    np.testing.assert_allclose(joint_mean, mean, atol=1e-8)
    np.testing.assert_allclose(joint, cov, atol=1e-6)
    gram = gp.rows[0] @ gp.rows[0].T
    squares = [squared_distances(rows, rows) for rows in gp.rows[1:]]
    value, _ = _gaussian._log_density(np.log(astuple(KERNEL)), gram, squares, z, [True, True])
    constant = -0.5 * len(z) * np.log(2 * np.pi)
    assert value + constant == pytest.approx(theirs.log_marginal_likelihood_value_)


def test_leave_one_out_is_what_leaving_out_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gaussian, "_WEIGHTS", Setting(plain=True))  # the same for all rows but one
    F, z, _ = sample(20)
    whole = Gaussian(F, z, KERNEL)
    mean, std = whole.leave_one_out()
    for i in range(len(z)):
        rest = np.delete(np.arange(len(z)), i)
        part = Gaussian(F[rest], z[rest], KERNEL)
        part.centre, part.scales, part.columns = whole.centre, whole.scales, whole.columns
        part.rows = part.blocks(F[rest])
        gram = part.prior(part.rows, part.rows)
        part.chol = np.linalg.cholesky(gram + KERNEL.noise * np.eye(len(rest)))
        part.dual = part.solve(z[rest])
        at, spread = part.predict(F[[i]])
        assert at[0] == pytest.approx(mean[i], abs=1e-8)
        assert spread[0] == pytest.approx(std[i], abs=1e-8)


def test_the_slope_of_the_likelihood_and_its_maximum() -> None:
    F, z, _ = sample()
    gp = Gaussian(F, z)
    gram = gp.rows[0] @ gp.rows[0].T
    squares = [squared_distances(rows, rows) for rows in gp.rows[1:]]

    def density(theta: np.ndarray) -> tuple[float, np.ndarray]:
        return _gaussian._log_density(theta, gram, squares, z, [True, True])

    for kernel in (KERNEL, Kernel()):
        theta = np.log(astuple(kernel))
        gap = check_grad(lambda t: density(t)[0], lambda t: density(t)[1], theta)
        assert gap < 1e-4 * np.linalg.norm(density(theta)[1])

    def posterior(kernel: Kernel) -> float:
        theta = np.log(astuple(kernel))
        off = (theta - _gaussian._PRIOR) / _gaussian._PRIOR_STD
        return density(theta)[0] - 0.5 * float((off**2).sum())

    found = posterior(gp.kernel)
    assert found > posterior(Kernel()) + 1
    rng = np.random.default_rng(0)
    for _ in range(30):  # no nearby hyperparameters are more likely
        near = np.exp(np.log(astuple(gp.kernel)) + 0.3 * rng.normal(size=6))
        assert posterior(Kernel(*near)) < found + 0.05


def test_the_hamming_part_is_the_categorical_kernel() -> None:
    ops = Choice(["conv", "pool", "skip"], ordered=False)
    cells = SearchSpace({f"op.{i}": ops for i in range(4)})
    X = cells.indices(list(cells))  # all of them: each column varies alike
    kernel = Kernel(1e-12, 0.0, 1.0, 0.7, 0.9, 0.1)
    gp = Gaussian(cells.encode(X), np.random.default_rng(0).normal(size=len(X)), kernel)
    ours = gp.prior(gp.rows, gp.rows)
    theirs = CategoricalKernel()
    # Two draws differ in 4 * 2/3 choices on average, which is the distance 1.
    theirs.lengthscale = 4 * 2 / 3 * 2 * kernel.hamming_length**2 / 4
    expected = theirs(torch.tensor(X, dtype=torch.double)).to_dense().detach().numpy()
    np.testing.assert_allclose(ours, 0.7 * expected, atol=1e-6)


# Against BoTorch

SETTINGS = {"samples": 16, "seed": 11}


def two(n: int = 24) -> tuple[list[Gaussian], np.ndarray, np.ndarray, np.ndarray]:
    """Return two processes in conflict, the rows they saw, unseen rows, and a reference point."""
    F, z, unseen = sample(n)
    cost = F[:, -5:].sum(axis=1)
    other = -(cost - cost.mean()) / cost.std() + 0.1 * z
    gps = [Gaussian(F, z), Gaussian(F, other)]
    return gps, F, unseen, np.array([z.min() - 0.3, other.min() - 0.3])


def seen_rows(acquisition: _gp.Acquisition) -> np.ndarray:
    """Return the measured and pending rows that an acquisition function integrates over."""
    ids = acquisition.function.X_baseline[:, 0].long().numpy()
    return acquisition.model.rows[ids]


def oracle(
    gps: list[Gaussian],
    F: np.ndarray,
    baseline: np.ndarray,
    reference: np.ndarray,
    *,
    limits: Sequence[_gp.Limit] = (),
    pending: np.ndarray | None = None,
    samples: int = 16,
    seed: int = 11,
    max_iep: int = 0,
) -> Callable[[np.ndarray], np.ndarray]:
    """Return BoTorch's own acquisition function on BoTorch's own models, of features."""
    centre = gps[0].centre
    models = [single_task_gp(gp, F) for gp in gps]
    given = {
        "model": ModelListGP(*models) if len(models) > 1 else models[0],
        "X_baseline": torch.tensor(baseline - centre),
        "X_pending": None if pending is None else torch.tensor(pending - centre),
        "sampler": SobolQMCNormalSampler(torch.Size([samples]), seed=seed),
        "constraints": [lambda Z, k=k, s=s, b=b: s * (Z[..., k] - b) for k, s, b in limits] or None,
        "prune_baseline": False,
        # With one objective the cache draws the front's samples apart from the new one's.
        "cache_root": len(reference) > 1,
    }
    if len(reference) == 1:
        first = GenericMCObjective(lambda Z, X=None: Z[..., 0])
        function = qLogNoisyExpectedImprovement(objective=first, **given)
    else:
        some = IdentityMCMultiOutputObjective(outcomes=list(range(len(reference))))
        function = qLogNoisyExpectedHypervolumeImprovement(
            ref_point=torch.tensor(reference), objective=some, max_iep=max_iep, **given
        )
    return lambda rows: function(torch.tensor(rows - centre)[:, None]).detach().numpy()


@pytest.mark.parametrize("limits", [(), ((0, 1.0, 0.4),), ((1, -1.0, 0.2), (0, 1.0, 0.9))])
@pytest.mark.parametrize("m", [1, 2])
def test_the_improvement_is_that_of_botorch(m: int, limits: tuple[_gp.Limit, ...]) -> None:
    gps, F, unseen, reference = two()
    given = {"limits": limits, "reference": reference[:m]}
    with _gp.one_seed(3):
        ours = _gp.Acquisition(gps, measured=F, pending=F[:0], **given, **SETTINGS)
        baseline = seen_rows(ours)
        assert 1 <= len(baseline) <= len(F)
        got = ours(unseen)
        expected = oracle(gps, F, baseline, **given)(unseen)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
        assert np.ptp(got) > 0.5
        ours.choose(unseen[:1])
        expected = oracle(gps, F, baseline, pending=unseen[:1], **given)(unseen[1:])
        np.testing.assert_allclose(ours(unseen[1:]), expected, rtol=1e-3, atol=1e-3)


def test_what_is_pending_counts_as_what_is_chosen_does() -> None:
    gps, F, unseen, reference = two()
    given = {"limits": (), "measured": F, "reference": reference, "samples": 512, "seed": 1}
    with _gp.one_seed(3):
        waits = _gp.Acquisition(gps, pending=unseen[:2], **given)
        chosen = _gp.Acquisition(gps, pending=F[:0], **given)
        before = np.exp(chosen(unseen[2:]))
        chosen.choose(unseen[:1])
        chosen.choose(unseen[1:2])
        one, other = np.exp(waits(unseen[2:])), np.exp(chosen(unseen[2:]))
    assert np.abs(one - other).max() < 0.05 * one.max()  # they differ in their samples alone
    assert np.abs(one - before).max() > 0.1 * one.max()


@pytest.mark.parametrize("m", [3, 4])
def test_many_objectives_count_the_chosen_by_inclusion_and_exclusion(m: int) -> None:
    gps, F, unseen, _ = two()
    gps += [Gaussian(F, np.roll(gps[0].z, k)) for k in range(1, m - 1)]
    reference = np.array([gp.z.min() - 0.3 for gp in gps])
    given = {"limits": (), "reference": reference}
    with _gp.one_seed(3):
        ours = _gp.Acquisition(gps, measured=F, pending=F[:0], **given, samples=24, seed=11)
        baseline = seen_rows(ours)
        for row in unseen[:2]:
            ours.choose(row[None])
        assert len(ours.function.X_baseline) == len(baseline), "the boxes were not made anew"
        pending = unseen[:2]
        some = oracle(
            gps, F, baseline, **given, pending=pending, samples=24 // _gp._SHARE[m], max_iep=4
        )
        np.testing.assert_allclose(ours(unseen[2:]), some(unseen[2:]), rtol=1e-3, atol=1e-3)


def test_a_value_that_is_computed_is_known() -> None:
    gps, F, unseen, reference = two()
    rows = np.column_stack([F, F.sum(axis=1) - 5])
    mean, cov = _gp.posterior_of(rows.shape[1] - 1, rows)
    assert np.array_equal(mean, rows[:, -1])
    assert np.abs(cov).max() < 1e-6
    more = np.column_stack([unseen, unseen.sum(axis=1) - 5])
    outcomes: list[_gp.Outcome] = [gps[0], rows.shape[1] - 1]
    floor = np.array([reference[0], rows[:, -1].min() - 0.3])
    with _gp.one_seed(0):
        values = _gp.Acquisition(outcomes, (), rows, rows[:0], floor, **SETTINGS)(more)
    better = more[:, -1] > rows[:, -1].max()
    assert better.any()
    assert values[better].min() > np.median(values)


def test_the_surroundings_of_botorch_are_given_back() -> None:
    gps, F, unseen, reference = two()
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    before = logei._C, logei._load_attempted
    with _gp.one_seed(3):
        _gp.Acquisition(gps, (), F, F[:0], reference, **SETTINGS)(unseen)
        assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert (logei._C, logei._load_attempted) == before


# The predictor


# PEERS.md: the linear model on HAT's latencies with 100 samples, median of ten seeds.
@pytest.mark.parametrize(
    ("device", "peer"), [("cpu_raspberrypi", 0.845), ("cpu_xeon", 0.88), ("gpu_titanxp", 0.819)]
)
def test_real_latencies_rank(device: str, peer: float) -> None:
    F, y = hat(device)
    taus, within = [], []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(y))
        unseen, seen = order[:500], order[500:600]
        fitted = make("gp").fit(F[seen], y[seen])
        assert fitted.used == "gp"
        mean, std = fitted.predict(F[unseen], return_std=True)
        taus.append(kendalltau(mean, y[unseen]).statistic)
        within.append([np.mean(np.abs(mean - y[unseen]) < k * std) for k in (1, 2)])
    assert np.median(taus) > peer - 0.03
    one, two_stds = np.mean(within, axis=0)
    assert 0.5 < one < 0.85
    assert two_stds > 0.8


def test_thousands_of_rows_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gaussian, "KERNEL_ROWS", 60)
    F, z, _ = sample(200)
    fitted = GP().fit(F, z)
    assert len(fitted._model.z) == 60
    assert fitted.out_of_fold.shape == (200,)
    used = _gaussian.spaced_rows(200, 60)
    others = np.setdiff1d(np.arange(200), used)
    np.testing.assert_allclose(fitted.out_of_fold[others], fitted.predict(F[others]))
    assert not np.allclose(fitted.out_of_fold[used], fitted.predict(F[used]))
    assert kendalltau(fitted.out_of_fold, z).statistic > 0.7


def test_a_fit_does_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, density = [], _gaussian._log_density

    def noted(*given: object) -> object:
        counted.append(len(given[3]))  # type: ignore[arg-type] # the targets
        return density(*given)  # type: ignore[arg-type] # passed on

    monkeypatch.setattr(_gaussian, "_log_density", noted)
    rng = np.random.default_rng(0)
    F = rng.random((900, 150))
    start = time.perf_counter()
    Gaussian(F, rng.normal(size=900))
    assert max(counted) == 400, f"{time.perf_counter() - start:.1f} s"
    assert len(counted) < 80


def test_few_or_equal_values_are_left_to_others() -> None:
    F, z, unseen = sample(7)
    with pytest.warns(PredictorWarning, match="'gp' needs 8 samples or more; 'ridge'"):
        assert make("gp").fit(F, z).used == "ridge"
    F, _, unseen = sample(20)
    with pytest.warns(PredictorWarning, match="'gp' cannot learn from values that are all equal"):
        assert np.array_equal(make("gp").fit(F, np.ones(20)).predict(unseen), np.ones(len(unseen)))


def test_a_kernel_matrix_that_is_not_positive_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gaussian.Gaussian, "_noise", lambda self, n: -np.eye(n))
    F, z, unseen = sample(20)
    with pytest.warns(PredictorWarning, match="'gp' raised LinAlgError.*'ridge'"):
        fitted = make("gp").fit(F, z)
    assert np.array_equal(fitted.predict(unseen), make("ridge").fit(F, z).predict(unseen))
