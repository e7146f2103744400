# SPDX-License-Identifier: Apache-2.0
"""Random states of Python, NumPy and torch, seeded for a while and given back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the states of `random`, NumPy and torch on leaving; seed on entering if asked."""
    python, numpy_ = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's code may use it
    cuda: Any = torch.cuda  # is_initialized() carries no annotation
    devices = range(torch.cuda.device_count()) if cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - the user's code may use it
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_)  # noqa: NPY002 - as above
