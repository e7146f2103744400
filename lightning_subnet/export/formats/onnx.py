# SPDX-License-Identifier: Apache-2.0
"""ONNX, run by ONNX Runtime; the only file that imports onnx, onnxscript and onnxruntime.

A trace is fifteen times faster to make than by way of `torch.export`, and what OpenVINO reads
fastest. Where a trace would freeze what the network decides, `torch.export` is used.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet.errors import FixedBatchError
from lightning_subnet.export.call import Call, Flat, brief, ordinary
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
from lightning_subnet.export.formats.torch_export import flat_program

Exporter = Literal["auto", "trace", "graph"]

LOGGERS = ("onnxscript", "onnx_ir", "onnxruntime")

_OPSET = 18  # ONNX Runtime 1.14 and OpenVINO 2023.0 read it
_REQUIREMENT = "lightning-subnet[onnx]"


def import_onnx() -> Any:
    """Return the module onnx.

    Raises:
        ExportError: It is not installed.
    """
    with optional("onnx", _REQUIREMENT):
        import onnx
    return onnx


def import_onnxscript() -> Any:
    """Return the module onnxscript.

    Raises:
        ExportError: It is not installed.
    """
    with optional("onnxscript", _REQUIREMENT):
        import onnxscript
    return onnxscript


def import_onnxruntime() -> Any:
    """Return the module onnxruntime.

    Raises:
        ExportError: It is not installed.
    """
    with optional("onnxruntime", _REQUIREMENT):
        import onnxruntime
    return onnxruntime


def to_onnx(
    net: nn.Module, inputs: Any, *, dynamic_batch: bool = True, exporter: Exporter = "auto"
) -> bytes:
    """Return a network in eval mode as a serialised ONNX model.

    Args:
        net: An extracted subnet, or any network.
        inputs: A tensor (batch, ...), a tuple of positional or a dict of keyword arguments.
        dynamic_batch: The size of dimension 0 is left open, in every input and output that has the
            samples of the batch there; otherwise all sizes are those of the inputs.
        exporter: `"trace"` runs the network once and records its operators, in a tenth of a second;
            `"graph"` goes through `torch.export`, in seconds, and follows more of its code;
            `"auto"` takes the first, and the second where the first warns or fails.

    Returns:
        The model; inputs are called as the arguments of `forward`, outputs `output`, or `output_0`,
        `output_1`, ... of a tuple, or as the keys of a dict.

    Raises:
        ExportError: An operator has no ONNX form, the network fixes its batch size although it is
            to be dynamic, it does not take the inputs, or the extra is not installed.

    Example:
        >>> model = to_onnx(nn.Linear(3, 2), torch.zeros(1, 3))
        >>> [(i.name, i.shape) for i in onnx_session(model).get_inputs()]
        [('input', ['batch', 3])]
    """
    import_onnx()
    net = ordinary(net)
    return _converted(net, Call.of(net, inputs, dynamic_batch=dynamic_batch), exporter)


def onnx_session(model: bytes | str, *, threads: int | None = None) -> Any:
    """Return an `onnxruntime.InferenceSession` on the CPU.

    Args:
        model: A serialised model, or the path of a file.
        threads: Threads within an operator; None: as ONNX Runtime has it.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled(model)
    )


def disabled(model: bytes | str) -> list[str] | None:
    """Return the optimisations of ONNX Runtime that a model must not have.

    Its layouts for float32 end the process (1.32, on a CPU) at a float16 product of a transpose.

    Args:
        model: A serialised model, or the path of a file.
    """
    return ["NchwcTransformer"] if _is_half(model) else None


def _is_half(model: bytes | str) -> bool:
    """Return whether a model has weights, inputs or outputs of float16."""
    onnx = import_onnx()
    proto = onnx.load_model_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    half, graph = onnx.TensorProto.FLOAT16, proto.graph
    ports = (*graph.input, *graph.output)
    return any(x.data_type == half for x in graph.initializer) or any(
        port.type.tensor_type.elem_type == half for port in ports
    )


def traced_onnx(net: nn.Module, call: Call) -> bytes:
    """Return the serialised model of the TorchScript exporter.

    Raises:
        RuntimeError: The trace would freeze a decision of the network, or drop an input.
        Exception: Of many classes, where the exporter fails.
    """
    flat = Flat(net, call)
    flat.training = False
    buffer: Any = io.BytesIO()  # which the annotation of export() leaves out
    with warnings.catch_warnings(record=True) as caught, evaluating(net), torch.no_grad():
        warnings.simplefilter("always")
        torch.onnx.export(
            flat, call.tensors, buffer, dynamo=False, opset_version=_OPSET,
            input_names=list(call.input_names), output_names=list(call.output_names),
            dynamic_axes={name: {0: "batch"} for name in _names_in_batch(call)},
        )  # fmt: skip
    for warning in caught:
        if warning.category.__name__ == "TracerWarning":
            msg = f"a trace would freeze a decision: {str(warning.message).splitlines()[0]:.120}"
            raise RuntimeError(msg)
    model = bytes(buffer.getvalue())
    inputs = {port.name for port in import_onnx().load_model_from_string(model).graph.input}
    if unused := [name for name in call.input_names if name not in inputs]:
        raise RuntimeError(f"a trace would drop the input {unused[0]!r}")
    return model


class Onnx(Format):
    """Files for ONNX Runtime, and for most compilers for devices."""

    name = "onnx"
    title = "ONNX"
    suffix = ".onnx"
    libraries = MappingProxyType(
        {
            "onnx": import_onnx,
            "onnxscript": import_onnxscript,
            "onnxruntime": import_onnxruntime,
        }
    )

    def writers(self) -> Sequence[Writer]:
        """Return a trace, and the way through `torch.export`."""
        return [partial(_write, exporter="trace"), partial(_write, exporter="graph")]

    def load(self, path: Path, threads: int | None) -> Runner:
        """Return a session of ONNX Runtime."""
        return _Session(path, threads)

    def snippet(self, file: str, inputs: Sequence[str]) -> str:
        """Return code that needs onnxruntime."""
        return (
            "import onnxruntime\n"
            f'session = onnxruntime.InferenceSession("{file}")\n'
            f"outputs = session.run(None, {dict_code(inputs)})  # NumPy arrays"
        )


def _converted(net: nn.Module, call: Call, exporter: Exporter) -> bytes:
    check_types(net, Onnx.title, call)
    reasons: list[Exception] = []
    for name, convert in (("trace", traced_onnx), ("graph", _graph_onnx)):
        if exporter not in ("auto", name):
            continue
        try:
            with quiet(*LOGGERS):
                model = _anonymous(convert(net, call))
                if call.batch is not None:
                    _check_batch(model, call)
                return model
        except Exception as error:  # of many classes, by exporter and version
            reasons.append(error)
    raise refusal(net, Onnx.title, call, reasons) from reasons[-1]


def _anonymous(model: bytes) -> bytes:
    """Return a model without what no runtime needs: the files and lines of the code it is from."""
    proto = import_onnx().load_model_from_string(model)
    _strip(proto)
    return bytes(proto.SerializeToString())


def _strip(message: Any) -> None:
    """Clear the notes of a message and of all that it holds: graphs, nodes, tensors, functions."""
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def _names_in_batch(call: Call) -> list[str]:
    """Return the names of the inputs and outputs that count the samples in dimension 0."""
    names = (*call.input_names, *call.output_names)
    shapes = (*(x.shape for x in call.tensors), *call.output_shapes)
    return [name for name, shape in zip(names, shapes, strict=True) if call.in_batch(shape)]


def _graph_onnx(net: nn.Module, call: Call) -> bytes:
    """Return the serialised model of the exporter that goes through `torch.export`."""
    import_onnxscript()
    program = torch.onnx.export(
        flat_program(net, call), dynamo=True, verbose=False, opset_version=_OPSET,
        input_names=list(call.input_names), output_names=list(call.output_names),
    )  # fmt: skip
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _check_batch(model: bytes, call: Call) -> None:
    """Raise if a model does not take a batch of another size."""
    arrays = [x.cpu().numpy() for x in call.longer()]
    try:
        outputs = onnx_session(model).run(None, dict(zip(call.input_names, arrays, strict=True)))
    except Exception as error:  # of the runtime's own classes
        raise FixedBatchError(f"it fails on another batch size: {brief(error, 100)}") from error
    for name, shape, y in zip(call.output_names, call.output_shapes, outputs, strict=True):
        if call.in_batch(shape) and len(y) != shape[0] + 1:
            raise FixedBatchError(f"{name!r} has {y.shape} for another batch size")


def _write(net: nn.Module, call: Call, path: Path, *, exporter: Exporter) -> None:
    path.write_bytes(_converted(net, call, exporter))


class _Session:
    def __init__(self, path: Path, threads: int | None) -> None:
        self._session = onnx_session(str(path), threads=threads)
        self.inputs = tuple(port.name for port in self._session.get_inputs())
        self._outputs = [port.name for port in self._session.get_outputs()]

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        arrays = [x.detach().cpu().numpy() for x in tensors]
        outputs = self._session.run(self._outputs, dict(zip(self.inputs, arrays, strict=True)))
        return {name: torch.as_tensor(y) for name, y in zip(self._outputs, outputs, strict=True)}
