# SPDX-License-Identifier: Apache-2.0
"""Errors and warnings of the package: what is wrong, what was expected, what to do."""

from __future__ import annotations

from typing import Any


class SubnetError(Exception):
    """Base of every error that this package raises on purpose."""


class SpaceError(SubnetError, ValueError):
    """A search space, or a part of one, cannot be built from these arguments."""


class InvalidSubnetError(SubnetError, ValueError):
    """An assignment is not a subnet of the space."""


class SpaceExhausted(SubnetError, RuntimeError):
    """Every subnet of the space is measured or pending: the search ends normally."""


class ElasticityError(SubnetError, ValueError):
    """A super-network does not do what its space says."""


class ObjectiveError(SubnetError, ValueError):
    """An objective, a constraint or a measure cannot be used."""


class MeasurementError(SubnetError, RuntimeError):
    """A measure or an evaluator cannot work at all, for any subnet."""


class TellError(SubnetError, ValueError):
    """An evaluation does not fit the search that is told of it."""


class StrategyError(SubnetError, ValueError):
    """A strategy is unknown or set up wrongly."""


class PredictorError(SubnetError, ValueError):
    """A predictor is unknown, or cannot learn from the data."""


class SearchError(SubnetError, RuntimeError):
    """A search cannot start or go on."""


class StorageError(SubnetError, RuntimeError):
    """A storage or a file cannot be read or written."""


class StudyMismatchError(StorageError, ValueError):
    """A stored study of this name was made with other settings."""


class ExportError(SubnetError, RuntimeError):
    """A network cannot be converted, or the file does not give its outputs."""


class FixedBatchError(ExportError):
    """A network takes batches of one size only."""


class ParityError(SubnetError, RuntimeError):
    """A subnet, as a module or a file of its own, gives other outputs than where it was scored."""


class FileParityError(ExportError, ParityError):
    """A file, or the network that was to go into it, gives other outputs than it should."""


class PluginError(SubnetError, ImportError):
    """An entry point of another package cannot be used."""


class NoFeasibleSubnet(SubnetError, LookupError):
    """No evaluated subnet satisfies the bounds; `nearest` violates them least.

    Args:
        message: The bounds, and what came nearest to them.
        nearest: The evaluation with the least violation, or None if nothing was measured.
    """

    def __init__(self, message: str, nearest: Any = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class SubnetWarning(UserWarning):
    """Base of every warning of this package.

    Silence all with `warnings.simplefilter("ignore", lightning_subnet.errors.SubnetWarning)`.
    """


class ParityWarning(SubnetWarning):
    """It is not known whether what ships gives what was scored, or a choice changes no value.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.ParityWarning)`.
    """


class CalibrationWarning(SubnetWarning):
    """Running statistics are renewed on data that makes the network worse, or cannot be renewed.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.CalibrationWarning)`.
    """


class CostWarning(SubnetWarning):
    """A cost does not tell subnets apart, or leaves something out.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.CostWarning)`.
    """


class ElasticityWarning(SubnetWarning):
    """A space or a super-network is likely not what its author means.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.ElasticityWarning)`.
    """


class BudgetWarning(SubnetWarning):
    """The budget ends before the strategy has begun to learn.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.BudgetWarning)`.
    """


class VersionWarning(SubnetWarning):
    """A study is resumed with other versions than it was made with.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.VersionWarning)`.
    """


class PredictorWarning(SubnetWarning):
    """A predictor was replaced by a simpler one; appears once for each cause.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.PredictorWarning)`.
    """


class WarmStartWarning(SubnetWarning):
    """A warm start has subnets that share nothing with the space; they are left out.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.WarmStartWarning)`.
    """


class ReductionWarning(SubnetWarning):
    """A reduction left the space as it was.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.ReductionWarning)`.
    """


class ExportWarning(SubnetWarning):
    """Some of the files could not be written; the others were.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.ExportWarning)`.
    """


class PluginWarning(SubnetWarning):
    """Another package offers something under a name that is in use already.

    Silence it with `warnings.simplefilter("ignore", lightning_subnet.errors.PluginWarning)`.
    """
