# SPDX-License-Identifier: Apache-2.0
"""Guards of a score: equal values, weights that stay, statistics that are worth renewing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_subnet._messages import listed, warn
from lightning_subnet._torch.fingerprints import hashed
from lightning_subnet.costs.device import describe_device
from lightning_subnet.errors import (
    CalibrationWarning,
    MeasurementError,
    StudyMismatchError,
    VersionWarning,
)
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.storage import Study
from lightning_subnet.training._lightning import (
    BeforeFirstBatch,
    LightningModule,
    Trainer,
    loggers_among,
)
from lightning_subnet.training.validation.place import Place


class Passed:
    """The checks that a model has passed in this process.

    Args:
        model: The model.
        key: All that its values depend on; None: nothing is known, and nothing noted.
    """

    _of: ClassVar[weakref.WeakKeyDictionary[nn.Module, set[Any]]] = weakref.WeakKeyDictionary()

    def __init__(self, model: nn.Module, key: tuple[Any, ...] | None) -> None:
        self._model, self._key = model, key

    def has(self, *check: str) -> bool:
        """Return whether it has passed a check, with the same values."""
        return self._key is not None and (*self._key, *check) in self._of.get(self._model, ())

    def add(self, *check: str) -> None:
        """Note that it has."""
        if self._key is not None:
            self._of.setdefault(self._model, set()).add((*self._key, *check))


def differing(first: Mapping[str, float], second: Mapping[str, float]) -> list[str]:
    """Return the names of the values that differ by more than 1e-6 of the first, or are missing.

    Example:
        >>> differing({"acc": 0.5, "loss": 2.0}, {"acc": 0.5, "loss": 2.1})
        ['loss']
    """
    return [
        name
        for name in dict.fromkeys([*first, *second])
        if name not in first or name not in second or not _equal(first[name], second[name])
    ]


def _equal(one: float, other: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)


def check_logged(
    metrics: Collection[str], needed: Collection[str], model: nn.Module, trainer: Trainer
) -> None:
    """Raise `MeasurementError` if a validation logs nothing, or lacks what callbacks may log.

    Args:
        metrics: The names of what was logged.
        needed: The names that must be there.
        model: The model.
        trainer: The Trainer, with the user's callbacks.
    """
    name = type(model).__name__
    missing, own = sorted({*needed} - {*metrics}), loggers_among(trainer)
    if missing and own:
        msg = (
            f"{name} logs no {missing[0]!r} in its validation. Callbacks of the Trainer "
            f"({listed(own, 3)}) do not run in a search: log it in validation_step, or in a hook "
            "of the module."
        )
        raise MeasurementError(msg)
    if not metrics:
        msg = (
            f"{name}.validation_step logged nothing. Log the objectives: self.log('val_acc', ...)."
        )
        raise MeasurementError(msg)


def check_repeats(
    first: Mapping[str, float],
    again: Mapping[str, float],
    *,
    needed: Collection[str],
    changed: Sequence[str],
) -> None:
    """Raise `MeasurementError` if a subnet has other metrics when it is scored again.

    Args:
        first: Its metrics.
        again: The same, after another subnet was scored.
        needed: The names that count; none: all do.
        changed: Attributes that a validation leaves changed, for the message.
    """
    names = [name for name in differing(first, again) if not needed or name in needed]
    if names:
        values = shown(*(each.get(names[0], "nothing") for each in (first, again)))
        where = f" Attributes that a validation leaves changed: {listed(changed)}."
        msg = (
            f"{names[0]!r} of one subnet is {values[0]} at first, and {values[1]} after "
            "another one was scored: something of a validation stays, or is drawn at random."
            f"{where if changed else ''} Empty what is gathered in "
            "on_validation_epoch_start, in callbacks, datamodules and globals too; keep the "
            "network in eval mode and the validation data the same; or pass "
            "checks=Checks(repeat=False)."
        )
        raise MeasurementError(msg)


def check_stored(
    stored: Mapping[str, float],
    fresh: Mapping[str, float],
    *,
    subnet: Subnet,
    study: Study,
    hardware: str,
    n: int = 0,
) -> None:
    """Compare stored metrics of a subnet with those that it has now.

    Args:
        stored: The metrics that count, as they are stored.
        fresh: All metrics now.
        subnet: The subnet.
        study: The study that holds them, or is to hold them.
        hardware: What the fresh ones were measured on.
        n: How many samples are validated; 0 if it is not known.

    Raises:
        StudyMismatchError: They differ, on the same hardware.

    Warns:
        VersionWarning: They differ, and the hardware does too.
    """
    before = study.versions.get("hardware", "hardware that is not known")
    rounds = "threads" not in hardware or before != hardware
    for name, value in stored.items():
        now = fresh.get(name, math.nan)
        tolerance = _ROUNDING * abs(value) if rounds else _STEP * abs(value)
        if rounds and n and 0 <= value <= 1:
            tolerance = max(tolerance, _FLIPS / n)
        if abs(now - value) <= tolerance:
            continue
        one, other = shown(value, now)
        figures = (
            f"{name!r} of {subnet!r:.200} is stored as {one} in {study.storage.url!r} (study "
            f"{study.name!r}), and is {other} now"
        )
        if before != hardware:
            msg = (
                f"{figures}. It was measured on {before}, and this is {hardware}. If that does not "
                "explain it, an attribute of the model (the eps of a layer, a flag) has changed "
                "since: give this search another storage=."
            )
            warn(msg, VersionWarning)
            return
        msg = (
            f"{figures}, with the same weights, data and code: an attribute of the model (the eps "
            "of a layer, a flag), a global or the environment has changed since. Restore it, or "
            "give this search another storage=, as studies in one share values; or pass "
            "checks=Checks(repeat=False) to take the stored ones."
        )
        raise StudyMismatchError(msg)


_STEP, _ROUNDING, _FLIPS = 1e-5, 1e-3, 2.5  # parts of a value, samples that round otherwise


def shown(one: float | str, other: float | str) -> tuple[str, str]:
    """Return two values with as many digits as tell them apart, four at least.

    Example:
        >>> shown(2.10486, 2.10486123), shown(0.5, "nothing")
        (('2.10486', '2.104861'), ('0.5', 'nothing'))
    """
    texts = [f"{one}", f"{other}"]
    if isinstance(one, str) or isinstance(other, str):
        return texts[0], texts[1]
    for digits in range(4, 17):
        texts = [f"{value:.{digits}g}" for value in (one, other)]
        if texts[0] != texts[1]:
            break
    return texts[0], texts[1]


def hardware_of(trainer: Trainer) -> str:
    """Return what a Trainer computes on, in words."""
    kind = trainer.strategy.root_device.type
    name = describe_device(kind)
    return f"{name} with {torch.get_num_threads()} threads" if kind == "cpu" else name


def warn_of_renewal(
    own: Mapping[str, float], renewed: Mapping[str, float], directions: Mapping[str, str], n: int
) -> None:
    """Warn if renewed running statistics make a network worse by more than noise.

    Args:
        own: Metrics of the whole network with the statistics of its training.
        renewed: The same with renewed ones.
        directions: `"max"` or `"min"` of the metrics that count.
        n: How many samples were validated; 0 if it is not known.
    """
    for name, direction in directions.items():
        if name not in own or name not in renewed:
            continue
        before, after = own[name], renewed[name]
        loss = before - after if direction == "max" else after - before
        if loss > _noise(before, n, direction):
            msg = (
                f"Renewing the running statistics of BatchNorm makes the whole network worse: "
                f"{name} is {before:.4g} with those of its training, and {after:.4g} with those of "
                "the calibration images, as every subnet gets them. Usually these are not what the "
                "training saw (its augmentation is missing in train_dataloader), too few "
                "(calibration_images=), or in the order of their classes (shuffle=True)."
            )
            warn(msg, CalibrationWarning)
            return


def _noise(value: float, n: int, direction: str) -> float:
    """Return what a metric may differ by without a cause: twice its standard error, if a share.

    Both scores are of the same samples. Of a trained network most answers stay, so a difference has
    about a third of the standard error of a share (`benchmarks/calibration.py`); of one near chance
    most answers change. What is minimised may be the share of errors, or a loss below 1.
    """
    if not (0 <= value <= 1 and n):
        return _LEAST_PART * abs(value)
    error = math.sqrt(value * (1 - value) / n)
    right = value if direction == "max" else 1 - value
    noise = max(_LEAST_SHARE, 2 * error * (_PAIRED if right >= _TRAINED else math.sqrt(2)))
    return noise if direction == "max" else max(noise, _LEAST_PART * value)


_TRAINED, _PAIRED = 0.5, 0.35
_LEAST_SHARE, _LEAST_PART = 0.005, 0.05


class WeightGuard:
    """The parameters of a module as they are now, to notice a change and to undo it.

    Args:
        module: The module; a copy of its parameters is taken into host memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = {name: p.detach().cpu().clone() for name, p in module.named_parameters()}
        self._sums = self._checksums()

    def changed(self) -> list[str]:
        """Return the names of the parameters whose content is another one now."""
        sums = self._checksums()
        return [
            name
            for name in dict.fromkeys([*self._sums, *sums])
            if self._sums.get(name) != sums.get(name)
        ]

    def check(self) -> None:
        """Raise `MeasurementError` if a validation has changed parameters, and put them back."""
        if names := self.changed():
            self.restore()
            msg = (
                f"Validation changes weights of {type(self._module).__name__}: "
                f"{listed(names, limit=3)}. Each subnet would be scored with those that the ones "
                "before it left; they were put back. Keep validation_step and its hooks from "
                "training, or pass checks=Checks(weights=False)."
            )
            raise MeasurementError(msg)

    def restore(self) -> None:
        """Put the first values back."""
        with torch.no_grad():
            for name, p in self._module.named_parameters():
                if name in self._values and p.shape == self._values[name].shape:
                    p.copy_(self._values[name])

    def _checksums(self) -> dict[str, Any]:
        names, sums, others = [], [], {}
        for name, p in self._module.named_parameters():
            if (total := _checksum(p.detach())) is None:
                others[name] = hashed(p.detach())
            else:
                names.append(name)
                sums.append(total)
        totals = torch.stack([x.cpu() for x in sums]).tolist() if sums else []
        return {**dict(zip(names, totals, strict=True)), **others}


class OwnWeights(BeforeFirstBatch):
    """Notes whether a validation runs with other weights than the model has before and after it.

    Some models put moving averages in their place meanwhile.

    Args:
        guard: Knows the weights of the model.
        place: The place of the network that is scored.

    Attributes:
        in_place: Whether it is the super-network that runs; what is extracted copies its hooks.
        others: The names of parameters that were other ones.
    """

    def __init__(self, guard: WeightGuard, place: Place) -> None:
        self._guard, self._place = guard, place
        self._hook: Any = None
        self.in_place = True
        self.others: list[str] = []

    def prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Look now, and when the network runs."""
        self._look()
        if self.in_place:
            self._hook = self._place.part.register_forward_pre_hook(self._look)

    def _look(self, *_args: Any) -> None:
        self.others = self.others or self._guard.changed()

    def on_validation_batch_end(self, *_args: Any) -> None:
        """Look at the first batch alone."""
        self.end()

    def check(self) -> None:
        """Raise `MeasurementError` if there were others."""
        if self.others:
            msg = (
                f"Validation runs with other weights than {type(self._place.model).__name__} has "
                f"before and after it: {listed(self.others, limit=3)}. What is extracted has the "
                "model's own, so the score would be that of another network. If its hooks put "
                "averages of weights in their place, give these to the model before the search; "
                "or pass checks=Checks(weights=False)."
            )
            raise MeasurementError(msg)

    def end(self) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksum(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the sum of the bits of a tensor's elements, or None where they cannot be read so."""
    if tensor.layout != torch.strided or tensor.is_quantized or type(tensor) is not torch.Tensor:
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = _INTEGERS.get(tensor.element_size())
    if bits is None:
        return None
    return tensor.contiguous().reshape(-1).view(bits).sum(dtype=torch.int64)
