# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.strategies; the one list of them."""

from ._toolkit.ranking import (
    best_first as best_first,
)
from ._toolkit.sampling import (
    by_choice as by_choice,
    neighbour_rows as neighbour_rows,
)
from .base import (
    Opening as Opening,
    Strategy as Strategy,
    check_positive as check_positive,
    fill as fill,
)
from .registry import (
    names as names,
    resolve as resolve,
)

# isort: split
# The classes in the table of registry.py, written by `python -m tests.stubs`.
from .bayesian import (
    Bayesian as Bayesian,
)
from .evolution import (
    NSGA2 as NSGA2,
    SMSEMOA as SMSEMOA,
    UNSGA3 as UNSGA3,
)
from .full import (
    FullSearch as FullSearch,
)
from .hybrid import (
    Hybrid as Hybrid,
)
from .linas import (
    LINAS as LINAS,
)
from .local_search import (
    LocalSearch as LocalSearch,
)
from .nsganetv2 import (
    NSGANetV2 as NSGANetV2,
)
from .random import (
    RandomSearch as RandomSearch,
)
from .weaknas import (
    WeakNAS as WeakNAS,
)
