# SPDX-License-Identifier: Apache-2.0
"""Find the best sub-networks of any elastic super-network, inside an ordinary Lightning project.

Names are loaded on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_subnet.budget import Budget
    from lightning_subnet.callbacks import SubnetSampling
    from lightning_subnet.choices import Choice
    from lightning_subnet.closest import Closest, closest_subnet
    from lightning_subnet.comparing import compare
    from lightning_subnet.comparison import Comparison
    from lightning_subnet.costs.energy import Energy
    from lightning_subnet.costs.latency import Latency, Throughput
    from lightning_subnet.costs.memory import PeakMemory
    from lightning_subnet.costs.networks import network_measure
    from lightning_subnet.costs.predicted import LatencyPredictor
    from lightning_subnet.costs.proxies import SynFlow
    from lightning_subnet.costs.tables import LatencyTable
    from lightning_subnet.deployed import Deployed, load_exported
    from lightning_subnet.distillation import alpha_divergence
    from lightning_subnet.elasticity.adapters import from_hat, from_ofa, from_whittle
    from lightning_subnet.elasticity.calibration import recalibrate
    from lightning_subnet.elasticity.checking import check_elastic
    from lightning_subnet.elasticity.extraction import extract
    from lightning_subnet.elasticity.protocol import SubnetMixin, activated, elastic
    from lightning_subnet.elasticity.skipping import skippable_blocks
    from lightning_subnet.elasticity.sorting import sort_channels
    from lightning_subnet.errors import (
        ExportError,
        NoFeasibleSubnet,
        SpaceExhausted,
        SubnetError,
    )
    from lightning_subnet.evaluators import Evaluator, FunctionEvaluator, TableEvaluator
    from lightning_subnet.export import (
        Exported,
        ExportWarning,
        export_onnx,
        export_openvino,
        export_torch,
    )
    from lightning_subnet.history import Evaluation, History
    from lightning_subnet.measures import Measure, measure
    from lightning_subnet.objectives import Constraint, Objective
    from lightning_subnet.problem import Problem
    from lightning_subnet.profiling import Profile
    from lightning_subnet.result import SearchResult
    from lightning_subnet.search import SubnetSearch
    from lightning_subnet.search_callback import SubnetSearchCallback
    from lightning_subnet.sensitivity_report import ElasticityReport, elasticity_report
    from lightning_subnet.settings import BudgetWarning
    from lightning_subnet.shrinking import ProgressiveShrinking
    from lightning_subnet.space import SearchSpace
    from lightning_subnet.specialisation import specialise
    from lightning_subnet.strategies.base import Strategy
    from lightning_subnet.strategies.reduction import (
        Reduction,
        ReductionWarning,
        reduce_space,
    )
    from lightning_subnet.studies import VersionWarning
    from lightning_subnet.subnet import Subnet
    from lightning_subnet.subnet_validation import SubnetValidation

__version__ = "0.1.0"

_HOME = {
    "Budget": "budget",
    "BudgetWarning": "settings",
    "Choice": "choices",
    "Closest": "closest",
    "Comparison": "comparison",
    "Constraint": "objectives",
    "Deployed": "deployed",
    "ElasticityReport": "sensitivity_report",
    "Energy": "costs.energy",
    "Evaluation": "history",
    "Evaluator": "evaluators",
    "ExportError": "errors",
    "ExportWarning": "export",
    "Exported": "export",
    "FunctionEvaluator": "evaluators",
    "History": "history",
    "Latency": "costs.latency",
    "Throughput": "costs.latency",
    "LatencyPredictor": "costs.predicted",
    "LatencyTable": "costs.tables",
    "Measure": "measures",
    "NoFeasibleSubnet": "errors",
    "Objective": "objectives",
    "PeakMemory": "costs.memory",
    "Problem": "problem",
    "Profile": "profiling",
    "ProgressiveShrinking": "shrinking",
    "Reduction": "strategies.reduction",
    "ReductionWarning": "strategies.reduction",
    "SearchResult": "result",
    "SearchSpace": "space",
    "SpaceExhausted": "errors",
    "Strategy": "strategies.base",
    "Subnet": "subnet",
    "SubnetError": "errors",
    "SubnetMixin": "elasticity.protocol",
    "SubnetSampling": "callbacks",
    "SubnetSearch": "search",
    "SubnetSearchCallback": "search_callback",
    "SubnetValidation": "subnet_validation",
    "SynFlow": "costs.proxies",
    "TableEvaluator": "evaluators",
    "VersionWarning": "studies",
    "activated": "elasticity.protocol",
    "alpha_divergence": "distillation",
    "check_elastic": "elasticity.checking",
    "closest_subnet": "closest",
    "compare": "comparing",
    "elastic": "elasticity.protocol",
    "elasticity_report": "sensitivity_report",
    "export_onnx": "export",
    "export_openvino": "export",
    "export_torch": "export",
    "extract": "elasticity.extraction",
    "from_hat": "elasticity.adapters",
    "from_ofa": "elasticity.adapters",
    "from_whittle": "elasticity.adapters",
    "load_exported": "deployed",
    "measure": "measures",
    "network_measure": "costs.networks",
    "recalibrate": "elasticity.calibration",
    "reduce_space": "strategies.reduction",
    "skippable_blocks": "elasticity.skipping",
    "sort_channels": "elasticity.sorting",
    "specialise": "specialisation",
}

__all__ = [
    "Budget",
    "BudgetWarning",
    "Choice",
    "Closest",
    "Comparison",
    "Constraint",
    "Deployed",
    "ElasticityReport",
    "Energy",
    "Evaluation",
    "Evaluator",
    "ExportError",
    "ExportWarning",
    "Exported",
    "FunctionEvaluator",
    "History",
    "Latency",
    "LatencyPredictor",
    "LatencyTable",
    "Measure",
    "NoFeasibleSubnet",
    "Objective",
    "PeakMemory",
    "Problem",
    "Profile",
    "ProgressiveShrinking",
    "Reduction",
    "ReductionWarning",
    "SearchResult",
    "SearchSpace",
    "SpaceExhausted",
    "Strategy",
    "Subnet",
    "SubnetError",
    "SubnetMixin",
    "SubnetSampling",
    "SubnetSearch",
    "SubnetSearchCallback",
    "SubnetValidation",
    "SynFlow",
    "TableEvaluator",
    "Throughput",
    "VersionWarning",
    "activated",
    "alpha_divergence",
    "check_elastic",
    "closest_subnet",
    "compare",
    "elastic",
    "elasticity_report",
    "export_onnx",
    "export_openvino",
    "export_torch",
    "extract",
    "from_hat",
    "from_ofa",
    "from_whittle",
    "load_exported",
    "measure",
    "network_measure",
    "recalibrate",
    "reduce_space",
    "skippable_blocks",
    "sort_channels",
    "specialise",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
