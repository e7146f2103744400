# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: a session of fixed shapes, sequential, with inputs and outputs in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_subnet._messages import listed
from lightning_subnet._torch.inputs import Inputs
from lightning_subnet.costs.runtimes.base import Conditions, ForwardPass, Runtime, arrays_of
from lightning_subnet.errors import ObjectiveError
from lightning_subnet.export.formats.onnx import (
    disabled,
    import_onnx,
    import_onnxruntime,
    to_onnx,
)

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime(Runtime):
    """A session of ONNX Runtime."""

    name = "onnxruntime"
    precisions = ("64-true", "32-true", "16-true")
    devices = ("cpu", "cuda")
    libraries = (import_onnxruntime, import_onnx)

    def make(self, net: nn.Module, inputs: Inputs, conditions: Conditions) -> ForwardPass:
        """Return a run of the session of the converted network."""
        onnxruntime = import_onnxruntime()
        model = to_onnx(net, inputs, dynamic_batch=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = conditions.threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # errors are raised
        # Threads that go on spinning after a pass would take the cores from what is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        arrays, device = arrays_of(net, inputs), conditions.device
        providers, off = [_PROVIDERS[device.type]], disabled(model)

        def again() -> ForwardPass:
            session = onnxruntime.InferenceSession(
                model, options, providers=providers, disabled_optimizers=off
            )
            return ForwardPass(_in_place(session, arrays, device), again=again)

        return again()

    def describe(self, conditions: Conditions) -> str:
        """Return the version and the execution provider."""
        version = import_onnxruntime().__version__
        return f"onnxruntime {version}, {_PROVIDERS[conditions.device.type]}"

    def check(self, device: torch.device, precision: str) -> None:
        """Raise an `ObjectiveError` if this build has no execution provider for the device."""
        name, able = _PROVIDERS[device.type], import_onnxruntime().get_available_providers()
        if name not in able:
            msg = (
                f"runtime='onnxruntime' has no {name} here, only {listed(able)}. "
                "Install onnxruntime-gpu, or write device='cpu'."
            )
            raise ObjectiveError(msg)


def _in_place(session: Any, arrays: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    """Return a run of a session whose inputs and outputs stay in place."""
    from_numpy = import_onnxruntime().OrtValue.ortvalue_from_numpy
    index, binding = device.index or 0, session.io_binding()
    for port in session.get_inputs():
        value = from_numpy(arrays[port.name], device.type, index)
        binding.bind_ortvalue_input(port.name, value)
    names = [port.name for port in session.get_outputs()]
    for name in names:
        binding.bind_output(name, device.type, index)
    session.run_with_iobinding(binding)
    for name, value in zip(names, binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(name, value)  # written again and again, never allocated
    return lambda: session.run_with_iobinding(binding)
