# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.testing; the one list of them."""

from .measure import MeasureContract as MeasureContract
from .predictor import PredictorContract as PredictorContract
from .problems import Situation as Situation, situations as situations
from .storage import StorageContract as StorageContract
from .strategy import StrategyContract as StrategyContract
from .supernet import SupernetContract as SupernetContract
