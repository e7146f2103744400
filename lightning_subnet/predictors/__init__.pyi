# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.predictors; the one list of them."""

from .additive import (
    Additive as Additive,
)
from .auto import (
    Auto as Auto,
)
from .base import (
    SVR as SVR,
    Predictor as Predictor,
    Ridge as Ridge,
    Stack as Stack,
    kendall_tau as kendall_tau,
)
from .gaussian_process import (
    GP as GP,
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
