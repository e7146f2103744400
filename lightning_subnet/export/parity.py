# SPDX-License-Identifier: Apache-2.0
"""Difference: how far the outputs of a file, in its own runtime, are from those of its network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet._torch.outputs import Difference, difference
from lightning_subnet.errors import ExportError, FixedBatchError
from lightning_subnet.export.call import Call, Flat, brief
from lightning_subnet.export.formats.base import Format


def compared(file: Path, form: Format, net: nn.Module, call: Call, tolerance: float) -> Difference:
    """Return the largest difference of the outputs of a file and of its network.

    Args:
        file: A file, which is run by its own runtime.
        form: Its format.
        net: The network on the CPU.
        call: The inputs that both are run on, in batches of several sizes.
        tolerance: Largest allowed difference, as a share of the largest absolute output.

    Raises:
        ExportError: It is too large.
        FixedBatchError: It is, or the file cannot run, for other batch sizes only.
    """
    runner, worst = form.open(file), Difference()
    reference = Flat(net, call)
    for i, tensors in enumerate(call.batches):
        kind = FixedBatchError if i else ExportError
        with evaluating(net), torch.no_grad():
            expected = reference(*tensors)
        try:
            outputs = list(runner.run(tensors).values())
        except Exception as error:  # of the runtime's own classes
            msg = f"The {form.name} file of {type(net).__name__} fails on a batch of "
            raise kind(f"{msg}{rows(tensors)}: {brief(error)}") from error
        for name, one, other in zip(call.output_names, expected, outputs, strict=True):
            parity = difference(one, other)
            if not parity.relative <= tolerance:
                msg = (
                    f"The {form.name} file gives other outputs than {type(net).__name__}: "
                    f"{name!r} differs by up to {parity.absolute:.3g} "
                    f"({parity.relative:.2g} of its scale, allowed {tolerance:g}).\n"
                    "Nothing was written. Is the network random in eval mode? If such a "
                    "difference is fine, pass tolerance=."
                )
                raise kind(msg)
            worst = Difference(
                max(worst.absolute, parity.absolute), max(worst.relative, parity.relative)
            )
    return worst


def rows(tensors: tuple[torch.Tensor, ...]) -> int:
    """Return the size of a batch."""
    return next((len(x) for x in tensors if x.ndim), 0)
