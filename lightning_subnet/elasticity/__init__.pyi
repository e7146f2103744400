# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.elasticity; the one list of them."""

from .attention import (
    ElasticLayerNorm as ElasticLayerNorm,
)
from .batchnorm import (
    recalibrate as recalibrate,
)
from .checking import (
    check_elastic as check_elastic,
)
from .extraction import (
    extract as extract,
)
from .layers import (
    ElasticBatchNorm2d as ElasticBatchNorm2d,
    ElasticConv2d as ElasticConv2d,
    ElasticLinear as ElasticLinear,
)
from .protocol import (
    SubnetMixin as SubnetMixin,
    activated as activated,
    elastic as elastic,
)
from .sorting import (
    Channels as Channels,
    Sortable as Sortable,
    sort_channels as sort_channels,
)
