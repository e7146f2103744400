# SPDX-License-Identifier: Apache-2.0
"""Difference: how far the outputs of a file, in its own runtime, are from those of its network."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_subnet._checks import is_share
from lightning_subnet._torch.contexts import evaluating
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.outputs import Difference, default_tolerance, difference
from lightning_subnet.errors import ExportError, FileParityError, FixedBatchError
from lightning_subnet.export.call import Call, Flat, brief
from lightning_subnet.export.formats.base import Format


class _OtherBatchError(FixedBatchError, FileParityError):
    """A file gives other outputs for other batch sizes only."""


def checked_tolerance(tolerance: Any) -> float | None:
    """Return a tolerance as it was passed.

    Raises:
        ExportError: It is neither None nor a number above 0 and up to 1.

    Example:
        >>> checked_tolerance(-1)
        Traceback (most recent call last):
        lightning_subnet.errors.ExportError: tolerance=-1 must be a positive number up to 1, ...
    """
    if tolerance is None:
        return None
    if not is_share(tolerance):
        msg = (
            f"tolerance={tolerance!r:.60} must be a positive number up to 1, a share of the "
            "largest output such as 1e-4, or None for what rounding explains."
        )
        raise ExportError(msg)
    return float(tolerance)


def tolerance_of(net: nn.Module, call: Call) -> float:
    """Return the largest difference that rounding explains, as a share of the largest output.

    Args:
        net: A network, whose coarsest type decides: of weights, buffers, inputs and outputs.
        call: Its inputs.
    """
    outputs = _outputs(net, call, call.tensors)
    return default_tolerance([*net.parameters(), *net.buffers(), *call.tensors, *outputs])


def check_extraction(net: nn.Module, call: Call, tolerance: float) -> float | None:
    """Return how far a subnet's outputs were from those of its super-network when it was extracted.

    Args:
        net: A network; what `result.extract` returns has the largest absolute difference as its
            attribute `parity`.
        call: Its inputs.
        tolerance: Largest allowed difference, as a share of the largest absolute output, or of 1
            if that is smaller: the figure is from other inputs.

    Returns:
        The largest absolute difference; None if it is not known.

    Raises:
        FileParityError: It is too large.
    """
    parity = vars(net).get("parity")
    if not isinstance(parity, Real) or isinstance(parity, bool) or math.isnan(parity):
        return None
    outputs = _outputs(net, call, call.tensors)
    scale = max(
        [1.0, *(float(x.abs().max()) for x in outputs if x.numel() and x.is_floating_point())]
    )
    if not parity <= tolerance * scale:
        msg = (
            f"{class_name(net)} is not the subnet that was scored: when it was extracted, its "
            f"outputs differed by up to {parity:.3g} from those of the super-network (allowed "
            f"{tolerance * scale:.3g}, {tolerance:.2g} of their scale).\nNothing was written. Look "
            "at the extract() of the super-network, and at hooks that its copy does not run."
        )
        raise FileParityError(msg)
    return float(parity)


def compared(file: Path, form: Format, net: nn.Module, call: Call, tolerance: float) -> Difference:
    """Return the largest difference of the outputs of a file and of its network.

    Args:
        file: A file, which is run by its own runtime.
        form: Its format.
        net: The network on the CPU.
        call: The inputs that both are run on, in batches of several sizes.
        tolerance: Largest allowed difference, as a share of the largest absolute output.

    Raises:
        FileParityError: It is too large.
        FixedBatchError: It is, or the file cannot run, for other batch sizes only.
        ExportError: The file does not run, or gives another number of outputs.
    """
    runner, worst = form.open(file), Difference()
    for i, tensors in enumerate(call.batches):
        kind, other_kind = (
            (FixedBatchError, _OtherBatchError) if i else (ExportError, FileParityError)
        )
        expected = _outputs(net, call, tensors)
        try:
            outputs = list(runner.run([x.clone() for x in tensors]).values())
        except Exception as error:  # of the runtime's own classes
            msg = f"The {form.name} file of {class_name(net)} fails on a batch of "
            raise kind(f"{msg}{rows(tensors)}: {brief(error)}") from error
        if len(outputs) != len(expected):
            msg = f"The {form.name} file of {class_name(net)} has {len(outputs)} outputs, and "
            raise kind(f"{msg}the network {len(expected)}. Nothing was written.")
        for name, one, other in zip(call.output_names, expected, outputs, strict=True):
            parity = difference({name: one}, {name: other})
            if not parity.relative <= tolerance:
                where = f"for a batch of {rows(tensors)}"
                if one.shape != other.shape:
                    both = f"{tuple(one.shape)} in the network, {tuple(other.shape)} in the file"
                    what = f"{name!r} differs by up to inf: its shape is {both}, {where}"
                else:
                    what = (
                        f"{name!r} differs by up to {parity.absolute:.3g}: {parity.expected:.6g} "
                        f"in the network, {parity.value:.6g} in the file, {where} "
                        f"({parity.relative:.2g} of its scale, allowed {tolerance:g})"
                    )
                raise other_kind(_refusal(form.name, class_name(net), what))
            largest = max(worst.absolute, parity.absolute)
            worst = max(worst, parity, key=lambda gap: gap.relative)
            worst = replace(worst, absolute=largest)
    _check_repeatable(net, call, tolerance)
    return worst


def _check_repeatable(net: nn.Module, call: Call, tolerance: float) -> None:
    """Raise if a network keeps something from one run to the next, which no file does."""
    one, other = (_outputs(net, call, call.tensors) for _ in range(2))
    names = call.output_names
    gap = difference(dict(zip(names, one, strict=True)), dict(zip(names, other, strict=True)))
    if not gap.relative <= tolerance:
        msg = (
            f"{class_name(net)} gives other outputs for the same input from one run to the "
            f"next: {gap} (allowed {tolerance:g}).\nNothing was written. A file cannot do that: "
            "let the network neither draw in eval mode nor keep something from one run to the next."
        )
        raise FileParityError(msg)


def _refusal(form: str, kind: str, what: str) -> str:
    """Return what is to be said of a file with other outputs than its network."""
    return (
        f"The {form} file gives other outputs than {kind}: {what}.\n"
        f"Nothing was written. Is {kind} random in eval mode, or does it keep something from one "
        "run to the next? If the difference is rounding, pass tolerance=."
    )


def _outputs(
    net: nn.Module, call: Call, tensors: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Return the outputs of a network, in eval mode."""
    with evaluating(net), torch.no_grad():
        # A network may work on them in place.
        outputs: tuple[torch.Tensor, ...] = Flat(net, call)(*(x.clone() for x in tensors))
    return outputs


def rows(tensors: tuple[torch.Tensor, ...]) -> int:
    """Return the size of a batch."""
    return next((len(x) for x in tensors if x.ndim), 0)
