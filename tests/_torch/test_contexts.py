# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_subnet._torch.contexts import (
    collection_paused,
    evaluating,
    muted,
    plain_attention,
    random_state,
    shadowed,
)


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002 - users' code does


def test_random_states_come_back_also_after_an_error() -> None:
    with random_state(3):
        seeded = draws()
    with random_state():
        expected = draws()

    def fails() -> None:
        with random_state(3):
            assert draws() == seeded
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert draws() == expected


def test_a_shadow_leaves_the_attribute_of_the_instance() -> None:
    net = nn.Linear(2, 2)
    net.forward = own = lambda x: 2 * x
    with pytest.raises(ZeroDivisionError), shadowed(net, "forward", lambda x: 1 / 0):
        net(torch.ones(1))
    assert net.forward is own


def test_flags_come_back_one_by_one() -> None:
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    net[1].eval()
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == [True, True, False]


def test_a_muted_module_logs_nothing() -> None:
    module = L.LightningModule()
    with muted(module):
        module.log("loss", 1.0)
        module.log_dict({"loss": 1.0})
    assert "log" not in vars(module)


def test_switches_of_the_process_come_back() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), gc.isenabled()

    def fails() -> None:
        with plain_attention(), collection_paused():
            assert (torch.backends.mha.get_fastpath_enabled(), gc.isenabled()) == (False, False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (torch.backends.mha.get_fastpath_enabled(), gc.isenabled()) == before
