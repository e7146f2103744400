# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet: those of every day; the rest are in its packages."""

from . import (
    costs as costs,
    elasticity as elasticity,
    errors as errors,
    experiments as experiments,
    export as export,
    predictors as predictors,
    results as results,
    search as search,
    space as space,
    strategies as strategies,
    study as study,
    supernets as supernets,
    training as training,
)
from .costs.latency.latency import (
    Latency as Latency,
)
from .elasticity.batchnorm import (
    recalibrate as recalibrate,
)
from .elasticity.checking import (
    check_elastic as check_elastic,
)
from .elasticity.extraction import (
    extract as extract,
)
from .elasticity.protocol import (
    SubnetMixin as SubnetMixin,
    activated as activated,
    elastic as elastic,
)
from .errors import (
    NoFeasibleSubnet as NoFeasibleSubnet,
    SubnetError as SubnetError,
)
from .experiments.comparison import (
    compare as compare,
)
from .export.exporting import (
    export_onnx as export_onnx,
)
from .results.checkpoints import (
    load_subnet as load_subnet,
    save_subnet as save_subnet,
)
from .results.result import (
    SearchResult as SearchResult,
)
from .search.budget import (
    Budget as Budget,
)
from .search.callback import (
    SubnetSearchCallback as SubnetSearchCallback,
)
from .search.search import (
    SubnetSearch as SubnetSearch,
)
from .space.choices import (
    Choice as Choice,
)
from .space.space import (
    SearchSpace as SearchSpace,
)
from .space.subnet import (
    Subnet as Subnet,
)
from .study.evaluators import (
    Evaluator as Evaluator,
    FunctionEvaluator as FunctionEvaluator,
    TableEvaluator as TableEvaluator,
)
from .study.history import (
    Evaluation as Evaluation,
    History as History,
)
from .study.measures import (
    Measure as Measure,
    measure as measure,
)
from .study.objectives import (
    Constraint as Constraint,
    Objective as Objective,
)
from .supernets.elasticizing import (
    elasticize as elasticize,
)
from .training.elasticize_callback import (
    Elasticize as Elasticize,
)
from .training.subnet_sampling import (
    SubnetSampling as SubnetSampling,
)
from .training.subnet_validation import (
    SubnetValidation as SubnetValidation,
)

__version__: str
