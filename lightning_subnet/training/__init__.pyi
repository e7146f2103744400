# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.training; the one list of them."""

from .distillation import (
    alpha_divergence as alpha_divergence,
)
from .elasticize_callback import (
    Elasticize as Elasticize,
)
from .progressive_shrinking import (
    ProgressiveShrinking as ProgressiveShrinking,
)
from .sampling_rules import (
    Strata as Strata,
)
from .subnet_sampling import (
    SubnetSampling as SubnetSampling,
)
from .subnet_validation import (
    SubnetValidation as SubnetValidation,
)
from .validation.checks import (
    Checks as Checks,
)
from .validation.evaluator import (
    TrainerEvaluator as TrainerEvaluator,
)
from .validation.frozen_data import (
    Source as Source,
)
