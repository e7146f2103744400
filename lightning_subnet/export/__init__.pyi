# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.export; the one list of them."""

from .exporting import (
    Exported as Exported,
    export as export,
    export_onnx as export_onnx,
    export_openvino as export_openvino,
    export_torch as export_torch,
)
from .formats.base import (
    Format as Format,
)
from .formats.onnx import (
    onnx_session as onnx_session,
    to_onnx as to_onnx,
)
from .formats.openvino import (
    openvino_compiled as openvino_compiled,
    to_openvino as to_openvino,
)
from .formats.torch_export import (
    to_exported_program as to_exported_program,
)
from .loading import (
    Deployed as Deployed,
    load_exported as load_exported,
)
