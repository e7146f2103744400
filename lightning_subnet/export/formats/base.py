# SPDX-License-Identifier: Apache-2.0
"""Networks as ONNX, ExportedProgram and OpenVINO models. The only file that imports those runtimes.

Traced ONNX is the common form: fifteen times faster to make than by way of `torch.export`, and what
OpenVINO reads fastest. Where a trace would freeze what the network decides, `torch.export` is used.
"""

from __future__ import annotations

import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from lightning_subnet.elasticity.protocol import evaluating
from lightning_subnet.errors import ExportError
from lightning_subnet.export.call import Call, Flat, brief

_OPSET = 18  # ONNX Runtime 1.14 and OpenVINO 2023.0 read it
_EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}
_LOGGERS = ("root", "torch", "onnxscript", "onnx_ir", "onnxruntime", "openvino")
_UNSUPPORTED = re.compile(
    r"Exporting the operator '([^']+)'|No ONNX function found for <OpOverload\(op='([^']+)'"
    r"|No conversion rule found for operations: ([\w:.]+)|Unsupported operator[: ]+'?([\w:.]+)"
)

_FIXED = "it fixes the size of its batch"

Exporter = Literal["auto", "trace", "graph"]


class FixedBatchError(ExportError):
    """A network takes batches of one size only."""


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


def library(name: str) -> Any:
    """Import an optional library, or say which extra brings it.

    Raises:
        ExportError: It is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        how = f"pip install 'lightning-subnet[{_EXTRAS[name]}]'"
        msg = f"This needs {name}: {how}. ({brief(error, 80)})"
        raise ExportError(msg) from error


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


def _flat_program(net: nn.Module, call: Call) -> torch.export.ExportedProgram:
    """Return a network as an ExportedProgram of tensors in and tensors out."""
    flat = Flat(net, call)
    flat.training = False
    with evaluating(net), torch.no_grad():
        return torch.export.export(
            flat, call.tensors, dynamic_shapes=call.flat_shapes(), strict=False
        )


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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep away the warnings and log lines of exporters, and give attention its plain form."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    fast = torch.backends.mha.get_fastpath_enabled()
    native: Any = torch._C
    printing = getattr(native, "_jit_onnx_log", None)
    silent = logging.NullHandler()  # without one, the root logger would get a lasting one
    logging.getLogger().addHandler(silent)
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        torch.backends.mha.set_fastpath_enabled(False)  # no exporter knows its operators
        if printing is not None:  # the graph, on stdout; its switch is turned on by each export
            native._jit_onnx_log = lambda *_: None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if printing is not None:
            native._jit_onnx_log = printing
        torch.backends.mha.set_fastpath_enabled(fast)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger().removeHandler(silent)


def _refused(net: nn.Module, form: str, call: Call, reasons: list[Exception]) -> ExportError:
    """Return the error of a network that cannot be converted."""
    texts = [str(reason) for reason in reasons]
    unknown = [next(filter(None, m.groups())) for t in texts if (m := _UNSUPPORTED.search(t))]
    if unknown:
        msg = f"{type(net).__name__} uses the operator {unknown[0]!r}, which has no {form} form. "
        return ExportError(msg + "Replace it in the network, or export to another format.")
    lines = texts[-1].splitlines() or [type(reasons[-1]).__name__]
    msg = f"{type(net).__name__} cannot be converted to {form}: {lines[0]:.200}"
    if call.batch is not None and (_FIXED in texts[-1] or "Constraints violated" in texts[-1]):
        msg = f"{type(net).__name__} cannot be converted to {form}, as {_FIXED}. "
        return FixedBatchError(msg + "Pass dynamic_batch=False, or change its use of that size.")
    return ExportError(f"{msg.rstrip('.')}. Change that part, or export to another format.")
