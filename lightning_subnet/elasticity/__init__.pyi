# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.elasticity; the one list of them."""

from .attention import (
    ElasticEmbedding as ElasticEmbedding,
    ElasticLayerNorm as ElasticLayerNorm,
    ElasticMultiheadAttention as ElasticMultiheadAttention,
    KeyValueCache as KeyValueCache,
    MultiheadAttention as MultiheadAttention,
)
from .batchnorm import (
    recalibrate as recalibrate,
)
from .channels.discovery import (
    ChannelGroup as ChannelGroup,
)
from .channels.report import (
    ElasticReport as ElasticReport,
    ElasticRow as ElasticRow,
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
    ElasticLayer as ElasticLayer,
    ElasticLinear as ElasticLinear,
    ElasticSequential as ElasticSequential,
)
from .protocol import (
    Elastic as Elastic,
    SubnetMixin as SubnetMixin,
    activated as activated,
    elastic as elastic,
)
from .sorting import (
    Channels as Channels,
    Sortable as Sortable,
    sort_channels as sort_channels,
)
