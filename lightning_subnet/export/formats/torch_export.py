# SPDX-License-Identifier: Apache-2.0
"""torch.export."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet.export.call import Call, Flat
from lightning_subnet.export.formats.base import _refused, quiet


def to_exported_program(
    net: nn.Module, inputs: Any, *, dynamic_batch: bool = True
) -> torch.export.ExportedProgram:
    """Return a network in eval mode as a `torch.export.ExportedProgram`, with its own signature.

    Args:
        net: An extracted subnet, or any network.
        inputs: As in `to_onnx`.
        dynamic_batch: As in `to_onnx`.

    Raises:
        ExportError: As `to_onnx`.

    Example:
        >>> program = to_exported_program(nn.Linear(3, 2), torch.zeros(1, 3))
        >>> program.module()(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    call = Call.of(net, inputs, dynamic_batch=dynamic_batch)
    try:
        with quiet(), evaluating(net), torch.no_grad():
            return torch.export.export(
                net, call.args, call.kwargs, dynamic_shapes=call.dynamic_shapes(net), strict=False
            )
    except Exception as error:  # of many classes, by what fails
        raise _refused(net, "torch.export", call, [error]) from error


def _flat_program(net: nn.Module, call: Call) -> torch.export.ExportedProgram:
    """Return a network as an ExportedProgram of tensors in and tensors out."""
    flat = Flat(net, call)
    flat.training = False
    with evaluating(net), torch.no_grad():
        return torch.export.export(
            flat, call.tensors, dynamic_shapes=call.flat_shapes(), strict=False
        )
