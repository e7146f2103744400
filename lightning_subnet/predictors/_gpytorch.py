# SPDX-License-Identifier: Apache-2.0
"""The only file that imports BoTorch and GPyTorch, inside its functions, and torch so far down.

Acquisition functions are BoTorch's. The Gaussian processes are not: BoTorch asks a model for its
posterior, and gets that of `Gaussian`, which has a kernel for columns of numbers and indicators, is
fitted without torch, and is the same as that of the predictor "gp".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np

from lightning_subnet._types import Floats
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.predictors.gaussian_process import Gaussian

_JITTER = 1e-8  # of the prior variance; also the variance of what is computed exactly
_PRUNING = 256  # samples that decide which measured subnets may be on the front
_SHARE = {3: 4, 4: 8}  # of the samples that are taken, by number of objectives
_UNCACHED = 4
_CHUNK = 2_000_000  # numbers in one tensor of an acquisition function

Outcome = Gaussian | int  # a process, or the column of a row that is the value itself
Limit = tuple[int, float, float]  # outcome k is feasible where sign * (value - level) <= 0


class Acquisition:
    """Expected improvement of rows over a measured front, as BoTorch computes it.

    Outcomes are maximised. With two objectives or more it is qLogNoisyExpectedHypervolume-
    Improvement, with one qLogNoisyExpectedImprovement; limits are outcome constraints. The values
    of measured and of pending rows are integrated over, by joint samples of the posterior.

    Args:
        outcomes: First the objectives, then those that only limits refer to.
        limits: Outcome constraints.
        measured: The rows (n, d) measured so far. Those without a chance to be on the front are
            left out.
        pending: The rows (k, d) that are being measured.
        reference: The reference point (m,) of m objectives.
        samples: The number of samples of the posterior. Each has a front of its own, whose
            decomposition into boxes is slow beyond two objectives: with three a quarter is taken,
            with four an eighth.
        seed: Of the samples, which are quasi-random.

    References:
        Daulton, Balandat and Bakshy, Parallel Bayesian Optimization of Multiple Noisy Objectives
        with Expected Hypervolume Improvement, NeurIPS 2021; Ament et al., Unexpected Improvements
        to Expected Improvement for Bayesian Optimization, NeurIPS 2023.
    """

    def __init__(
        self,
        outcomes: Sequence[Outcome],
        limits: Sequence[Limit],
        measured: Floats,
        pending: Floats,
        reference: Floats,
        *,
        samples: int,
        seed: int,
    ) -> None:
        self.model = _row_model()(outcomes, measured)
        self.limits, self.reference = limits, reference
        self.samples, self.seed = max(samples // _SHARE.get(len(reference), 1), 2), seed
        baseline = self._pruned(len(measured))
        self._choices = self._ids(pending)[:0]
        self.function = self._built(_joined(baseline, self._add(pending)))

    def choose(self, rows: Floats) -> None:
        """Take rows (k, d) as pending too."""
        self._choices = _joined(self._choices, self._add(rows))
        self.function.set_X_pending(self._choices)

    @property
    def work(self) -> int:
        """The numbers in the largest tensor for one row."""
        cells = getattr(self.function, "cell_lower_bounds", None)
        wide = 4 if cells is None else int(cells.shape[-2]) * len(self.reference)
        if len(self._choices) <= self._uncached:
            wide <<= len(self._choices)
        joint = len(self.function.X_baseline) + len(self._choices) + 1
        return self.samples * max(wide, joint * len(self.model.outcomes))

    @property
    def _uncached(self) -> int:
        """The most rows that count by inclusion and exclusion before boxes are made anew."""
        return _UNCACHED if len(self.reference) in _SHARE else 0

    def __call__(self, rows: Floats) -> Floats:
        """Return the logarithm of the expected improvement of each row (n, d) alone, (n,)."""
        rows_before = self.model.rows
        step = max(_CHUNK // self.work, 1)
        parts = []
        for at in range(0, len(rows), step):
            ids = self._add(rows[at : at + step])
            parts.append(self.function(ids[:, None]).numpy())
            self.model.rows = rows_before
        scores: Floats = np.concatenate([np.zeros(0), *parts])
        return np.where(np.isnan(scores), -np.inf, scores)

    def _ids(self, rows: Floats) -> Any:
        """Return the numbers (n, 1) that rows put at the end of the model's will have."""
        import torch

        start = len(self.model.rows)
        return torch.arange(start, start + len(rows), dtype=torch.double)[:, None]

    def _add(self, rows: Floats) -> Any:
        """Put rows at the end of the model's and return their numbers (n, 1)."""
        ids = self._ids(rows)
        self.model.rows = np.concatenate([self.model.rows, rows])
        return ids

    def _objective(self) -> Any:
        from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
        from botorch.acquisition.objective import GenericMCObjective

        if len(self.reference) == 1:
            return GenericMCObjective(_first)
        return IdentityMCMultiOutputObjective(outcomes=list(range(len(self.reference))))

    def _constraints(self) -> list[Callable[[Any], Any]] | None:
        def within(limit: Limit) -> Callable[[Any], Any]:
            k, sign, level = limit
            return lambda Z: sign * (Z[..., k] - level)

        return [within(limit) for limit in self.limits] or None

    def _pruned(self, n: int) -> Any:
        import torch
        from botorch.acquisition.multi_objective.utils import prune_inferior_points_multi_objective
        from botorch.acquisition.utils import prune_inferior_points

        arguments: dict[str, Any] = {
            "model": self.model,
            "X": torch.arange(n, dtype=torch.double)[:, None],
            "objective": self._objective(),
            "constraints": self._constraints(),
            "num_samples": _PRUNING,
        }
        if len(self.reference) == 1:
            return prune_inferior_points(**arguments)
        reference = torch.from_numpy(self.reference)
        return prune_inferior_points_multi_objective(ref_point=reference, **arguments)

    def _built(self, baseline: Any) -> Any:
        import torch
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.acquisition.multi_objective.logei import (
            qLogNoisyExpectedHypervolumeImprovement,
        )
        from botorch.sampling.normal import SobolQMCNormalSampler

        arguments: dict[str, Any] = {
            "model": self.model,
            "X_baseline": baseline,
            "sampler": SobolQMCNormalSampler(torch.Size([self.samples]), seed=self.seed),
            "objective": self._objective(),
            "constraints": self._constraints(),
            "prune_baseline": False,
            "cache_root": False,  # only BoTorch's own models have the cache
        }
        if len(self.reference) == 1:
            return qLogNoisyExpectedImprovement(**arguments)
        return qLogNoisyExpectedHypervolumeImprovement(
            ref_point=torch.from_numpy(self.reference), max_iep=self._uncached, **arguments
        )


def _joined(a: Any, b: Any) -> Any:
    import torch

    return torch.cat([a, b])


def _first(Z: Any, X: Any = None) -> Any:
    return Z[..., 0]


@cache
def _row_model() -> Any:
    """Return a class of BoTorch models whose points are numbers of rows.

    All points of a batch but one are the measured front, so the posterior covariance of the
    distinct rows is computed once, and each batch takes its part of it.
    """
    import torch
    from botorch.models.model import Model
    from botorch.posteriors.gpytorch import GPyTorchPosterior
    from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal

    class RowModel(Model):
        def __init__(self, outcomes: Sequence[Outcome], rows: Floats) -> None:
            super().__init__()
            self.outcomes, self.rows = outcomes, rows

        @property
        def num_outcomes(self) -> int:
            return len(self.outcomes)

        @property
        def batch_shape(self) -> torch.Size:
            return torch.Size([])

        def posterior(self, X: Any, *_: Any, **__: Any) -> Any:
            ids, at = np.unique(X[..., 0].long().numpy(), return_inverse=True)
            at = at.reshape(X.shape[:-1])
            moments = [posterior_of(outcome, self.rows[ids]) for outcome in self.outcomes]
            mean = torch.from_numpy(np.stack([m[at] for m, _ in moments], axis=-2))
            pairs = at[..., :, None], at[..., None, :]
            cov = torch.from_numpy(np.stack([c[pairs] for _, c in moments], axis=-3))
            if len(moments) == 1:
                return GPyTorchPosterior(MultivariateNormal(mean[..., 0, :], cov[..., 0, :, :]))
            joint = MultivariateNormal(mean, cov)
            return GPyTorchPosterior(MultitaskMultivariateNormal.from_batch_mvn(joint, task_dim=-1))

    return RowModel


def posterior_of(outcome: Outcome, rows: Floats) -> tuple[Floats, Floats]:
    """Return mean (n,) and covariance (n, n), without noise, of an outcome at rows (n, d)."""
    if isinstance(outcome, int):
        return rows[:, outcome], _JITTER * np.eye(len(rows))
    a = outcome.blocks(rows[:, : len(outcome.centre)])
    whitened = outcome.whitened(a)
    jitter = _JITTER * max(float(outcome.prior_variance(a).mean()), 1.0)
    mean = outcome.prior(a, outcome.rows) @ outcome.dual
    return mean, outcome.prior(a, a) - whitened.T @ whitened + jitter * np.eye(len(rows))


@contextmanager
def one_seed(seed: int) -> Iterator[None]:
    """Run BoTorch on one thread, from a seed, without gradients, and put everything back.

    BoTorch 0.18 compiles a C++ kernel when its hypervolume improvement is first used: that takes
    half a minute, can wait for ever on the lock of a killed process, and rounds differently from
    the Python that stands in for it. Its Python is used.
    """
    import torch
    from botorch.acquisition.multi_objective import logei

    off = {"_C": None, "_load_attempted": True}
    before = {name: getattr(logei, name) for name in off if hasattr(logei, name)}
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        for name, value in before.items():
            stack.callback(setattr, logei, name, value)
            setattr(logei, name, off[name])
        stack.enter_context(one_thread())
        torch.set_num_threads(1)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        torch.manual_seed(seed)
        yield
