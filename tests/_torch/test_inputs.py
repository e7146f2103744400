# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_subnet._torch.inputs import arguments, batched, cloned, sample_for
from lightning_subnet.errors import ObjectiveError


def test_the_first_row_stands_as_often_as_a_batch_has_rows() -> None:
    x, tokens = torch.randn(3, 4, requires_grad=True), torch.arange(6).reshape(3, 2)
    rows, same, mode = batched((x, tokens, "mean"), 5)
    assert torch.equal(rows, x[:1].expand(5, 4))
    assert not rows.requires_grad
    assert torch.equal(same, tokens[:1].expand(5, 2))
    assert mode == "mean"
    for bad in (None, torch.tensor(1.0), torch.zeros(0, 3), ("mean",)):
        with pytest.raises(ObjectiveError, match=r"^Energy: .* is not a batch"):
            batched(bad, who="Energy")


def test_arguments_follow_the_weights() -> None:
    net = nn.Linear(2, 2).double()
    (x, tokens), named = arguments(net, (torch.ones(1, 2), torch.ones(1, dtype=torch.long)))
    assert (x.dtype, tokens.dtype, named) == (torch.float64, torch.int64, {})
    inputs, named = arguments(net, {"x": torch.ones(1, 2)})
    assert (inputs, named["x"].dtype) == ((), torch.float64)
    (x,), _ = arguments(nn.ReLU(), torch.ones(1))  # without weights it stays as it is
    assert x.dtype == torch.float32


def test_a_sample_is_the_measures_then_the_callers_then_the_models() -> None:
    model, measure = nn.ReLU(), SimpleNamespace(input=1)
    assert sample_for(model, None) is None
    model.example_input_array = torch.zeros(3)
    assert sample_for(model, None) is model.example_input_array
    assert sample_for(model, 2, SimpleNamespace(input=None)) == 2
    assert sample_for(model, 2, SimpleNamespace(), measure) == 1


def test_a_copy_shares_nothing() -> None:
    batch = {"x": torch.zeros(2), "names": [["a"]]}
    copy = cloned(batch)
    copy["x"].add_(1)
    copy["names"][0].append("b")
    assert batch["x"].tolist() == [0, 0]
    assert batch["names"] == [["a"]]
