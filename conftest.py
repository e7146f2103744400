# SPDX-License-Identifier: Apache-2.0
"""Orders and seeds the tests; runs Python blocks of README.md and docs/ in scratch folders."""

from __future__ import annotations

import os
import random
import tempfile
from typing import Any

# The networks of the tests are too small for threads, which on a busy machine wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

collect_ignore = ["docs/conf.py"]  # Sphinx's, no module of doctests
collect_ignore_glob = ["tests/programs/*"]  # run by tests as processes of their own
pytest.register_assert_rewrite("lightning_subnet.testing")

SLOW_PAGES = (
    "README.md",
    "your_model.md",
    "training.md",
    "exporting.md",
    "comparing.md",
    "costs.md",
)  # train, step by step


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow pages."""
    for item in items:
        if item.path.name in SLOW_PAGES:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin each test, its fixtures too, with the same random numbers."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for code that draws from the global generator
    torch.manual_seed(0)


_entered: list[tuple[str, tempfile.TemporaryDirectory[str]]] = []


def _enter(_: dict[str, Any]) -> None:
    _entered.append((os.getcwd(), tempfile.TemporaryDirectory()))
    os.chdir(_entered[-1][1].name)


def _leave(_: dict[str, Any]) -> None:
    home, scratch = _entered.pop()
    os.chdir(home)
    scratch.cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=[
        "README.md",
        "docs/quickstart.md",
        "docs/your_model.md",
        "docs/training.md",
        "docs/exporting.md",
        "docs/supernets.md",
        "docs/transformers.md",
        "docs/comparing.md",
        "docs/costs.md",
        "docs/concepts.md",
        "docs/latency.md",
        "docs/hardware.md",
    ],
    setup=_enter,
    teardown=_leave,
).pytest()
