# SPDX-License-Identifier: Apache-2.0
"""Each test of a predictor is the first that warns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_subnet.predictors.base import warned_causes


@pytest.fixture(autouse=True)
def _forget_warnings() -> Iterator[None]:
    warned_causes.clear()
    yield
    warned_causes.clear()
