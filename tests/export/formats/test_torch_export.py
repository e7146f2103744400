# SPDX-License-Identifier: Apache-2.0
"""torch.export: the batch, and operators that only it has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subnet.errors import FixedBatchError
from lightning_subnet.export.formats.torch_export import to_exported_program
from tests.export.networks import Fixed, Unsupported
from tests.problems import assert_clear


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_batch_size_is_open_whatever_the_example_has(rows: int) -> None:
    net, x, other = nn.Linear(3, 2).eval(), torch.randn(rows, 3), torch.randn(7, 3)
    outputs = to_exported_program(net, x).module()(other)
    np.testing.assert_allclose(outputs.detach().numpy(), net(other).detach().numpy(), atol=1e-6)


def test_a_fixed_batch_size_is_named_and_can_be_asked_for() -> None:
    with pytest.raises(FixedBatchError) as caught:
        to_exported_program(Fixed(), torch.randn(2, 3))
    assert_clear(caught.value, "Fixed", "fixes the size of its batch", "dynamic_batch=False")
    assert to_exported_program(Fixed(), torch.randn(2, 3), dynamic_batch=False)


def test_an_operator_without_a_form_elsewhere_has_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert to_exported_program(Unsupported(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")
