# SPDX-License-Identifier: Apache-2.0
"""What the conversions of all formats share: silence, and the extra that is missing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_subnet.export.formats.onnx import to_onnx
from lightning_subnet.export.formats.openvino import to_openvino
from lightning_subnet.export.formats.torch_export import to_exported_program
from tests.export.networks import Branching

ROOT = Path(__file__).resolve().parents[3]


def test_conversions_are_quiet_and_leave_nothing_changed(capfd: pytest.CaptureFixture[str]) -> None:
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)), torch.randn(2, 3)
    net[2].eval()
    branching = Branching()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    names = ("root", "torch", "torch.onnx", "onnxscript")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = [*logging.getLogger().handlers]
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_onnx(net, x)
        to_onnx(net, x, exporter="graph")
        to_exported_program(net, x)
        to_openvino(net, x)
        to_openvino(branching, x)  # the other way
    assert [str(w.message) for w in caught] == []
    assert capfd.readouterr() == ("", "")
    assert levels == {name: logging.getLogger(name).level for name in levels}
    assert handlers == logging.getLogger().handlers
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_missing_extra_is_named() -> None:
    code = """
import sys, json
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
hidden = ("onnx", "onnxscript", "onnxruntime", "openvino")
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] in hidden else find(name, *rest)
)
import torch
from lightning_subnet.export.formats.onnx import to_onnx
from lightning_subnet.export.formats.openvino import to_openvino
from lightning_subnet.export.formats.torch_export import to_exported_program
from lightning_subnet.errors import ExportError
net, x, messages = torch.nn.Linear(3, 2), torch.zeros(1, 3), []
for convert in (to_onnx, to_openvino):
    try:
        convert(net, x)
    except ExportError as error:
        messages.append(str(error))
to_exported_program(net, x)
print(json.dumps(messages))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    onnx, openvino = json.loads(done.stdout.splitlines()[-1])
    assert "pip install 'lightning-subnet[onnx]'" in onnx
    assert "pip install 'lightning-subnet[openvino]'" in openvino
