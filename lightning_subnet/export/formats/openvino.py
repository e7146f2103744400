# SPDX-License-Identifier: Apache-2.0
"""OpenVINO models (.xml with .bin); the only file that imports openvino."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.names import class_name
from lightning_subnet.errors import FixedBatchError
from lightning_subnet.export.call import Call, ordinary
from lightning_subnet.export.formats.base import (
    Format,
    Runner,
    Writer,
    check_types,
    dict_code,
    optional,
    quiet,
    refusal,
)
from lightning_subnet.export.formats.onnx import LOGGERS, import_onnx, traced_onnx
from lightning_subnet.export.formats.torch_export import flat_program

_REQUIREMENT = "lightning-subnet[openvino]"


def import_openvino() -> Any:
    """Return the module openvino.

    Raises:
        ExportError: It is not installed.
    """
    with optional("openvino", _REQUIREMENT):
        import openvino
    return openvino


def to_openvino(net: nn.Module, inputs: Any, *, dynamic_batch: bool = True) -> Any:
    """Return a network in eval mode as an `openvino.Model`.

    It is read from traced ONNX, ten times faster than by OpenVINO's own conversion, which is used
    for what ONNX cannot express.

    Args:
        net: An extracted subnet, or any network.
        inputs: As in `to_onnx`.
        dynamic_batch: As in `to_onnx`.

    Raises:
        ExportError: As `to_onnx`.

    Example:
        >>> model = to_openvino(nn.Linear(3, 2), torch.zeros(1, 3))
        >>> model.input(0).any_name, str(model.output(0).partial_shape)
        ('input', '[?,2]')
    """
    OpenVino().check()  # before the network is run
    net = ordinary(net)
    return _converted(net, Call.of(net, inputs, dynamic_batch=dynamic_batch))


def openvino_compiled(model: Any, *, threads: int | None = None) -> Any:
    """Return an `openvino.CompiledModel` for the CPU, in the precision of the model.

    Args:
        model: An `openvino.Model`, or the path of an .xml file.
        threads: Threads of one inference; None: as OpenVINO has it.
    """
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return openvino_core().compile_model(model, "CPU", options)


@cache
def openvino_core() -> Any:
    """Return the one `openvino.Core` of this process, which stays.

    With the first model that a Core compiles for the CPU, the stack on which its thread handles
    signals becomes the Core's (Linux). The Core unmaps it when it goes, and puts the one before it
    back only if it goes in the same thread and before any Core that came later. Otherwise the next
    signal, from a worker of a DataLoader that ends, say, is a segmentation fault.
    """
    return import_openvino().Core()


class OpenVino(Format):
    """Files for OpenVINO, whose weights keep their precision and lie in a .bin of the same name."""

    name = "openvino"
    title = "OpenVINO"
    suffix = ".xml"
    libraries = MappingProxyType({"openvino": import_openvino, "onnx": import_onnx})
    weights = ".bin"

    def writers(self) -> Sequence[Writer]:
        """Return the one way."""
        return [_write]

    def load(self, path: Path, threads: int | None) -> Runner:
        """Return a compiled model."""
        return _Compiled(path, threads)

    def snippet(self, file: str, inputs: Sequence[str]) -> str:
        """Return code that needs openvino."""
        return (
            "import openvino\n"
            'exact = {"INFERENCE_PRECISION_HINT": "f32"}  # by itself it may choose bfloat16\n'
            f'net = openvino.compile_model("{file}", "CPU", exact)\n'
            f"outputs = net({dict_code(inputs)})  # NumPy arrays"
        )


def _converted(net: nn.Module, call: Call) -> Any:
    check_types(net, OpenVino.title, call)
    reasons: list[Exception] = []
    for convert in (_traced_openvino, _graph_openvino):
        try:
            with quiet("openvino", *LOGGERS):
                model = convert(net, call)
                _check_batch(model, call)
                return model
        except Exception as error:  # of many classes, by what fails
            reasons.append(error)
    raise refusal(net, OpenVino.title, call, reasons) from reasons[-1]


def _traced_openvino(net: nn.Module, call: Call) -> Any:
    """Return the model that OpenVINO reads from traced ONNX."""
    return openvino_core().read_model(traced_onnx(net, call))


def _graph_openvino(net: nn.Module, call: Call) -> Any:
    """Return the model that OpenVINO makes of an ExportedProgram."""
    openvino = import_openvino()
    # Not by convert_model(), which reports every use to its makers.
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    program = TorchFXPythonDecoder.from_exported_program(flat_program(net, call))
    model = frontend.convert(frontend.load(program))
    nodes = {port.any_name: port.get_node() for port in model.inputs}
    parameters = []
    for i, (name, x) in enumerate(zip(call.input_names, call.tensors, strict=True)):
        shape = openvino.PartialShape([-1, *x.shape[1:]] if call.in_batch(x.shape) else [*x.shape])
        node = nodes.get(f"tensors_{i}")  # the name in Flat; none for an input that is not used
        if node is None:
            element = openvino.Type(x.detach().cpu().numpy().dtype)
            node = openvino.op.Parameter(element, shape)
        node.set_partial_shape(shape)
        node.output(0).get_tensor().set_names({name})
        parameters.append(node)
    model = openvino.Model(model.get_results(), parameters, class_name(net))
    model.validate_nodes_and_infer_types()
    for port, name in zip(model.outputs, call.output_names, strict=True):
        port.get_tensor().set_names({name})
    return model


def _check_batch(model: Any, call: Call) -> None:
    """Raise if an output that counts the samples has a batch of one size."""
    ports = zip(call.output_names, call.output_shapes, model.outputs, strict=True)
    for name, shape, port in ports:
        size = port.partial_shape
        if call.in_batch(shape) and size.rank.is_static and size[0].is_static:
            raise FixedBatchError(f"{name!r} has {size} for any batch size")


def _write(net: nn.Module, call: Call, path: Path) -> None:
    import_openvino().save_model(_converted(net, call), str(path), compress_to_fp16=False)


class _Compiled:
    def __init__(self, path: Path, threads: int | None) -> None:
        self._compiled = openvino_compiled(str(path), threads=threads)
        self.inputs = tuple(port.any_name for port in self._compiled.inputs)
        self._outputs = [port.any_name for port in self._compiled.outputs]

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        arrays = [x.detach().cpu().contiguous().numpy() for x in tensors]
        outputs = self._compiled(dict(zip(self.inputs, arrays, strict=True)))
        return {
            name: torch.tensor(outputs[i]) for i, name in enumerate(self._outputs)
        }  # copies: the runtime reuses its memory
