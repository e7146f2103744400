# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: one stream and one request, with the latency hint, on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from lightning_subnet._messages import listed
from lightning_subnet._torch.inputs import Inputs
from lightning_subnet.costs.runtimes.base import Conditions, ForwardPass, Runtime, arrays_of
from lightning_subnet.errors import ObjectiveError
from lightning_subnet.export.formats.onnx import import_onnx
from lightning_subnet.export.formats.openvino import import_openvino, openvino_core, to_openvino

_HINTS = {"bf16-mixed": "bf16", "16-mixed": "f16"}
_CAPABILITIES = {"bf16-mixed": "BF16", "16-mixed": "FP16"}


class OpenVino(Runtime):
    """An inference request of OpenVINO."""

    name = "openvino"
    precisions = ("32-true", "bf16-mixed", "16-mixed")
    devices = ("cpu",)
    libraries = (import_openvino, import_onnx)

    def make(self, net: nn.Module, inputs: Inputs, conditions: Conditions) -> ForwardPass:
        """Return the inference request of the converted network."""
        openvino, model = import_openvino(), to_openvino(net, inputs, dynamic_batch=False)
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": conditions.threads,
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": _HINTS.get(conditions.precision, "f32"),
        }
        request = openvino_core().compile_model(model, "CPU", options).create_infer_request()
        for name, array in arrays_of(net, inputs).items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        return ForwardPass(lambda: request.infer(share_inputs=True, share_outputs=True))

    def describe(self, conditions: Conditions) -> str:
        """Return the version and the options that never change."""
        return f"openvino {import_openvino().__version__}, latency, 1 stream"

    def check(self, device: torch.device, precision: str) -> None:
        """Raise an `ObjectiveError` if the processor does not compute in a mixed precision."""
        if precision not in _CAPABILITIES:
            return
        able = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if _CAPABILITIES[precision] not in able:
            msg = f"precision={precision!r}: OpenVINO has only {listed(able)} on this processor."
            raise ObjectiveError(msg)
