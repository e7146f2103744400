# SPDX-License-Identifier: Apache-2.0
"""Networks as ONNX, ExportedProgram and OpenVINO models. The only file that imports those runtimes.

Traced ONNX is the common form: fifteen times faster to make than by way of `torch.export`, and what
OpenVINO reads fastest. Where a trace would freeze what the network decides, `torch.export` is used.
"""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from lightning_subnet.errors import ExportError, FixedBatchError
from lightning_subnet.export.call import Call, brief

_OPSET = 18  # ONNX Runtime 1.14 and OpenVINO 2023.0 read it
_EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}
_LOGGERS = ("root", "torch", "onnxscript", "onnx_ir", "onnxruntime", "openvino")
_UNSUPPORTED = re.compile(
    r"Exporting the operator '([^']+)'|No ONNX function found for <OpOverload\(op='([^']+)'"
    r"|No conversion rule found for operations: ([\w:.]+)|Unsupported operator[: ]+'?([\w:.]+)"
)

_FIXED = "it fixes the size of its batch"

Exporter = Literal["auto", "trace", "graph"]


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
