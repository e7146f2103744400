# SPDX-License-Identifier: Apache-2.0
"""Auto: a choice among predictors by rank correlation, or a mixture of those that are as good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_subnet._types import Floats
from lightning_subnet.predictors.additive import Additive, Effects
from lightning_subnet.predictors.base import Predictor, Ridge, fold_of, kendall_tau, spaced_rows
from lightning_subnet.predictors.registry import make
from lightning_subnet.space.space import SearchSpace

_DRAWS, _DRAW_ROWS = 256, 500  # of the Bayesian bootstrap; of more rows, so many in even steps
_LEAST_SHARE = 0.05  # of the draws; what has less does not predict
_FIRST, _GROWTH = 25, 4  # from 25 rows on, choices are made four times per doubling


class Auto(Predictor):
    """Chooses among candidates by cross-validated rank correlation, and mixes where that is unsure.

    Each candidate's weight is the share of Bayesian bootstrap draws of the samples in which its
    predictions for left-out folds order the samples best: one candidate where the samples tell it
    from the others, several where they do not. The choice is made anew when there are a fifth more
    samples than the last time, on the rows up to then, so it depends on the rows alone and not on
    earlier fits.

    Args:
        candidates: Names, or estimators with fit and predict.
        effects: For "additive"; see `Additive`.
        random_state: The seed of folds, draws and trees.

    Attributes:
        chosen: The names of the candidates that predict.
        weights: The weight of each of them; they add up to 1.
        scores: Kendall's tau by candidate: mean over folds and standard deviation.

    References:
        Yao, Vehtari, Simpson, Gelman, Using Stacking to Average Bayesian Predictive Distributions,
        Bayesian Analysis 13 (2018), section 3.4, for weights by Bayesian bootstrap; Rubin, The
        Bayesian Bootstrap, Annals of Statistics 9 (1981).
    """

    name = "auto"
    minimum = Ridge.minimum
    chosen: tuple[str, ...]
    weights: tuple[float, ...]
    scores: dict[str, tuple[float, float]]

    def __init__(
        self,
        candidates: Sequence[Any] = ("ridge", "svr", "stack", "additive"),
        *,
        effects: Effects | None = None,
        random_state: int = 0,
    ) -> None:
        super().__init__(random_state=random_state)
        self.candidates, self.effects = candidates, effects

    @classmethod
    def for_space(cls, space: SearchSpace, *, random_state: int = 0) -> Predictor:
        """Return a predictor that knows which features of the space are alike."""
        return cls(effects=Effects.of(space), random_state=random_state)

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        n = len(y)
        step = int(_GROWTH * np.log2(n / _FIRST)) if n > _FIRST else 0
        at = n if n <= _FIRST else min(int(_FIRST * 2 ** (step / _GROWTH)), n)
        key = F[:at].tobytes() + y[:at].tobytes() + repr(self.get_params()).encode()
        if getattr(self, "_key", b"") != key or at == n:
            self._decide(F[:at], y[:at])
            self._key = key
        if at < n:
            for member in self._members:
                member.fit(F, y)
        means = [member.out_of_fold for member in self._members]
        stds = [member.out_of_fold_std for member in self._members]
        return _mixture(means, stds, self.weights)

    def _decide(self, F: Floats, y: Floats) -> None:
        folds = fold_of(len(y), self.random_state)
        members: dict[str, Predictor] = {}
        self.scores = {}
        for candidate in self.candidates:
            if candidate == "additive":
                predictor: Predictor = Additive(self.effects, random_state=self.random_state)
            else:
                predictor = make(candidate, random_state=self.random_state)
            if len(y) < predictor.minimum or (predictor.fit(F, y).used != predictor.name):
                continue
            tau = kendall_tau(predictor.out_of_fold, y, folds)
            self.scores[predictor.name] = (float(tau.mean()), float(tau.std()))
            members[predictor.name] = predictor
        if not members:
            msg = f"none of its candidates {list(self.candidates)!r:.120} could be fitted"
            raise ValueError(msg)
        shares = self._shares([member.out_of_fold for member in members.values()], y)
        at = np.flatnonzero(shares >= min(_LEAST_SHARE, shares.max()))
        self.chosen = tuple(list(members)[i] for i in at)
        self.weights = tuple((shares[at] / shares[at].sum()).tolist())
        self._members = [members[name] for name in self.chosen]

    def _shares(self, predictions: Sequence[Floats], y: Floats) -> Floats:
        """Return the part of the draws in which each of the predictions (n,) orders y (n,) best."""
        rows = spaced_rows(len(y), _DRAW_ROWS)
        rng = np.random.default_rng(self.random_state)
        weights = rng.dirichlet(np.ones(len(rows)), _DRAWS)
        above = np.sign(y[rows][:, None] - y[rows])
        taus = []
        for mean in predictions:
            agree = np.nan_to_num(above * np.sign(mean[rows][:, None] - mean[rows]))
            taus.append(((weights @ agree) * weights).sum(axis=1))
        return np.bincount(np.argmax(taus, axis=0), minlength=len(taus)) / _DRAWS

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        if not return_std:
            alone = [member.predict(F) for member in self._members]
            mean = np.average(alone, axis=0, weights=self.weights)
            return mean, mean
        means, stds = zip(*(member.predict(F, True) for member in self._members), strict=True)
        return _mixture(means, stds, self.weights)


def _mixture(
    means: Sequence[Floats], stds: Sequence[Floats], weights: Sequence[float]
) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of a mixture."""
    mean = np.average(means, axis=0, weights=weights)
    variance = np.average(np.square(stds) + np.square(means - mean), axis=0, weights=weights)
    return mean, np.sqrt(variance)
