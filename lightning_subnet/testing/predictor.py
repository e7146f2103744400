# SPDX-License-Identifier: Apache-2.0
"""The contract of a predictor: scikit-learn's, with an uncertainty, and whatever the samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from lightning_subnet._types import Floats
from lightning_subnet.errors import PredictorError, PredictorWarning
from lightning_subnet.predictors.base import Predictor, kendall_tau
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.predictors.registry import make
from lightning_subnet.testing.problems import conditional, numpy_state


def sample(n: int = 60, d: int = 6, seed: int = 0) -> tuple[Floats, Floats]:
    """Return features (n, d) and values (n,) of a smooth function with some noise."""
    rng = np.random.default_rng(seed)
    F = rng.random((n, d))
    return F, 5 + F @ np.arange(d) + np.sin(4 * F[:, 0]) + 0.05 * rng.normal(size=n)


class PredictorContract:
    """The tests that every predictor inherits.

    Attributes:
        predictor: A name, a `Predictor`, or a regressor of scikit-learn's contract; what
            `predictors.make` takes.

    Example:
        >>> class TestRidge(PredictorContract):
        ...     predictor = "ridge"
    """

    predictor: ClassVar[Any]

    def make(self, **settings: Any) -> Predictor:
        """Return an unfitted predictor."""
        return make(self.predictor, **settings)

    @pytest.fixture(autouse=True)
    def _without_fallbacks(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PredictorWarning)
            yield

    def test_mean_and_uncertainty(self) -> None:
        F, y = sample(160)
        fitted = self.make().fit(F[:100], y[:100])
        mean, std = fitted.predict(F[100:], return_std=True)
        assert fitted.used == fitted.name
        assert mean.shape == std.shape == (60,)
        assert np.array_equal(mean, fitted.predict(F[100:]))
        assert (std > 0).all()
        assert fitted.score(F[100:], y[100:]) > 0.6
        assert kendall_tau(fitted.out_of_fold, y[:100])[0] > 0.5
        assert not np.allclose(fitted.out_of_fold, fitted.predict(F[:100])), "the fit itself"

    @pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 10])
    def test_few_samples(self, n: int) -> None:
        F, y = sample(n)
        mean, std = self.make().fit(F, y).predict(np.vstack([F, F + 0.1]), return_std=True)
        assert np.isfinite(mean).all()
        assert (std > 0).all()

    def test_a_constant_is_predicted_as_it_is(self) -> None:
        F, _ = sample(40)
        mean, std = self.make().fit(F, np.full(40, 7.0)).predict(F, return_std=True)
        assert np.allclose(mean, 7.0)
        assert (std > 0).all()

    def test_repeated_rows_and_columns_that_say_nothing(self) -> None:
        F, y = sample(30)
        F = np.hstack([np.vstack([F, F]), np.zeros((60, 2)), np.ones((60, 1))])
        fitted = self.make().fit(F, np.concatenate([y, y + 0.01]))
        assert np.isfinite(fitted.predict(F)).all()
        fitted = self.make().fit(np.ones((20, 3)), np.arange(20.0))
        assert np.isfinite(fitted.predict(np.ones((2, 3)))).all()

    def test_the_same_rows_give_the_same_predictions_whatever_was_fitted_before(self) -> None:
        F, y = sample(80)
        before = numpy_state()
        fresh = self.make().fit(F[:60], y[:60]).predict(F[60:], return_std=True)
        other = self.make().fit(F[:20], -y[:20])
        again = other.fit(F[:60], y[:60]).predict(F[60:], return_std=True)
        assert np.array_equal(fresh, again)
        assert numpy_state() == before

    def test_settings_go_in_and_out_as_in_scikit_learn(self) -> None:
        predictor = self.make()
        twin = type(predictor)(**predictor.get_params())
        assert twin.get_params() == predictor.get_params()
        assert predictor.set_params(random_state=4).random_state == 4
        with pytest.raises(PredictorError, match="no_such_setting"):
            predictor.set_params(no_such_setting=1)

    def test_subnets_of_a_space_are_ranked(self) -> None:
        space = conditional()
        X = space.sample_indices(80, np.random.default_rng(0))
        F, y = features(space, X), X.sum(axis=1) + 0.1 * X[:, 0] ** 2
        fitted = self.make(space=space).fit(F[:50], y[:50])
        assert kendall_tau(fitted.predict(F[50:]), y[50:])[0] > 0.6

    def test_features_and_values_that_are_not_numbers_are_refused(self) -> None:
        F, y = sample(20)
        F[3, 2] = np.nan
        with pytest.raises(PredictorError, match="F"):
            self.make().fit(F, y)
