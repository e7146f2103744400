# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.search; the one list of them."""

from .budget import (
    Budget as Budget,
)
from .callback import (
    SubnetSearchCallback as SubnetSearchCallback,
)
from .profile import (
    Profile as Profile,
)
from .search import (
    SubnetSearch as SubnetSearch,
)
