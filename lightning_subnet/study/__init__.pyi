# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.study; the one list of them."""

from .evaluators import (
    Evaluator as Evaluator,
    FunctionEvaluator as FunctionEvaluator,
    TableEvaluator as TableEvaluator,
)
from .history import (
    Evaluation as Evaluation,
    History as History,
)
from .measures import (
    Measure as Measure,
    measure as measure,
)
from .objectives import (
    Constraint as Constraint,
    Objective as Objective,
)
from .problem import (
    Problem as Problem,
)
from .storage import (
    Storage as Storage,
)
