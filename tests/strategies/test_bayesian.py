# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import ClassVar

from lightning_subnet.strategies import Bayesian
from tests.strategies.contract import StrategyContract


class TestBayesian(StrategyContract):
    cls = Bayesian
    settings: ClassVar[dict] = {
        "batch_size": 3,
        "first": 6,
        "samples": 8,
        "scored": 40,
        "rounds": 1,
    }
