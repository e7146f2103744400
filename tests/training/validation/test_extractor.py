# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from lightning_subnet.errors import SearchError
from tests.networks import Digits, LitMlp, search


def test_extraction_of_what_fit_found(model: LitMlp) -> None:
    result = search().fit(model, Digits(), progress=False)
    frozen = result.extract(result.best("val_acc"))
    assert not frozen.sliced  # ElasticMlp has no extract() of its own
    assert frozen.width == result.best("val_acc").subnet["width"]
    assert frozen is not model.net
    with pytest.raises(SearchError, match="does not know the network"):
        type(result)(result.problem, result.history).extract(result.best("val_acc"))
