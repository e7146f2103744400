# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import lightning as L
import pytest

from tests.networks import LitMlp


@pytest.fixture
def model() -> LitMlp:
    """Return a module with the same weights in every test."""
    L.seed_everything(0, verbose=False)
    return LitMlp()
