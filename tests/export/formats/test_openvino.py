# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: names and sizes of its ports, what goes through torch.export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subnet.errors import ExportError, FixedBatchError
from lightning_subnet.export.formats.openvino import openvino_compiled, to_openvino
from tests.export.networks import Branching, Fixed, Ignoring, Several, Unsupported
from tests.problems import assert_clear


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_batch_size_is_open_whatever_the_example_has(rows: int) -> None:
    net, x, other = nn.Linear(3, 2).eval(), torch.randn(rows, 3), torch.randn(7, 3)
    model = to_openvino(net, x)
    assert str(model.input(0).partial_shape) == "[?,3]"
    outputs = openvino_compiled(model)(other.numpy())[0]
    np.testing.assert_allclose(outputs, net(other).detach().numpy(), atol=1e-6)


def test_a_fixed_batch_size_is_named_and_can_be_asked_for() -> None:
    with pytest.raises(FixedBatchError) as caught:
        to_openvino(Fixed(), torch.randn(2, 3))
    assert_clear(caught.value, "Fixed", "fixes the size of its batch", "dynamic_batch=False")
    assert to_openvino(Fixed(), torch.randn(2, 3), dynamic_batch=False)


def test_what_a_trace_would_freeze_takes_the_other_way() -> None:
    net, other = Branching().eval(), torch.randn(5, 3)
    outputs = openvino_compiled(to_openvino(net, torch.randn(2, 3)))(other.numpy())[0]
    np.testing.assert_allclose(outputs, net(other).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("by_name", [False, True])
def test_several_inputs_and_outputs_have_their_names(by_name: bool) -> None:
    net, x, scale = Several().eval(), torch.randn(2, 3), torch.rand(2, 1)
    inputs = {"scale": scale, "x": x, "double": True} if by_name else (x, scale, True, None)
    compiled = openvino_compiled(to_openvino(net, inputs))
    outputs = compiled({"x": x.numpy(), "scale": scale.numpy()})
    expected = net(x, scale, True)["x"].detach().numpy()
    np.testing.assert_allclose(outputs["x_output"], expected, atol=1e-6)


def test_an_input_that_is_not_used_stays_an_input() -> None:
    model = to_openvino(Ignoring(), (torch.randn(2, 4), torch.randn(2, 3)))
    assert [port.any_name for port in model.inputs] == ["y", "x"]
    assert [str(port.partial_shape) for port in model.inputs] == ["[?,4]", "[?,3]"]


def test_an_operator_without_a_form_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError) as caught:
        to_openvino(Unsupported(), torch.randn(2, 3))
    assert_clear(caught.value, "Unsupported", "linalg_eig", "OpenVINO", "export to another format")
    assert capfd.readouterr() == ("", "")
