# SPDX-License-Identifier: Apache-2.0
"""Differences that keep a file, or the network that was to go into it, from being written."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet.errors import ExportError, FileParityError, ParityError
from lightning_subnet.export import export
from lightning_subnet.export.call import Call
from lightning_subnet.export.parity import checked_tolerance, tolerance_of
from tests.export.networks import small
from tests.problems import assert_clear


class Counting(nn.Module):
    """A network that keeps something from one run to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.runs = nn.Linear(3, 2), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.layer(x) + self.runs


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".xml"])
def test_a_network_that_keeps_something_between_runs_is_refused(
    suffix: str, tmp_path: Path
) -> None:
    with pytest.raises(ParityError) as caught:  # whichever comes first
        export(Counting(), tmp_path / f"net{suffix}", torch.randn(2, 3))
    assert isinstance(caught.value, ExportError)
    assert_clear(caught.value, "Counting", "gives other outputs", "allowed 0.0001", "from one run")
    assert re.search(r"in the network, \S+ in the file|\d against \d", str(caught.value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parity", [0.41, math.inf, 2e-4])
def test_a_network_that_is_not_what_was_scored_is_refused(parity: float, tmp_path: Path) -> None:
    net: Any = small()
    net.parity = parity
    with pytest.raises(FileParityError) as caught:
        export(net, tmp_path / "net.onnx", torch.randn(2, 3))
    assert_clear(
        caught.value, "Sequential is not the subnet that was scored", f"{parity:.3g}", "allowed",
        "Look at the extract()",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parity", "figure"), [(0.0, 0.0), (5e-5, 5e-5), (math.nan, None), (None, None), ("x", None)]
)
def test_the_metadata_have_the_parity_of_the_extraction(
    parity: Any, figure: float | None, tmp_path: Path
) -> None:
    net: Any = small()
    net.parity = parity
    exported = export(net, tmp_path / "net.onnx", torch.randn(2, 3))
    assert exported.metadata["parity"]["extraction"] == figure
    assert (
        export(small(), tmp_path / "net.onnx", torch.randn(2, 3)).metadata["parity"]["extraction"]
        is None
    )


def test_a_difference_of_large_outputs_counts_as_a_share_of_them(tmp_path: Path) -> None:
    net: Any = small()
    with torch.no_grad():
        net[2].weight.mul_(1e4)
    net.parity = 0.01
    x = torch.randn(2, 3)
    assert net(x).abs().max() > 200
    assert export(net, tmp_path / "net.onnx", x).metadata["parity"]["extraction"] == 0.01


@pytest.mark.parametrize("tolerance", [1, 1.0, 1e-6, None])
def test_tolerances(tolerance: Any) -> None:
    assert checked_tolerance(tolerance) == tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_coarsest_type_decides(dtype: torch.dtype) -> None:
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(2, 3)
    wanted = max(1e-4, 8 * torch.finfo(dtype).eps)
    assert tolerance_of(net.to(dtype), Call.of(net, x.to(dtype))) == wanted


def test_a_buffer_counts_too() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.rand(3).half())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table

    net, x = Table(), torch.randn(2, 3)
    assert tolerance_of(net, Call.of(net, x)) == 8 * torch.finfo(torch.float16).eps
