# SPDX-License-Identifier: Apache-2.0
"""The contract of a predictor, and the predictors of closed form; `Ridge` stands in for others."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lightning_subnet._messages import warn
from lightning_subnet._types import Floats, Indices
from lightning_subnet.errors import PredictorError, PredictorWarning
from lightning_subnet.predictors import _sklearn
from lightning_subnet.predictors.kernel_regression import KernelRegression, Scale, Setting
from lightning_subnet.space.space import SearchSpace

Pairs = tuple[tuple[float, float], ...]

SEARCH_ROWS = 400  # rows that settings are chosen on: their cost grows with the cube
KERNEL_ROWS = 2000  # rows of a kernel matrix
_FOLDS = 5
_TAU_ROWS = 1500  # rows whose pairs are compared
_COVERAGE = 0.683  # of errors within one standard deviation
_BLOCK = 4096  # rows predicted at a time
_LOG_RATIO = 1.2  # below it a logarithm is a straight line

warned_causes: set[tuple[str, str]] = set()
"""The causes that this process has warned of."""


def warn_once(message: str, *, cause: tuple[str, str]) -> None:
    """Warn with a `PredictorWarning`, once for each cause in a process.

    Args:
        message: What happened, in full.
        cause: The name of what failed, and the kind of failure, without numbers, which differ from
            time to time.
    """
    if cause not in warned_causes:
        warned_causes.add(cause)
        warn(message, PredictorWarning)


def kendall_tau(a: Floats, b: Floats, folds: Indices | None = None) -> Floats:
    """Return Kendall's tau-b of a and b (n,): one value, or that of each fold's rows with all.

    Args:
        a: Values (n,).
        b: Values (n,).
        folds: The fold of each row (n,); the default is one fold.

    References:
        Kendall, The treatment of ties in ranking problems, Biometrika 33 (1945).
    """
    if folds is None:
        folds = np.zeros(len(a), dtype=np.int64)
    some = spaced_rows(len(a), _TAU_ROWS)
    a, b, folds = a[some], b[some], folds[some]
    one = np.sign(a[:, None] - a).astype(np.float32)
    two = np.sign(b[:, None] - b).astype(np.float32)
    rows = np.stack([(one * two).sum(1), np.abs(one).sum(1), np.abs(two).sum(1)]).astype(float)
    agree, untied, other = (np.bincount(folds, row) for row in rows)
    both = np.sqrt(untied * other)
    return np.where(both > 0, agree / np.where(both > 0, both, 1.0), 0.0)


def fold_of(n: int, random_state: int) -> Indices:
    """Return the fold of each row (n,)."""
    order = np.random.default_rng(random_state).permutation(n)
    folds = np.zeros(n, dtype=np.int64)
    folds[order] = np.arange(n) % min(_FOLDS, n)
    return folds


def checked_features(F: npt.ArrayLike) -> Floats:
    """Return features as a matrix (n, d) of finite numbers.

    Raises:
        PredictorError: It is not a matrix, or a number is NaN or infinite.
    """
    F = np.asarray(F, dtype=float)
    if F.ndim != 2:  # noqa: PLR2004 - a matrix
        msg = f"F has shape {F.shape}; it is a matrix (n, d): features(space, X)."
        raise PredictorError(msg)
    if not np.isfinite(F).all():
        row, column = np.argwhere(~np.isfinite(F))[0]
        msg = f"F[{row}, {column}] is {F[row, column]}. Features are finite numbers."
        raise PredictorError(msg)
    return F


def spaced_rows(n: int, at_most: int) -> Indices:
    """Return the numbers of n rows, or of `at_most` in even steps with the first and the last.

    Example:
        >>> spaced_rows(9, 3).tolist()
        [0, 4, 8]
    """
    return np.arange(n) if n <= at_most else np.linspace(0, n - 1, at_most).astype(np.int64)


class Predictor:
    """Predicts values from features, and how far they may be off; this class predicts the mean.

    What predictors share is here: the checks of data, a simpler predictor in place of one that
    cannot learn, and the calibration of uncertainty. A subclass sets `name` and `minimum`; its
    constructor takes settings and `random_state`, and keeps each under its own name (see
    `get_params`). It implements two methods, and `for_space` if it can use what a space knows:

    - `_fit(F, y)` learns from features (n, d) and values (n,), and returns mean and standard
      deviation of each row, (n,) and (n,), by a model that did not see it: NaN where all did.
    - `_predict(F, return_std=True)` returns mean and standard deviation, (n,) and (n,); the second
      is not looked at without `return_std`.

    What these raise, or a NaN, has the predictor replaced, with a warning.

    Args:
        random_state: The seed of folds and trees.

    Attributes:
        name: The name in messages and reports.
        minimum: The fewest rows that it learns from.
        out_of_fold: Predictions of each training row by models that did not see it, (n,).
        out_of_fold_std: Their standard deviations (n,).
        used: The name of what predicts: another one if this predictor was replaced.

    Example:
        >>> class Median(Predictor):
        ...     name = "median"
        ...     minimum = 2
        ...
        ...     def _fit(self, F, y):
        ...         self.median = np.median(y)
        ...         rows = range(len(y))
        ...         return np.array([np.median(np.delete(y, i)) for i in rows]), np.ones(len(y))
        ...
        ...     def _predict(self, F, return_std=True):
        ...         return np.full(len(F), self.median), np.ones(len(F))
        >>> Median().fit(np.eye(3), [1.0, 2.0, 9.0]).predict(np.eye(3), return_std=True)
        (array([2., 2., 2.]), array([7.5, 7.5, 7.5]))
    """

    name: ClassVar[str] = "mean"
    minimum: ClassVar[int] = 1
    _estimator_type = "regressor"
    out_of_fold: Floats
    out_of_fold_std: Floats
    used: str

    def __init__(self, *, random_state: int = 0) -> None:
        self.random_state = random_state

    @classmethod
    def for_space(cls, space: SearchSpace, *, random_state: int = 0) -> Predictor:
        """Return a predictor of the features of a space, which may say which of them are alike."""
        return cls(random_state=random_state)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the settings by name, as scikit-learn does."""
        return {k: getattr(self, k) for k in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Predictor:
        """Change settings by name, as scikit-learn does."""
        for key, value in params.items():
            if key not in self.get_params():
                msg = f"{type(self).__name__} has no setting {key!r}: {self.get_params()}."
                raise PredictorError(msg)
            setattr(self, key, value)
        return self

    def __sklearn_tags__(self) -> Any:
        return _sklearn.regressor_tags()

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.get_params().items())
        return f"{type(self).__name__}({settings})"

    def fit(self, F: npt.ArrayLike, y: npt.ArrayLike) -> Predictor:
        """Learn from features F (n, d) and values y (n,).

        Raises:
            PredictorError: No rows, shapes that do not fit, or a value that is NaN or infinite.
        """
        F, y = checked_features(F), np.asarray(y, dtype=float)
        if y.shape != F.shape[:1] or not len(y):
            msg = f"y has shape {y.shape}; it is one value for each of the {len(F)} rows of F."
            raise PredictorError(msg)
        if not np.isfinite(y).all():
            row = int(np.flatnonzero(~np.isfinite(y))[0])
            msg = f"y[{row}] is {y[row]}. Leave out evaluations that failed: they have no number."
            raise PredictorError(msg)
        self.n_features_in_ = F.shape[1]
        self._stand_in: Predictor | None = None
        self.used, self._data = self.name, (F, y)
        try:
            if reason := self._refusal(y):
                self._replace(F, y, reason)
            else:
                self._calibrate(F, y)
        except PredictorError:
            raise
        except Exception as error:
            if type(self) is Predictor:
                raise
            self._replace(F, y, f"raised {type(error).__name__}: {error}")
        return self

    def _refusal(self, y: Floats) -> str:
        if type(self) is Predictor:
            return ""
        if len(y) < self.minimum:
            return f"needs {self.minimum} samples or more"
        return "cannot learn from values that are all equal" if np.ptp(y) == 0 else ""

    def _replace(self, F: Floats, y: Floats, reason: str) -> None:
        ridge = type(self) is not Ridge and len(y) >= Ridge.minimum and np.ptp(y) > 0
        stand_in = (Ridge if ridge else Predictor)(random_state=self.random_state).fit(F, y)
        self._stand_in, self.used = stand_in, stand_in.used
        self.out_of_fold, self.out_of_fold_std = stand_in.out_of_fold, stand_in.out_of_fold_std
        warn_once(
            f"The predictor {self.name!r} {reason:.200}; {self.used!r} takes its place.",
            cause=(self.name, reason.partition(":")[0]),
        )

    def _calibrate(self, F: Floats, y: Floats) -> None:
        """Fit, and stretch the uncertainty until it covers 68 % of the errors on unseen rows."""
        mean, std = self._fit(F, y)
        finite = np.isfinite(mean)
        self.out_of_fold = np.where(finite, mean, y.mean())
        std = np.where(finite, std, y.std())
        self._least_std = 1e-6 * max(float(np.abs(y).mean()), float(y.std()), 1e-12)
        ratio = np.sort((np.abs(y - mean) / np.maximum(std, self._least_std))[finite])
        at = min(int(np.ceil((len(ratio) + 1) * _COVERAGE)), len(ratio)) - 1
        self._stretch = float(ratio[at]) if len(ratio) and ratio[at] > 0 else 1.0
        self.out_of_fold_std = np.maximum(std * self._stretch, self._least_std)
        if not np.isfinite(np.concatenate(self._predict(F[:50]))).all():
            msg = "it predicts NaN or infinity"
            raise FloatingPointError(msg)

    def _unseen(
        self, F: Floats, rows: Indices, left_out: tuple[Floats, Floats]
    ) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of all rows of F (n, d), for `_fit` to return.

        Args:
            F: All rows of the fit.
            rows: The numbers of those that the model was fitted on.
            left_out: Mean and standard deviation of these, each by a model without it.
        """
        if len(rows) == len(F):
            return left_out
        mean, std = self._predict(F)  # the model did not see the others either
        mean[rows], std[rows] = left_out
        return mean, std

    def predict(self, F: npt.ArrayLike, return_std: bool = False) -> Any:
        """Return the mean (n,) of features F (n, d), and if asked its standard deviation (n,).

        Raises:
            PredictorError: Not fitted, or F has other columns than those of `fit`, or a NaN.
        """
        F = checked_features(F)
        if F.shape[1] != getattr(self, "n_features_in_", -1):
            fitted = f"on {self.n_features_in_}" if hasattr(self, "n_features_in_") else "yet: fit"
            msg = f"F has {F.shape[1]} columns; the predictor {self.name!r} is not fitted {fitted}."
            raise PredictorError(msg)
        if self._stand_in is not None:
            return self._stand_in.predict(F, return_std)
        try:
            parts = self._pieces(F, return_std)
        except Exception as error:
            self._replace(*self._data, f"raised {type(error).__name__} in predict: {error}")
            return self.predict(F, return_std)
        mean = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0)
        if not return_std:
            return mean
        std = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0)
        return mean, np.maximum(std * self._stretch, self._least_std)

    def _pieces(self, F: Floats, return_std: bool) -> list[tuple[Floats, Floats]]:
        parts = [self._predict(F[i : i + _BLOCK], return_std) for i in range(0, len(F), _BLOCK)]
        if not all(np.isfinite(column).all() for part in parts for column in part):
            msg = "it predicts NaN or infinity"
            raise FloatingPointError(msg)
        return parts

    def score(self, F: npt.ArrayLike, y: npt.ArrayLike) -> float:
        """Return Kendall's tau of the predictions with y: what a search needs is the order."""
        return float(kendall_tau(self.predict(F), np.asarray(y, dtype=float))[0])

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        n = len(y)
        self._mean, self._std = float(y.mean()), float(y.std()) or abs(float(y.mean())) or 1.0
        if np.ptp(y) == 0:
            self._std = 1e-3 * (abs(self._mean) or 1.0)
        return (y.sum() - y) / max(n - 1, 1), np.full(n, self._std)

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        return np.full(len(F), self._mean), np.full(len(F), self._std)


class Ridge(Predictor):
    """Ridge regression on weighted columns, of the values or of their logarithms.

    Leave-one-out chooses the penalty, the weights of the columns and whether to take logarithms.

    Args:
        alpha: A fixed penalty: the ridge regression of scikit-learn on the columns as they are.
        random_state: The seed of the folds.
    """

    name = "ridge"
    minimum = 4
    _designs: ClassVar[Pairs] = ((0.15, 1.0), (0.05, 1.0))  # share, power
    _mixes: ClassVar[Pairs] = ()  # mix, rate
    _support_vectors: ClassVar[bool] = False

    def __init__(self, alpha: float | None = None, *, random_state: int = 0) -> None:
        super().__init__(random_state=random_state)
        self.alpha = alpha

    def _fit(self, F: Floats, y: Floats) -> tuple[Floats, Floats]:
        some, rows = spaced_rows(len(y), SEARCH_ROWS), spaced_rows(len(y), KERNEL_ROWS)
        self.setting = self._search(F[some], y[some])
        self._scale = Scale(y[rows], log=self.setting.log)
        z = self._scale.z
        self._model = self._solve(F[rows], z)
        left_out = z.copy()
        folds = fold_of(len(rows), self.random_state)
        for out in (folds == k for k in range(int(folds.max()) + 1)):
            left_out[out] = self._solve(F[rows][~out], z[~out]).predict(F[rows][out])[0]
        return self._unseen(F, rows, self._scale.back(left_out, self._model.left_out_std()))

    def _solve(self, F: Floats, z: Floats) -> KernelRegression:
        model = KernelRegression(F, z, self.setting)
        return model.solve(support_vectors=self._support_vectors)

    def _search(self, F: Floats, y: Floats) -> Setting:
        """Return the setting with the least leave-one-out error, one part after the other."""
        if self.alpha is not None:
            return Setting(plain=True, alpha=self.alpha)
        share, power = self._designs[0]
        mix, rate = self._mixes[0] if self._mixes else (0.0, 1.0)
        best = Setting(share=share, power=power, mix=mix, rate=rate)
        if y.min() > 0 and y.max() > _LOG_RATIO * y.min():
            # Errors of logarithms and of values do not compare; ranks do.
            value, log = (KernelRegression(F, Scale(y, log=log).z, best) for log in (False, True))
            taus = [kendall_tau(model.leave_one_out()[2], y)[0] for model in (value, log)]
            best = replace(best, log=bool(taus[1] > taus[0]))
        z = Scale(y, log=best.log).z
        best = _best(F, z, [replace(best, share=s, power=p) for s, p in self._designs])
        if self._mixes:
            best = _best(F, z, [replace(best, mix=mix, rate=rate) for mix, rate in self._mixes])
        return best

    def _predict(self, F: Floats, return_std: bool = True) -> tuple[Floats, Floats]:
        return self._scale.back(*self._model.predict(F, return_std=return_std))

    @property
    def coef_(self) -> Floats:
        """The coefficients (d,) of a linear model of the values themselves."""
        if self.setting.log or self.setting.mix:
            msg = f"{self!r} is not linear in the features: {self.setting}."
            raise AttributeError(msg)
        model = self._model
        return np.asarray(self._scale.std * model.weight * (model.A.T @ model.dual))


def _best(F: Floats, z: Floats, settings: list[Setting]) -> Setting:
    """Return the setting with the least leave-one-out error, with its best penalty."""
    pairs = []
    for setting in settings:
        error, alpha, _ = KernelRegression(F, z, setting).leave_one_out()
        pairs.append((error, replace(setting, alpha=alpha)))
    return min(pairs, key=lambda pair: pair[0])[1]


class SVR(Ridge):
    """Support vector regression on an RBF kernel of weighted columns.

    Kernel and penalty are those with the least leave-one-out error of a kernel ridge regression.
    """

    name = "svr"
    minimum = 8
    _designs: ClassVar[Pairs] = ((0.15, 0.5), (0.0, 0.5), (0.15, 1.0), (0.0, 1.0))
    _mixes: ClassVar[Pairs] = ((1.0, 0.3), (1.0, 0.1), (1.0, 1.0))
    _support_vectors = True

    def __init__(self, *, random_state: int = 0) -> None:
        super().__init__(random_state=random_state)


class Stack(SVR):
    """Ridge and RBF in one: a linear part that extrapolates, and an RBF part for what it leaves.

    Both are fitted together, as a regression on the sum of their kernels, in closed form.
    """

    name = "stack"
    _mixes: ClassVar[Pairs] = (
        (0.0, 1.0),
        *((mix, rate) for mix in (0.5, 1.0) for rate in (0.1, 0.3, 1.0)),
    )
    _support_vectors = False
