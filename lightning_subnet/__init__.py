# SPDX-License-Identifier: Apache-2.0
"""Find the best sub-networks of any elastic super-network, inside an ordinary Lightning project.

Names are loaded on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_subnet.costs.closest import Closest, closest_subnet
    from lightning_subnet.costs.energy import Energy
    from lightning_subnet.costs.functions import network_measure
    from lightning_subnet.costs.latency.latency import Latency, Throughput
    from lightning_subnet.costs.memory import PeakMemory
    from lightning_subnet.costs.proxies import SynFlow
    from lightning_subnet.costs.tables.latency_predictor import LatencyPredictor
    from lightning_subnet.costs.tables.latency_table import LatencyTable
    from lightning_subnet.elasticity.batchnorm import recalibrate
    from lightning_subnet.elasticity.checking import check_elastic
    from lightning_subnet.elasticity.extraction import extract
    from lightning_subnet.elasticity.protocol import SubnetMixin, activated, elastic
    from lightning_subnet.elasticity.sorting import sort_channels
    from lightning_subnet.errors import (
        ExportError,
        NoFeasibleSubnet,
        SpaceExhausted,
        SubnetError,
    )
    from lightning_subnet.experiments.comparison import Comparison, compare
    from lightning_subnet.experiments.space_reduction import (
        Reduction,
        ReductionWarning,
        reduce_space,
    )
    from lightning_subnet.experiments.specialisation import specialise
    from lightning_subnet.export.exporting import (
        Exported,
        ExportWarning,
        export_onnx,
        export_openvino,
        export_torch,
    )
    from lightning_subnet.export.loading import Deployed, load_exported
    from lightning_subnet.results.elasticity_report import ElasticityReport, elasticity_report
    from lightning_subnet.results.result import SearchResult
    from lightning_subnet.search.budget import Budget
    from lightning_subnet.search.callback import SubnetSearchCallback
    from lightning_subnet.search.profile import Profile
    from lightning_subnet.search.search import SubnetSearch
    from lightning_subnet.search.settings import BudgetWarning
    from lightning_subnet.search.study_header import VersionWarning
    from lightning_subnet.space.choices import Choice
    from lightning_subnet.space.space import SearchSpace
    from lightning_subnet.space.subnet import Subnet
    from lightning_subnet.strategies.base import Strategy
    from lightning_subnet.study.evaluators import Evaluator, FunctionEvaluator, TableEvaluator
    from lightning_subnet.study.history import Evaluation, History
    from lightning_subnet.study.measures import Measure, measure
    from lightning_subnet.study.objectives import Constraint, Objective
    from lightning_subnet.study.problem import Problem
    from lightning_subnet.supernets.adapters import from_hat, from_ofa, from_whittle
    from lightning_subnet.supernets.skipping import skippable_blocks
    from lightning_subnet.training.distillation import alpha_divergence
    from lightning_subnet.training.progressive_shrinking import ProgressiveShrinking
    from lightning_subnet.training.subnet_sampling import SubnetSampling
    from lightning_subnet.training.subnet_validation import SubnetValidation

__version__ = "0.1.0"

_HOME = {
    "Budget": "search.budget",
    "BudgetWarning": "search.settings",
    "Choice": "space.choices",
    "Closest": "costs.closest",
    "Comparison": "experiments.comparison",
    "Constraint": "study.objectives",
    "Deployed": "export.loading",
    "ElasticityReport": "results.elasticity_report",
    "Energy": "costs.energy",
    "Evaluation": "study.history",
    "Evaluator": "study.evaluators",
    "ExportError": "errors",
    "ExportWarning": "export.exporting",
    "Exported": "export.exporting",
    "FunctionEvaluator": "study.evaluators",
    "History": "study.history",
    "Latency": "costs.latency.latency",
    "Throughput": "costs.latency.latency",
    "LatencyPredictor": "costs.tables.latency_predictor",
    "LatencyTable": "costs.tables.latency_table",
    "Measure": "study.measures",
    "NoFeasibleSubnet": "errors",
    "Objective": "study.objectives",
    "PeakMemory": "costs.memory",
    "Problem": "study.problem",
    "Profile": "search.profile",
    "ProgressiveShrinking": "training.progressive_shrinking",
    "Reduction": "experiments.space_reduction",
    "ReductionWarning": "experiments.space_reduction",
    "SearchResult": "results.result",
    "SearchSpace": "space.space",
    "SpaceExhausted": "errors",
    "Strategy": "strategies.base",
    "Subnet": "space.subnet",
    "SubnetError": "errors",
    "SubnetMixin": "elasticity.protocol",
    "SubnetSampling": "training.subnet_sampling",
    "SubnetSearch": "search.search",
    "SubnetSearchCallback": "search.callback",
    "SubnetValidation": "training.subnet_validation",
    "SynFlow": "costs.proxies",
    "TableEvaluator": "study.evaluators",
    "VersionWarning": "search.study_header",
    "activated": "elasticity.protocol",
    "alpha_divergence": "training.distillation",
    "check_elastic": "elasticity.checking",
    "closest_subnet": "costs.closest",
    "compare": "experiments.comparison",
    "elastic": "elasticity.protocol",
    "elasticity_report": "results.elasticity_report",
    "export_onnx": "export.exporting",
    "export_openvino": "export.exporting",
    "export_torch": "export.exporting",
    "extract": "elasticity.extraction",
    "from_hat": "supernets.adapters",
    "from_ofa": "supernets.adapters",
    "from_whittle": "supernets.adapters",
    "load_exported": "export.loading",
    "measure": "study.measures",
    "network_measure": "costs.functions",
    "recalibrate": "elasticity.batchnorm",
    "reduce_space": "experiments.space_reduction",
    "skippable_blocks": "supernets.skipping",
    "sort_channels": "elasticity.sorting",
    "specialise": "experiments.specialisation",
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
