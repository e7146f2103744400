# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.space; the one list of them."""

from .choices import (
    Choice as Choice,
)
from .space import (
    SearchSpace as SearchSpace,
)
from .subnet import (
    Subnet as Subnet,
)
