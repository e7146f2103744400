# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.costs; the one list of them."""

from .closest import (
    Closest as Closest,
    closest_subnet as closest_subnet,
)
from .device import (
    describe_device as describe_device,
    usable_device as usable_device,
)
from .energy import (
    Energy as Energy,
)
from .functions import (
    network_measure as network_measure,
)
from .latency.latency import (
    Latency as Latency,
    LatencyMeasure as LatencyMeasure,
    Throughput as Throughput,
)
from .latency.timing import (
    Timing as Timing,
)
from .memory import (
    PeakMemory as PeakMemory,
)
from .proxies import (
    SynFlow as SynFlow,
)
from .runtimes.base import (
    Conditions as Conditions,
    ForwardPass as ForwardPass,
    Runtime as Runtime,
)
from .tables.files import (
    Agreement as Agreement,
)
from .tables.latency_predictor import (
    LatencyPredictor as LatencyPredictor,
)
from .tables.latency_table import (
    LatencyTable as LatencyTable,
)
