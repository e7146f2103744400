# SPDX-License-Identifier: Apache-2.0
"""Validation of chosen subnets while a super-network trains, as a callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from lightning_subnet._checks import checked_int
from lightning_subnet._messages import did_you_mean
from lightning_subnet._torch.contexts import random_state
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import InvalidSubnetError, SearchError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.training._lightning import (
    Callback,
    LightningModule,
    Trainer,
    check,
    fit_loaders,
    inner_trainer,
    is_validation_of_fit,
    log_with_validation,
    validates,
    weights_of_validation,
)
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import (
    Source,
    calibration_batches,
    with_own_workers,
)
from lightning_subnet.training.validation.restore import untouched

End = Literal["smallest", "largest"]
_ENDS: tuple[End, ...] = ("smallest", "largest")


class SubnetValidation(Callback):
    """Validate chosen subnets during training and log their metrics: `val_acc/smallest`.

    After every n-th validation of `fit` each subnet is validated as a search would do it: with
    BatchNorm statistics of its own, on the same data, by a Trainer of the same devices and
    precision. Every metric that the module logs in validation is logged once more, under its name
    and that of the subnet, with the step of the validation; callbacks that stand behind this one,
    and `ModelCheckpoint` always, can monitor it. Weights, flags, BatchNorm statistics, metrics,
    gathered gradients and random states are afterwards as they were, so the training is the same
    to the last bit. `val_acc` itself keeps its meaning: the subnet in force, the largest under
    `SubnetSampling` and where none was put in force, with the statistics of its training.

    A validation of k subnets reads the validation data once, for as long as it fits into memory,
    and takes k passes over it. A dataset that draws its random numbers from a generator of its own
    draws more of them than without this callback.

    Args:
        subnets: `"smallest"`, `"largest"` or both.
        named: Further subnets by the name that they are logged under; each may also be a mapping of
            values by name of choice.
        every_n_validations: Validate the subnets after each n-th validation.
        calibration_images: How many training samples recalibrate BatchNorm; 0 for none.

    Attributes:
        latest: The metrics of the last validation by name, by name of the subnet.

    Raises:
        SearchError: A name is unknown, there are no subnets, or a number is not positive; before
            training: there is no validation data, no elastic part, or no training data to
            recalibrate BatchNorm with.
        InvalidSubnetError: Before training: a named subnet is not in the space.

    References:
        Cai et al., Once-for-All, ICLR 2020, section 3.3 and appendix B: the smallest and the
        largest subnet, validated as training shrinks.

    Example:
        >>> callback = SubnetValidation(named={"phone": {"depth": 2, "ks": [3, 5]}})
        >>> callback.names  # for Trainer(callbacks=[SubnetSampling(), callback])
        ('smallest', 'largest', 'phone')
    """

    def __init__(
        self,
        subnets: Sequence[End] = _ENDS,
        *,
        named: Mapping[str, Subnet | Mapping[str, Any]] | None = None,
        every_n_validations: int = 1,
        calibration_images: int = 512,
    ) -> None:
        ends = [subnets] if isinstance(subnets, str) else list(subnets)
        _check_names(ends, named or {})
        self._named = dict(named or {})
        self.names = tuple(dict.fromkeys([*ends, *self._named]))
        if not self.names:
            msg = "There are no subnets to validate. Leave subnets= out for smallest and largest."
            raise SearchError(msg)
        self.every_n_validations = checked_int(
            every_n_validations, "every_n_validations", error=SearchError
        )
        self.calibration_images = checked_int(
            calibration_images, "calibration_images", error=SearchError, least=0
        )
        self.latest: dict[str, dict[str, float]] = {}
        self._validations = 0
        self._subnets: dict[str, Subnet] = {}
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to validate, and that this Trainer can do it."""
        if stage != "fit":
            return
        check(pl_module, None, trainer)
        if not validates(trainer):
            msg = (
                "SubnetValidation validates subnets, and this training has no validation data. "
                "Pass val_dataloaders= or a datamodule with val_dataloader to fit()."
            )
            raise SearchError(msg)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the subnets and try a batch, when all callbacks have prepared the module."""
        part = elastic_part(pl_module)
        space = part.search_space()
        if getattr(part, "active_subnet", None) is None:
            part.activate(space.largest)  # from the start, not from the first validation on
        self._subnets = {name: self._subnet(space, name) for name in self.names}
        with random_state(0):
            calibration_batches(pl_module, self._source(trainer, images=1), pl_module)
        self._trainer = inner_trainer(trainer)

    def _subnet(self, space: SearchSpace, name: str) -> Subnet:
        if name not in self._named:
            return space.smallest if name == "smallest" else space.largest
        values = self._named[name]
        try:
            return space.subnet(values.active if isinstance(values, Subnet) else values)
        except InvalidSubnetError as error:
            msg = f"SubnetValidation: named[{name!r}] is not in the space. {error}"
            raise InvalidSubnetError(msg) from error

    def _source(self, trainer: Trainer, images: int) -> Source:
        """Return the data of the training itself."""
        val, train = map(with_own_workers, fit_loaders(trainer))
        return Source(
            getattr(trainer, "datamodule", None),
            val,
            train,
            calibration_images=min(images, self.calibration_images),
            ready=True,
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the subnets and log their metrics."""
        if not is_validation_of_fit(trainer):
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        with ExitStack() as stack:
            stack.enter_context(random_state(0))
            stack.enter_context(untouched(pl_module))
            stack.enter_context(weights_of_validation(trainer, pl_module))
            source = self._source(trainer, images=self.calibration_images)
            evaluator = stack.enter_context(
                TrainerEvaluator(
                    pl_module, source, trainer=self._trainer, hashes=False, checks=False
                )
            )
            self.latest = {n: dict(evaluator.evaluate(s)) for n, s in self._subnets.items()}
        row = {
            f"{metric}/{name}": value
            for name, metrics in self.latest.items()
            for metric, value in metrics.items()
        }
        log_with_validation(trainer, row)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations, so that a resumed training goes on counting."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the number of validations of a checkpoint."""
        self._validations = state_dict["validations"]


def _check_names(ends: Sequence[object], named: Mapping[str, Any]) -> None:
    """Refuse names that are unknown or empty, and values that are not a subnet's."""
    for name in ends:
        if name not in _ENDS:
            msg = (
                f"subnets= holds {name!r:.60}.{did_you_mean(name, _ENDS)} It takes 'smallest' "
                "and 'largest'; give others by name: named={'phone': subnet}."
            )
            raise SearchError(msg)
    for name, values in named.items():
        if not isinstance(name, str) or not name.strip() or name in _ENDS:
            msg = (
                f"named= holds the name {name!r:.60}. Names are texts, which metrics are "
                "logged under, other than 'smallest' and 'largest'."
            )
            raise SearchError(msg)
        if not isinstance(values, Mapping):  # a Subnet is one
            msg = (
                f"named[{name!r}] is {values!r:.60}, which is not a subnet. "
                "Give one of the space: space.subnet(...)."
            )
            raise SearchError(msg)
