# SPDX-License-Identifier: Apache-2.0
"""OpenVINO."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from torch import nn

from lightning_subnet.export.call import Call
from lightning_subnet.export.formats.base import _FIXED, _refused, library, quiet
from lightning_subnet.export.formats.onnx import _traced_onnx
from lightning_subnet.export.formats.torch_export import _flat_program


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
    library("openvino"), library("onnx")  # what is missing is said first
    call = Call.of(net, inputs, dynamic_batch=dynamic_batch)
    reasons: list[Exception] = []
    for convert in (_traced_openvino, _graph_openvino):
        try:
            with quiet():
                model = convert(net, call)
                shapes = [port.partial_shape for port in model.outputs]
                for name, shape, found in zip(
                    call.output_names, call.output_shapes, shapes, strict=True
                ):
                    if call.in_batch(shape) and found.rank.is_static and found[0].is_static:
                        raise RuntimeError(f"{_FIXED}: {name!r} has {found}")
                return model
        except Exception as error:  # of many classes, by what fails
            reasons.append(error)
    raise _refused(net, "OpenVINO", call, reasons) from reasons[-1]


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
    return library("openvino").Core()


def _traced_openvino(net: nn.Module, call: Call) -> Any:
    """Return what OpenVINO reads from traced ONNX."""
    return openvino_core().read_model(_traced_onnx(net, call))


def _graph_openvino(net: nn.Module, call: Call) -> Any:
    """Return what OpenVINO makes of an ExportedProgram."""
    openvino = library("openvino")
    # Not by convert_model(), which reports every use to its makers.
    decoder: Any = importlib.import_module("openvino.frontend.pytorch.fx_decoder")
    manager: Any = importlib.import_module("openvino.frontend").FrontEndManager()
    frontend = manager.load_by_framework("pytorch")
    program = decoder.TorchFXPythonDecoder.from_exported_program(_flat_program(net, call))
    model = frontend.convert(frontend.load(program))
    kept = {port.any_name: port.get_node() for port in model.inputs}
    parameters = []
    for i, (name, x) in enumerate(zip(call.input_names, call.tensors, strict=True)):
        shape = openvino.PartialShape([-1, *x.shape[1:]] if call.in_batch(x.shape) else [*x.shape])
        node = kept.get(f"tensors_{i}")  # the name in Flat; none for an input that is not used
        if node is None:
            element = openvino.Type(x.detach().cpu().numpy().dtype)
            node = openvino.op.Parameter(element, shape)
        node.set_partial_shape(shape)
        node.output(0).get_tensor().set_names({name})
        parameters.append(node)
    model = openvino.Model(model.get_results(), parameters, type(net).__name__)
    model.validate_nodes_and_infer_types()
    for port, name in zip(model.outputs, call.output_names, strict=True):
        port.get_tensor().set_names({name})
    return model
