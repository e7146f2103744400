# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.experiments; the one list of them."""

from .comparison import (
    Comparison as Comparison,
    compare as compare,
)
from .space_reduction import (
    Reduction as Reduction,
    reduce_space as reduce_space,
    reduction as reduction,
)
from .specialisation import (
    specialise as specialise,
)
