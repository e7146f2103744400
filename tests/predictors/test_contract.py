# SPDX-License-Identifier: Apache-2.0
"""Every predictor keeps the contract that users' own inherit."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from sklearn.neighbors import KNeighborsRegressor

from lightning_subnet.predictors.registry import PREDICTORS
from lightning_subnet.testing import PredictorContract


class TestRidge(PredictorContract):
    predictor = "ridge"


class TestSVR(PredictorContract):
    predictor = "svr"


class TestStack(PredictorContract):
    predictor = "stack"


class TestGP(PredictorContract):
    predictor = "gp"


class TestAdditive(PredictorContract):
    predictor = "additive"


class TestForest(PredictorContract):
    predictor = "forest"


class TestExtraTrees(PredictorContract):
    predictor = "extra-trees"


class TestBoosting(PredictorContract):
    predictor = "boosting"


class TestAuto(PredictorContract):
    predictor = "auto"


class TestWrapped(PredictorContract):
    predictor: ClassVar = KNeighborsRegressor(3)


def test_every_name_has_its_test() -> None:
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    untested = [
        name for name in PREDICTORS.table if not any(f'predictor = "{name}"' in t for t in texts)
    ]
    assert untested == [], "a class that inherits PredictorContract is missing for each"
