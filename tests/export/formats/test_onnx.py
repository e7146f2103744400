# SPDX-License-Identifier: Apache-2.0
"""ONNX: names and sizes of its ports, traces that are not to be trusted, other processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subnet import export_onnx
from lightning_subnet.errors import ExportError, FixedBatchError
from lightning_subnet.export.formats.onnx import onnx_session, to_onnx
from tests.export.networks import Branching, Fixed, Ignoring, Several, Unsupported, small
from tests.problems import assert_clear


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_batch_size_is_open_whatever_the_example_has(rows: int) -> None:
    net, x, other = nn.Linear(3, 2).eval(), torch.randn(rows, 3), torch.randn(7, 3)
    session = onnx_session(to_onnx(net, x))
    assert session.get_inputs()[0].shape == ["batch", 3]
    assert session.get_outputs()[0].shape == ["batch", 2]
    (outputs,) = session.run(None, {"input": other.numpy()})
    np.testing.assert_allclose(outputs, net(other).detach().numpy(), atol=1e-6)


def test_a_fixed_batch_size_is_named_and_can_be_asked_for() -> None:
    with pytest.raises(FixedBatchError) as caught:
        to_onnx(Fixed(), torch.randn(2, 3))
    assert_clear(caught.value, "Fixed", "fixes the size of its batch", "dynamic_batch=False")
    assert to_onnx(Fixed(), torch.randn(2, 3), dynamic_batch=False)
    fixed = onnx_session(to_onnx(nn.Linear(3, 2), torch.randn(4, 3), dynamic_batch=False))
    assert fixed.get_inputs()[0].shape == [4, 3]


def test_what_a_trace_would_freeze_takes_the_other_way() -> None:
    net, x = Branching().eval(), torch.randn(2, 3)
    with pytest.raises(ExportError, match="freeze"):
        to_onnx(net, x, exporter="trace")
    other = torch.randn(5, 3)
    (outputs,) = onnx_session(to_onnx(net, x)).run(None, {"x": other.numpy()})
    np.testing.assert_allclose(outputs, net(other).detach().numpy(), atol=1e-6)


def test_attention_is_converted_and_its_fast_path_is_back_afterwards() -> None:
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, enable_nested_tensor=False
    ).eval()
    x, other = torch.randn(1, 5, 4), torch.randn(3, 5, 4)
    fast = torch.backends.mha.get_fastpath_enabled()
    (outputs,) = onnx_session(to_onnx(net, x)).run(None, {"src": other.numpy()})
    np.testing.assert_allclose(outputs, net(other).detach().numpy(), atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled() == fast


@pytest.mark.parametrize("by_name", [False, True])
def test_several_inputs_and_outputs_have_their_names(by_name: bool) -> None:
    net, x = Several().eval(), torch.randn(2, 3)
    scale = torch.rand(2, 1)
    inputs = {"scale": scale, "x": x, "double": True} if by_name else (x, scale, True, None)
    session = onnx_session(to_onnx(net, inputs))
    assert {port.name for port in session.get_inputs()} == {"x", "scale"}
    names = [port.name for port in session.get_outputs()]
    assert names == ["x_output", "total", "parts.0", "parts.1"]
    arrays = {"x": x.numpy(), "scale": scale.numpy()}
    expected = net(x, scale, True)["x"].detach().numpy()
    np.testing.assert_allclose(session.run(["x_output"], arrays)[0], expected, atol=1e-6)


def test_an_input_that_is_not_used_stays_an_input() -> None:
    session = onnx_session(to_onnx(Ignoring(), (torch.randn(2, 4), torch.randn(2, 3))))
    assert [port.name for port in session.get_inputs()] == ["y", "x"]


def test_an_operator_without_a_form_is_named(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        to_onnx(Unsupported(), torch.randn(2, 3))
    assert_clear(caught.value, "Unsupported", "linalg_eig", "ONNX", "export to another format")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ExportError) as caught:
        export_onnx(Unsupported(), tmp_path / "net.onnx", torch.randn(2, 3))
    assert_clear(caught.value, "linalg_eig", "Unsupported")
    assert list(tmp_path.iterdir()) == []


def test_another_process_needs_only_the_runtime(tmp_path: Path) -> None:
    net, x = small(), torch.randn(2, 3)
    export_onnx(net, tmp_path / "net.onnx", x)
    code = (
        "import onnxruntime, json, sys\n"
        "session = onnxruntime.InferenceSession('net.onnx')\n"
        f"(y,) = session.run(None, {{'input': {x.tolist()}}})\n"
        "print(json.dumps([y.tolist(), 'torch' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    y, loaded_torch = json.loads(done.stdout)
    assert not loaded_torch
    np.testing.assert_allclose(y, net(x).detach().numpy(), atol=1e-5)
