# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from lightning_subnet.errors import SearchError
from tests.networks import Digits, LitMlp, search


def test_extraction_of_what_fit_found(model: LitMlp) -> None:
    result = search().fit(model, Digits(), progress=False)
    best = result.best("val_acc")
    plain = result.extract(best)
    assert plain.sliced
    assert plain.first.weight.shape == (best.subnet["width"], 64)
    assert plain.parity < 1e-4
    assert torch.equal(plain.first.weight, model.net.first.weight[: best.subnet["width"]])
    assert plain.first.weight.data_ptr() != model.net.first.weight.data_ptr()
    with pytest.raises(SearchError, match="does not know the network"):
        type(result)(result.problem, result.history).extract(result.best("val_acc"))
