# SPDX-License-Identifier: Apache-2.0
"""ONNX."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet.export.call import Call, Flat, brief
from lightning_subnet.export.formats.base import _FIXED, _OPSET, Exporter, _refused, library, quiet
from lightning_subnet.export.formats.torch_export import _flat_program


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
    library("onnx")
    call = Call.of(net, inputs, dynamic_batch=dynamic_batch)
    reasons: list[Exception] = []
    for name, convert in (("trace", _traced_onnx), ("graph", _graph_onnx)):
        if exporter not in ("auto", name):
            continue
        try:
            with quiet():
                model = convert(net, call)
                if call.batch is not None:
                    _check_batch(model, call)
                return model
        except Exception as error:  # of many classes, by exporter and version
            reasons.append(error)
    raise _refused(net, "ONNX", call, reasons) from reasons[-1]


def onnx_session(model: bytes | str, *, threads: int | None = None) -> Any:
    """Return an `onnxruntime.InferenceSession` on the CPU.

    Args:
        model: A serialised model, or the path of a file.
        threads: Threads within an operator; None: as ONNX Runtime has it.
    """
    onnxruntime = library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _traced_onnx(net: nn.Module, call: Call) -> bytes:
    """Return what the TorchScript exporter makes; raise where its trace is not to be trusted."""
    shapes = zip(call.output_names, call.output_shapes, strict=True)
    moving = [
        *(n for n, x in zip(call.input_names, call.tensors, strict=True) if call.in_batch(x.shape)),
        *(name for name, shape in shapes if call.in_batch(shape)),
    ]
    flat = Flat(net, call)
    flat.training = False
    buffer: Any = io.BytesIO()  # which the annotation of export() leaves out
    with warnings.catch_warnings(record=True) as told, evaluating(net), torch.no_grad():
        warnings.simplefilter("always")
        torch.onnx.export(
            flat, call.tensors, buffer, dynamo=False, opset_version=_OPSET,
            input_names=list(call.input_names), output_names=list(call.output_names),
            dynamic_axes={name: {0: "batch"} for name in moving},
        )  # fmt: skip
    for warning in told:
        if warning.category.__name__ == "TracerWarning":
            msg = f"a trace would freeze a decision: {str(warning.message).splitlines()[0]:.120}"
            raise RuntimeError(msg)
    model = bytes(buffer.getvalue())
    kept = {port.name for port in library("onnx").load_model_from_string(model).graph.input}
    if unused := [name for name in call.input_names if name not in kept]:
        raise RuntimeError(f"a trace would drop the input {unused[0]!r}")
    return model


def _graph_onnx(net: nn.Module, call: Call) -> bytes:
    """Return what the exporter by way of `torch.export` makes."""
    library("onnxscript")
    made = torch.onnx.export(
        _flat_program(net, call), dynamo=True, verbose=False, opset_version=_OPSET,
        input_names=list(call.input_names), output_names=list(call.output_names),
    )  # fmt: skip
    assert made is not None
    return bytes(made.model_proto.SerializeToString())


def _check_batch(model: bytes, call: Call) -> None:
    """Raise if a model does not take a batch of another size."""
    longer = {n: x.cpu().numpy() for n, x in zip(call.input_names, call.longer(), strict=True)}
    try:
        outputs = onnx_session(model).run(None, longer)
    except Exception as error:  # of the runtime's own classes
        raise RuntimeError(f"{_FIXED}: {brief(error, 100)}") from error
    for name, shape, y in zip(call.output_names, call.output_shapes, outputs, strict=True):
        if call.in_batch(shape) and len(y) != shape[0] + 1:
            raise RuntimeError(f"{_FIXED}: {name!r} has {y.shape}")
