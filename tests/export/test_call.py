# SPDX-License-Identifier: Apache-2.0
"""One call of a network: inputs that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet.errors import ExportError
from lightning_subnet.export.call import Call
from lightning_subnet.export.formats.onnx import to_onnx
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
