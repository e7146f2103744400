# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.results; the one list of them."""

from .checkpoints import (
    load_subnet as load_subnet,
    save_subnet as save_subnet,
    subnet_record as subnet_record,
)
from .record import (
    SearchRecord as SearchRecord,
)
from .remeasure import (
    remeasured as remeasured,
)
from .result import (
    SearchResult as SearchResult,
)
from .sensitivity import (
    Sensitivity as Sensitivity,
)
from .sensitivity_report import (
    ElasticityReport as ElasticityReport,
    elasticity_report as elasticity_report,
)
