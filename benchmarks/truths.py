# SPDX-License-Identifier: Apache-2.0
"""Ground truths for spaces that no table covers: models of real measurements, cross-validated.

Top-1 has two, of different classes: a mean of neural networks (`"networks"`) and boosted trees
(`"trees"`), and latency has trees of its logarithm. `hybrid`, `linas` and `bayesian` predict with
neither class; WeakNAS as published predicts with trees, and NSGANetV2 has networks among its
predictors, so if a form helps anyone it is a baseline.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import kendalltau
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import GroupKFold
from sklearn.neural_network import MLPRegressor

from benchmarks.data import OFA_NAMES, columns_of, data_folder, ofa_space, rows_of, values_in
from lightning_subnet import Choice, SearchSpace
from lightning_subnet.predictors import features
from lightning_subnet.predictors._sklearn import one_thread
from lightning_subnet.supernets import ElasticMobileNetV3

DEVICE = "titan_rtx_32"  # of the four the one whose latency the data determines best
RESOLUTION = 224


class Networks:
    """The mean of three small neural networks."""

    def fit(self, F: np.ndarray, y: np.ndarray) -> Networks:
        self._mean, self._std = y.mean(), y.std()
        z = (y - self._mean) / self._std
        shape = {"hidden_layer_sizes": (64, 64), "alpha": 0.1, "max_iter": 400}
        self._nets = [MLPRegressor(**shape, random_state=s).fit(F, z) for s in range(3)]
        return self

    def predict(self, F: np.ndarray) -> np.ndarray:
        return np.mean([net.predict(F) for net in self._nets], axis=0) * self._std + self._mean


def trees() -> Any:
    return HistGradientBoostingRegressor(max_iter=300, learning_rate=0.06, random_state=0)


TRUTHS = {"networks": Networks, "trees": trees}


class Measured(NamedTuple):
    """Measurements of OFA's MobileNetV3: rows (n, 45) of the network's space, top-1 in %.

    The two recorded runs are (n, 2): top-1 and MACs of real evaluations, in order.
    """

    net: ElasticMobileNetV3
    space: SearchSpace
    X: np.ndarray
    top1: np.ndarray
    runs: dict[str, np.ndarray]


@cache
def measured() -> Measured:
    net = ElasticMobileNetV3()
    space = net.search_space()
    with np.load(data_folder() / "ofa_mbv3_w10_measured.npz") as data:
        X = rows_of(space, columns_of(data, OFA_NAMES))
        names = {"linas": "run_linas_nsga2", "nsga2": "run_nsga2"}
        runs = {
            label: np.stack([data[f"{name}_top1"], data[f"{name}_macs"]], axis=1)
            for label, name in names.items()
        }
        return Measured(net, space, X, data["top1"], runs)


def validated(make: Any, F: np.ndarray, y: np.ndarray) -> float:
    """Return the mean Kendall tau over five folds; equal rows are in one fold."""
    group = np.unique(F, axis=0, return_inverse=True)[1].reshape(-1)
    taus = [
        kendalltau(make().fit(F[a], y[a]).predict(F[b]), y[b]).statistic
        for a, b in GroupKFold(5).split(F, groups=group)
    ]
    return float(np.mean(taus))


class Truth(NamedTuple):
    """A model of measurements: `values(X)` gives one number for each index row of its space."""

    make: Any
    space: SearchSpace
    X: np.ndarray
    y: np.ndarray
    fixed: dict[str, int]  # choices of the model that the search does not have, by value index
    log: bool

    def fitted(self) -> Any:
        """Return the function from index rows (n, k) of the searched space to values (n,)."""
        F = features(self.space, self.X)
        with one_thread():  # sums in another order make another model
            model = self.make().fit(F, np.log(self.y) if self.log else self.y)
        fixed = np.array(list(self.fixed.values()), dtype=np.int64)

        def values(X: np.ndarray) -> np.ndarray:
            rows = np.concatenate([X, np.tile(fixed, (len(X), 1))], axis=1)
            predicted = model.predict(features(self.space, rows))
            return np.exp(predicted) if self.log else predicted

        return values

    def tau(self) -> float:
        with one_thread():
            return validated(self.make, features(self.space, self.X), self.y)


def top1(kind: str) -> Truth:
    """Return the truth of ImageNet top-1 (%): `"networks"` or `"trees"`."""
    data = measured()
    return Truth(TRUTHS[kind], data.space, data.X, data.top1, {}, log=False)


def latency() -> Truth:
    """Return the truth of the latency of a batch of 32 on a Titan RTX (ms) at resolution 224."""
    with np.load(data_folder() / "ofa_mbv3_latency.npz") as data:
        sizes = values_in(data["r"])
        space = ofa_space({"r": Choice(sizes)})
        X = rows_of(space, columns_of(data, OFA_NAMES) | {"r": data["r"]})
        y = data[f"latency_ms_{DEVICE}"].astype(float)
    return Truth(trees, space, X, y, {"r": sizes.index(RESOLUTION)}, log=True)
