# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_subnet.costs.device import describe_device, usable_device
from lightning_subnet.errors import ObjectiveError


def test_a_device_is_described_by_processor_kind_and_torch() -> None:
    text = describe_device("cpu")
    assert text.endswith(f" (cpu), torch {torch.__version__}")
    program = "from lightning_subnet.costs.device import *; print(describe_device('cpu'))"
    command = [sys.executable, "-c", program]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == text


def test_a_usable_device_has_an_index_where_there_are_several() -> None:
    assert usable_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert usable_device("cuda").index == torch.cuda.current_device()
        assert torch.cuda.get_device_name() in describe_device("cuda:0")


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:77"])
@pytest.mark.parametrize("ask", [usable_device, describe_device])
def test_a_device_that_is_not_there(name: str, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(
        ObjectiveError, match=f"device='{name}' cannot be used here: .*device='cpu'"
    ):
        ask(name)
