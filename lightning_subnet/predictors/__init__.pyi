# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.predictors; the one list of them."""

from .base import (
    Predictor as Predictor,
    kendall_tau as kendall_tau,
)
from .masked_features import (
    features as features,
)
from .quality import (
    report as report,
)
from .registry import (
    make as make,
    names as names,
)
from .wrapped import (
    Wrapped as Wrapped,
)

# isort: split
# The classes in the table of registry.py, written by `python -m tests.stubs`.
from .additive import (
    Additive as Additive,
)
from .auto import (
    Auto as Auto,
)
from .base import (
    SVR as SVR,
    Ridge as Ridge,
    Stack as Stack,
)
from .gaussian_process import (
    GP as GP,
)
