# SPDX-License-Identifier: Apache-2.0
"""What all predictors share: checks, fallbacks, folds, calibrated uncertainty, Kendall's tau."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lightning_subnet import _sklearn
from lightning_subnet.choices import Indices
from lightning_subnet.errors import SubnetError

Floats = npt.NDArray[np.float64]

_FOLDS = 5
_TAU_ROWS = 1500  # rows whose pairs are compared
_COVERED = 0.683  # of errors within one standard deviation
_BLOCK = 4096  # rows predicted at a time
_told: set[str] = set()


class PredictorError(SubnetError, ValueError):
    """A predictor is unknown, or the data is nothing that it can learn from."""


class PredictorWarning(UserWarning):
    """A predictor was replaced by a simpler one; told once per cause."""


def _warn(message: str) -> None:
    if message not in _told:
        _told.add(message)
        silence = "Silence it with warnings.simplefilter('ignore', PredictorWarning)."
        warnings.warn(f"{message} {silence}", PredictorWarning, stacklevel=4)


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
    few = spaced(len(a), _TAU_ROWS)
    a, b, folds = a[few], b[few], folds[few]
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


def checked(F: npt.ArrayLike) -> Floats:
    F = np.asarray(F, dtype=float)
    if F.ndim != 2:  # noqa: PLR2004 - a matrix
        msg = f"F has shape {F.shape}; it is a matrix (n, d): features(space, X)."
        raise PredictorError(msg)
    if not np.isfinite(F).all():
        row, column = np.argwhere(~np.isfinite(F))[0]
        msg = f"F[{row}, {column}] is {F[row, column]}. Features are finite numbers."
        raise PredictorError(msg)
    return F


def spaced(n: int, at_most: int) -> Indices:
    """Return all rows, or so many evenly spaced ones with the first and the last."""
    return np.arange(n) if n <= at_most else np.linspace(0, n - 1, at_most).astype(np.int64)


class Predictor:
    """What all predictors share: checks, the fallback, the scale of targets, calibration.

    A subclass implements `_fit(F, z)` and `_predict(F) -> mean, std` for targets of mean 0 and
    variance 1; `_fit` returns the predictions of rows that were left out, (n,) each.

    Args:
        random_state: The seed of folds and trees.

    Attributes:
        out_of_fold: Predictions of each training row by models that did not see it, (n,).
        used: The name of what predicts: another one if this predictor was replaced.
    """

    name: ClassVar[str] = "mean"
    minimum: ClassVar[int] = 1
    _estimator_type = "regressor"
    out_of_fold: Floats
    used: str

    def __init__(self, *, random_state: int = 0) -> None:
        self.random_state = random_state

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
        F, y = checked(F), np.asarray(y, dtype=float)
        if y.shape != F.shape[:1] or not len(y):
            msg = f"y has shape {y.shape}; it is one value for each of the {len(F)} rows of F."
            raise PredictorError(msg)
        if not np.isfinite(y).all():
            row = int(np.flatnonzero(~np.isfinite(y))[0])
            msg = f"y[{row}] is {y[row]}. Leave out evaluations that failed: they have no number."
            raise PredictorError(msg)
        self.n_features_in_ = F.shape[1]
        self._stand_in: Predictor | None = None
        self.used = self.name
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
        stand_in = self.simpler(len(y), bool(np.ptp(y) > 0)).fit(F, y)
        self._stand_in, self.used = stand_in, stand_in.used
        self.out_of_fold = stand_in.out_of_fold
        _warn(f"The predictor {self.name!r} {reason:.200}; {self.used!r} takes its place.")

    def simpler(self, n: int, varies: bool) -> Predictor:
        """Return what takes the place of this predictor with n samples."""
        return Predictor(random_state=self.random_state)

    def _calibrate(self, F: Floats, y: Floats) -> None:
        """Fit, and stretch the uncertainty until it covers 68 % of the errors on unseen rows."""
        mean, std = self._fit(F, y)
        seen = ~np.isfinite(mean)
        self.out_of_fold = np.where(seen, y.mean(), mean)
        std = np.where(seen, y.std(), std)
        self._least = 1e-6 * max(float(np.abs(y).mean()), float(y.std()), 1e-12)
        ratio = np.sort((np.abs(y - mean) / np.maximum(std, self._least))[~seen])
        at = min(int(np.ceil((len(ratio) + 1) * _COVERED)), len(ratio)) - 1
        self._stretch = float(ratio[at]) if len(ratio) and ratio[at] > 0 else 1.0
        self._left_out = self.out_of_fold, np.maximum(std * self._stretch, self._least)
        if not np.isfinite(np.concatenate(self._predict(F[:50]))).all():
            msg = "it predicts NaN or infinity"
            raise FloatingPointError(msg)

    def predict(self, F: npt.ArrayLike, return_std: bool = False) -> Any:
        """Return the mean (n,) of features F (n, d), and if asked its standard deviation (n,).

        Raises:
            PredictorError: Not fitted, or F has other columns than those of `fit`, or a NaN.
        """
        F = checked(F)
        if F.shape[1] != getattr(self, "n_features_in_", -1):
            fitted = f"on {self.n_features_in_}" if hasattr(self, "n_features_in_") else "yet: fit"
            msg = f"F has {F.shape[1]} columns; the predictor {self.name!r} is not fitted {fitted}."
            raise PredictorError(msg)
        if self._stand_in is not None:
            return self._stand_in.predict(F, return_std)
        parts = [self._predict(F[i : i + _BLOCK], return_std) for i in range(0, len(F), _BLOCK)]
        mean = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0)
        if not return_std:
            return mean
        std = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0)
        return mean, np.maximum(std * self._stretch, self._least)

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
