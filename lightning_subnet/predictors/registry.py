# SPDX-License-Identifier: Apache-2.0
"""Predictors: surrogates of a measure, with a mean and an uncertainty, on scikit-learn's contract.

Features of subnets, the predictors by name, the automatic choice among them, and a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_subnet.errors import SearchError, did_you_mean
from lightning_subnet.predictors import _sklearn
from lightning_subnet.predictors._sklearn import Floats, Scale
from lightning_subnet.predictors.additive import Additive, Effects
from lightning_subnet.predictors.base import (
    SVR,
    Predictor,
    PredictorError,
    PredictorWarning,
    Ridge,
    Stack,
    fold_of,
    kendall_tau,
    spaced,
)
from lightning_subnet.predictors.gaussian_process import GP
from lightning_subnet.space.choices import Indices
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.history import History

if TYPE_CHECKING:
    import pandas as pd

    from lightning_subnet.study.problem import Problem

__all__ = [
    "GP",
    "SVR",
    "Additive",
    "Auto",
    "Predictor",
    "PredictorError",
    "PredictorWarning",
    "Ridge",
    "Stack",
    "Wrapped",
    "features",
    "kendall_tau",
    "make",
    "names",
    "report",
]

_DRAWS, _DRAWN_ROWS = 256, 500  # of the Bayesian bootstrap; of more rows, so many in even steps
_LEAST_SHARE = 0.05  # of the draws; what has less does not predict
_FIRST, _GROWTH = 25, 4  # from 25 rows on, choices are made four times per doubling


def features(space: SearchSpace, X: Indices) -> Floats:
    """Return the masked features (n, d) of canonical index rows X (n, n_choices).

    The columns are the one-hot columns of `space.encode`; each choice's value relative to its
    greatest one (its position, if its values are no numbers, or nothing if they have no order);
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
            given = np.array(choice.values, dtype=float)
            values = given if np.abs(given).max() > 0 else values
        numbers[:, j] = (values / np.abs(values).max())[X[:, j]]
    numbers *= mask & ordered
    groups: dict[str, list[int]] = {}
    for j, name in enumerate(space.names):
        stem, dot, tail = name.rpartition(".")
        if dot and tail.isdigit() and ordered[j]:
            groups.setdefault(stem, []).append(j)
    means = [numbers[:, at].mean(axis=1) for at in groups.values() if len(at) > 1]
    return np.column_stack([space.encode(X), numbers[:, ordered], *means])


class Wrapped(Predictor):
    """A regressor of scikit-learn, or with its contract, that also says how sure it is.

    A forest's uncertainty is the spread of its trees, a Gaussian process's its own; any other
    model's is that of its errors on left-out folds. All are stretched to cover such errors.

    Args:
        estimator: `"forest"`, `"extra-trees"`, `"boosting"`, or an object with fit and predict.
        random_state: The seed of folds and trees.
    """

    minimum = 10

    def __init__(self, estimator: Any, *, random_state: int = 0) -> None:
        super().__init__(random_state=random_state)
        self.estimator = estimator

    @property
    def name(self) -> str:  # type: ignore[override] # a property
        """The name of the model."""
        named = isinstance(self.estimator, str)
        return self.estimator if named else type(self.estimator).__name__

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        self._scale, self._noise = Scale(y), 0.0
        z = self._scale.z
        self._model = self._fresh().fit(F, z)
        if _sklearn.is_forest(self._model):
            mean, std = _sklearn.out_of_bag(self._model, F)
        else:
            folds = fold_of(len(y), self.random_state)
            mean, std = np.zeros(len(y)), np.zeros(len(y))
            for out in (folds == k for k in range(int(folds.max()) + 1)):
                model = self._fresh().fit(F[~out], z[~out])
                mean[out], std[out] = self._of(model, F[out])
        # Where all trees agree they can all be wrong.
        error = (z - mean)[np.isfinite(mean)]
        self._noise = 0.3 * float(np.sqrt((error**2).sum() / max(len(error), 1)))
        return self._scale.back(mean, np.hypot(std, self._noise))

    def _fresh(self) -> Any:
        if isinstance(self.estimator, str):
            return _sklearn.tree_model(self.estimator, self.random_state)
        return _sklearn.fresh(self.estimator)

    def _of(self, model: Any, F: Floats) -> tuple[Floats, Floats]:
        if _sklearn.is_forest(model):
            return _sklearn.spread_of_trees(model, F)
        if _sklearn.has_own_std(model):
            mean, std = model.predict(F, return_std=True)
        else:
            mean, std = model.predict(F), np.zeros(len(F))
        return np.asarray(mean, dtype=float).reshape(len(F)), np.asarray(std, dtype=float)

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        mean, std = self._of(self._model, F)
        return self._scale.back(mean, np.hypot(std, self._noise))


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
        chosen: The names of what predicts.
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
        means, stds = zip(*(member._left_out for member in self._members), strict=True)
        return _together(means, stds, self.weights)

    def _decide(self, F: Floats, y: Floats) -> None:
        folds = fold_of(len(y), self.random_state)
        fitted: dict[str, Predictor] = {}
        self.scores = {}
        for candidate in self.candidates:
            if candidate == "additive":
                made: Predictor = Additive(self.effects, random_state=self.random_state)
            else:
                made = make(candidate, random_state=self.random_state)
            if len(y) < made.minimum or (made.fit(F, y).used != made.name):
                continue
            tau = kendall_tau(made.out_of_fold, y, folds)
            self.scores[made.name] = (float(tau.mean()), float(tau.std()))
            fitted[made.name] = made
        if not fitted:
            msg = f"none of its candidates {list(self.candidates)!r:.120} could be fitted"
            raise ValueError(msg)
        shares = self._shares([made.out_of_fold for made in fitted.values()], y)
        used = np.flatnonzero(shares >= min(_LEAST_SHARE, shares.max()))
        self.chosen = tuple(list(fitted)[i] for i in used)
        self.weights = tuple((shares[used] / shares[used].sum()).tolist())
        self._members = [fitted[name] for name in self.chosen]

    def _shares(self, predictions: Sequence[Floats], y: Floats) -> Floats:
        """Return in which part of the draws each of the predictions (n,) orders y (n,) best."""
        rows = spaced(len(y), _DRAWN_ROWS)
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
        return _together(means, stds, self.weights)


def _together(
    means: Sequence[Floats], stds: Sequence[Floats], weights: Sequence[float]
) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of a mixture."""
    mean = np.average(means, axis=0, weights=weights)
    variance = np.average(np.square(stds) + np.square(means - mean), axis=0, weights=weights)
    return mean, np.sqrt(variance)


_CLASSES: dict[str, type[Predictor]] = {
    "ridge": Ridge,
    "svr": SVR,
    "stack": Stack,
    "gp": GP,
    "additive": Additive,
    "auto": Auto,
}
_TREES = ("forest", "extra-trees", "boosting")


def names() -> list[str]:
    """Return the names that `make` takes."""
    return ["ridge", "svr", "stack", "gp", "additive", *_TREES, "auto"]


def make(predictor: Any, *, random_state: int = 0, space: SearchSpace | None = None) -> Predictor:
    """Return an unfitted predictor by name, or around a regressor of scikit-learn.

    Args:
        predictor: One of `names()`, a `Predictor`, or an object with fit and predict; objects are
            copied.
        random_state: The seed of folds and trees; a given `Predictor` has its own.
        space: Whose features are given; it tells "additive" which of them are alike.

    Raises:
        PredictorError: An unknown name, or no predictor at all.

    Example:
        >>> F = np.random.default_rng(0).random((30, 3))
        >>> mean, std = make("ridge").fit(F, F.sum(axis=1)).predict(F, return_std=True)
        >>> bool(np.abs(mean - F.sum(axis=1)).max() < 0.01), bool((std > 0).all())
        (True, True)
    """
    if isinstance(predictor, str) and predictor in _CLASSES:
        cls = _CLASSES[predictor]
        if space is not None and cls in (Additive, Auto):
            return cls(effects=Effects.of(space), random_state=random_state)
        return cls(random_state=random_state)
    if isinstance(predictor, Predictor):
        return type(predictor)(**predictor.get_params())
    usable = all(callable(getattr(predictor, method, None)) for method in ("fit", "predict"))
    if (
        predictor in _TREES
        if isinstance(predictor, str)
        else usable and not isinstance(predictor, type)
    ):
        return Wrapped(predictor, random_state=random_state)
    given = (
        "the class, not an object: add ()" if isinstance(predictor, type) else f"{predictor!r:.60}"
    )
    hint = did_you_mean(predictor, names()) if isinstance(predictor, str) else ""
    msg = (
        f"The predictor is {given}.{hint} Give one of {', '.join(map(repr, names()))}, "
        "or an object with fit(F, y) and predict(F)."
    )
    raise PredictorError(msg)


def report(space: SearchSpace, history: History, names: Sequence[str]) -> pd.DataFrame:
    """Return how well the measures of a history can be predicted, one row per measure.

    Args:
        space: The space of the subnets.
        history: What was measured; failed evaluations are left out.
        names: The names of the measures.

    Returns:
        `predictor`, what `Auto` chose; `tau`, Kendall's tau on left-out folds, and its standard
        deviation `spread`; `mape`, the mean absolute error in % of the value; and `n`.
    """
    import pandas as pd

    rows = []
    for name in names:
        y = history.column(name)
        known = np.isfinite(y)
        row: dict[str, Any] = {"predictor": "", "tau": np.nan, "spread": np.nan, "mape": np.nan}
        if known.any():
            y = y[known]
            auto = Auto(effects=Effects.of(space))
            auto.fit(features(space, history.indices[known]), y)
            row["predictor"] = "+".join(auto.chosen) if auto.used == "auto" else auto.used
            if auto.used != Predictor.name:
                tau = kendall_tau(auto.out_of_fold, y, fold_of(len(y), auto.random_state))
                row |= {"tau": float(tau.mean()), "spread": float(tau.std())}
            if (some := y != 0).any():
                error = np.abs((auto.out_of_fold - y)[some] / y[some])
                row["mape"] = 100 * float(error.mean())
        rows.append({**row, "n": int(known.sum())})
    index = pd.Index(list(names), name="measure")
    return pd.DataFrame(rows, index=index, columns=["predictor", "tau", "spread", "mape", "n"])


def expensive_report(name: str, problem: Problem | None, history: History | None) -> pd.DataFrame:
    """Return the report on the measures of a search that are not exact.

    Args:
        name: The study's name.
        problem: What is searched; None where that is not known yet.
        history: What was measured.

    Raises:
        SearchError: Nothing was measured yet, or all measures are exact.
    """
    if problem is None or history is None or not history.ok.any():
        msg = (
            f"Study {name!r} has no successful evaluation yet, so there is nothing to predict "
            "from. Run the search first: fit(model, datamodule), run(evaluator) or ask and tell."
        )
        raise SearchError(msg)
    if not (wanted := [measure for measure in problem.names if measure not in problem.exact]):
        msg = f"All measures of study {name!r} are exact ({', '.join(problem.exact)}): none is "
        raise SearchError(msg + "predicted.")
    with _sklearn.one_thread():
        return report(problem.space, history, wanted)
