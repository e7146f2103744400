# SPDX-License-Identifier: Apache-2.0
"""torch.export: ExportedPrograms, which need torch alone (.pt2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet._torch.outputs import named_outputs
from lightning_subnet.export.call import Call, Flat
from lightning_subnet.export.formats.base import Format, Runner, Writer, quiet, refusal


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
    return _program(net, Call.of(net, inputs, dynamic_batch=dynamic_batch))


def flat_program(net: nn.Module, call: Call) -> torch.export.ExportedProgram:
    """Return a network as an ExportedProgram of tensors in and tensors out.

    Raises:
        Exception: Of many classes, where `torch.export` fails.
    """
    flat = Flat(net, call)
    flat.training = False
    with evaluating(net), torch.no_grad():
        return torch.export.export(
            flat, call.tensors, dynamic_shapes=call.flat_shapes(), strict=False
        )


class TorchExport(Format):
    """Files of `torch.export.save`."""

    name = "torch"
    title = "torch.export"
    suffix = ".pt2"

    def writers(self) -> Sequence[Writer]:
        """Return the one way."""
        return [_write]

    def load(self, path: Path, threads: int | None) -> Runner:
        """Return a program, which runs with the threads of torch."""
        return _Program(path)

    def snippet(self, file: str, inputs: Sequence[str]) -> str:
        """Return code that needs torch."""
        return (
            "import torch\n"
            f'net = torch.export.load("{file}").module()\n'
            f"outputs = net({', '.join(inputs)})  # tensors"
        )


def _program(net: nn.Module, call: Call) -> torch.export.ExportedProgram:
    try:
        with quiet(), evaluating(net), torch.no_grad():
            return torch.export.export(
                net, call.args, call.kwargs, dynamic_shapes=call.dynamic_shapes(net), strict=False
            )
    except Exception as error:  # of many classes, by what fails
        raise refusal(net, TorchExport.title, call, [error]) from error


def _write(net: nn.Module, call: Call, path: Path) -> None:
    program = _program(net, call)
    with quiet():
        torch.export.save(program, str(path))


class _Program:
    def __init__(self, path: Path) -> None:
        with quiet():
            program = torch.export.load(str(path))
            self._module = program.module()
        # The arguments that it was exported with: what is not a tensor goes in again.
        example: Any = program.example_inputs or ((), {})
        self._args, self._kwargs = example
        arguments = [*self._args, *self._kwargs.values()]
        names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
        self.inputs = tuple(names[: sum(isinstance(x, torch.Tensor) for x in arguments)])

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        rest = iter(tensors)

        def filled(x: Any) -> Any:
            return next(rest).detach().cpu() if isinstance(x, torch.Tensor) else x

        args = [filled(x) for x in self._args]
        kwargs = {name: filled(x) for name, x in self._kwargs.items()}
        with torch.no_grad():
            return named_outputs(self._module(*args, **kwargs))
