# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.study; the one list of them."""

from .additive import (
    Term as Term,
    additive_measure as additive_measure,
)
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
    NetworkMeasure as NetworkMeasure,
    measure as measure,
)
from .objectives import (
    Constraint as Constraint,
    Objective as Objective,
)
from .pareto import (
    attainment as attainment,
    hypervolume as hypervolume,
    hypervolumes as hypervolumes,
    knee as knee,
    nondominated as nondominated,
    nondominated_ranks as nondominated_ranks,
)
from .problem import (
    Problem as Problem,
)
from .storage import (
    Storage as Storage,
)
