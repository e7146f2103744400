# SPDX-License-Identifier: Apache-2.0
"""One call of a network: inputs that do not fit, and what an export must take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet import SearchSpace, elastic, extract
from lightning_subnet.errors import ExportError
from lightning_subnet.export import export, load_exported
from lightning_subnet.export.call import Call
from lightning_subnet.export.formats.onnx import to_onnx
from lightning_subnet.export.formats.torch_export import to_exported_program
from tests.problems import assert_clear


@pytest.mark.parametrize("take", [Call.of, to_onnx])
@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        (torch.randn(2, 5), ("Linear failed on inputs", "(2, 5)", "Give an example input")),
        (torch.zeros(0, 3), ("is not a batch", "(0, 3)")),
        ((None,), ("is not a batch",)),
        (([torch.zeros(1, 3)], torch.zeros(1, 3)), ("Input 'input' is a list", "Wrap")),
    ],
)
def test_inputs_that_do_not_fit(
    take: Callable[..., Any], inputs: Any, parts: tuple[str, ...]
) -> None:
    with pytest.raises(ExportError) as caught:
        take(nn.Linear(3, 2), inputs)
    assert_clear(caught.value, *parts)


class Raising(nn.Module):
    """A network that works on its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.add_(1))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("where", ["inputs", "call", "weights"])
def test_an_inference_mode_and_work_in_place_are_no_hindrance(
    suffix: str, where: str, tmp_path: Path
) -> None:
    with torch.inference_mode(where == "weights"):
        net = Raising()
    with torch.inference_mode(where == "inputs"):
        x = torch.randn(3, 3)
    before = x.clone()
    with torch.inference_mode(where == "call"):
        exported = export(net, tmp_path / f"net{suffix}", x)
    assert torch.equal(x, before)
    assert exported.parity < 1e-5
    assert exported.dynamic_batch
    with torch.no_grad():
        expected = net(before.clone())
    assert torch.allclose(load_exported(exported.path)(before.clone()), expected, atol=1e-5)


def test_every_door_takes_tensors_of_an_inference_mode() -> None:
    with torch.inference_mode():
        net, x = Raising(), torch.randn(1, 3)
    to_onnx(net, x)
    to_exported_program(net, x)
    assert net.layer.weight.is_inference()  # a copy was exported


@dataclass
class Given:
    x: torch.Tensor


class Opening(nn.Linear):
    def forward(self, given: Given, y: torch.Tensor) -> torch.Tensor:
        return super().forward(given.x) + y


def test_a_dataclass_of_tensors_would_be_a_constant_in_a_file() -> None:
    with pytest.raises(ExportError) as caught:
        Call.of(Opening(3, 2), (Given(torch.randn(2, 3)), torch.zeros(2, 2)))
    assert_clear(caught.value, "Input 'given' is a Given", "Wrap the network")


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.n = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight[: self.n].T


def test_a_sliced_network_is_called_by_its_own_name(tmp_path: Path) -> None:
    net = elastic(
        Narrow(),
        space=SearchSpace(n=[2, 4]),
        activate=lambda net, subnet: setattr(net, "n", subnet["n"]),
    )
    plain = extract(net, net.search_space().smallest, torch.randn(3, 3))
    assert plain.sliced
    exported = export(plain, tmp_path / "net.pt2", torch.randn(3, 3))
    assert exported.metadata["network"] == "Narrow"
    assert load_exported(exported.path).metadata["network"] == "Narrow"
    with pytest.raises(ExportError) as caught:
        export(plain, tmp_path / "net.pt2", torch.randn(3, 5))
    assert_clear(caught.value, "Narrow failed on inputs", "The sliced Narrow takes inputs")
    assert "SlicedNetwork" not in str(caught.value)


def test_a_reason_that_ends_with_a_full_stop_gets_no_second_one() -> None:
    class Refuses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("It takes images.")

    with pytest.raises(ExportError, match=r"It takes images\. Give an example input"):
        Call.of(Refuses(), torch.zeros(2, 3), dynamic_batch=True)
