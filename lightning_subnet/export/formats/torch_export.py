# SPDX-License-Identifier: Apache-2.0
"""torch.export: ExportedPrograms, which need torch alone (.pt2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.outputs import named_outputs
from lightning_subnet.errors import ExportError
from lightning_subnet.export.call import Call, Flat, ordinary
from lightning_subnet.export.formats.base import Format, Runner, Writer, quiet, refusal

_NOTES = ("stack_trace", "source_fn_stack", "torch_fn", "from_node")  # of a node


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
    net = ordinary(net)
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
        """Return the signature of the network, and one of tensors, for outputs of other types."""
        return [_write, _write_flat]

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
    if foreign := _foreign_type(program.call_spec.out_spec):
        msg = f"{class_name(net)} returns a {foreign}, which whoever loads the file may not have"
        raise ExportError(f"{msg}. Wrap it so that forward() returns tensors or a dict of them.")
    _save(program, call, path)


def _foreign_type(spec: Any) -> str:
    """Return the name of a type in an output that Python does not have, or an empty string."""
    if spec is None or spec.type is None:
        return ""
    if spec.type not in (tuple, list, dict, OrderedDict):
        return str(getattr(spec.type, "__name__", spec.type))
    parts = spec.children() if hasattr(spec, "children") else spec.children_specs  # before 2.9
    return next(filter(None, map(_foreign_type, parts)), "")


def _write_flat(net: nn.Module, call: Call, path: Path) -> None:
    try:
        with quiet():
            program = flat_program(net, call)
    except Exception as error:  # of many classes, by what fails
        raise refusal(net, TorchExport.title, call, [error]) from error
    _save(program, call, path)


def _save(program: torch.export.ExportedProgram, call: Call, path: Path) -> None:
    _strip(program, call)
    with quiet():
        torch.export.save(program, str(path))


def _strip(program: torch.export.ExportedProgram, call: Call) -> None:
    """Clear what a program says of the code and the data that it was made with.

    The tree of modules stays, as `torch.export.unflatten` needs it; of the example only sizes and
    types do.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for name in _NOTES:
                node.meta.pop(name, None)

    def blank(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.zeros_like(x[:2] if call.in_batch(x.shape) else x)

    program.example_inputs = tree_map(blank, program.example_inputs)


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
