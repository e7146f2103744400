# SPDX-License-Identifier: Apache-2.0
"""Exported files in use: what is refused, and what is known without metadata."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_subnet import export_onnx
from lightning_subnet.errors import ExportError
from lightning_subnet.export import load_exported
from tests.export.networks import small
from tests.problems import assert_clear


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    x = torch.randn(1, 3)
    path = export_onnx(small(), tmp_path / "winner.onnx", x).path
    for wrong, parts in {
        "winner.tflite": ("suffix '.tflite'", ".onnx (onnx), .pt2 (torch), .xml (openvino)"),
        "winer.onnx": ("There is no file", "Did you mean 'winner.onnx'?"),
    }.items():
        with pytest.raises(ExportError) as caught:
            load_exported(tmp_path / wrong)
        assert_clear(caught.value, *parts)
    metadata = tmp_path / "winner.onnx.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ExportError) as caught:
        load_exported(path)
    assert_clear(caught.value, "is damaged, or another file", "winner.onnx.json")
    path.write_bytes(whole)
    metadata.write_text("{}")
    with pytest.raises(ExportError) as caught:
        load_exported(path)
    assert_clear(caught.value, "winner.onnx.json holds no metadata", "Export again")
