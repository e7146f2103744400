# SPDX-License-Identifier: Apache-2.0
"""Networks in which channels are lost from sight, or sizes mean something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet.errors import ElasticityError
from lightning_subnet.supernets.elasticizing import elasticize
from tests.elasticity.channels import networks
from tests.elasticity.channels.checks import check

ROW, IMAGE, SEQUENCE = torch.randn(4, 6), torch.randn(2, 3, 8, 8), torch.randn(2, 5, 6)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 3)
        self.prepare()

    def prepare(self) -> None: ...


class HardGate(Own):
    """The comparison hides where its channels go."""

    def prepare(self) -> None:
        self.gate = nn.Linear(6, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x) * (self.gate(x) > 0)).relu())


class NanToNum(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(torch.nan_to_num(self.a(x))).relu())


class Sorted(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)).sort(-1).values)


class Mean(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        return self.c(self.b(h).relu()) + h.mean(-1, keepdim=True)


class ScaledBySize(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        return self.c(self.b(h / h.shape[-1] ** 0.5).relu())


class Softmax(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).softmax(-1)).relu())


class Permuted(Own):
    """A buffer of whole numbers picks channels."""

    def prepare(self) -> None:
        self.register_buffer("scale", torch.rand(16))
        self.register_buffer("order", torch.randperm(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x) * self.scale).relu()[:, self.order])


class Shuffled(nn.Module):
    """Of one channel per group, the shuffle leaves them in order; of more it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle = networks.conv(3, 16), nn.ChannelShuffle(4)
        self.b, self.head = networks.conv(16, 16), networks.head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.shuffle(self.a(x))))


class HeadsOfFixedNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(self.first(x).relu()).view(len(x), 4, -1)
        return self.b(y.softmax(-1).flatten(1))


class Tied(nn.Module):
    READS = {"enc.weight": 0}  # noqa: RUF012 - what the tests know of it

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(6, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.enc(x).relu(), self.enc.weight.t())


class LowRank(Own):
    """The second layer's weight is a sum of parameters."""

    READS = {"down": 1}  # noqa: RUF012 - what the tests know of it

    def prepare(self) -> None:
        self.down, self.up = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(24, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.b.weight + self.up @ self.down
        return self.c(F.linear(self.a(x).relu(), weight, self.b.bias).relu())


class Contrastive(Own):
    """Rows of the batch meet."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        one, two = (F.normalize(self.c(self.b(self.a(z).relu()).relu()), dim=-1) for z in (x, y))
        return one @ two.T


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.c = nn.Linear(6, 16), nn.GRU(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.rnn(self.a(x).relu())[0][-1])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm = nn.Linear(6, 16), nn.LSTMCell(16, 12)
        self.gru, self.c = nn.GRUCell(12, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, y = None, None
        for _ in range(3):
            state = self.lstm(self.a(x).relu(), state)
            y = self.gru(state[0], y)
        return self.c(y)


class Translator(nn.Module):
    """One recurrent layer begins with the state of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(6, 16, batch_first=True)
        self.decoder, self.c = nn.LSTM(6, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.decoder(x, self.encoder(x)[1])[0])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.c = nn.GRU(6, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([5, 3])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        y, last = self.rnn(packed)
        y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        return self.c(y.sum(1) + last[0])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.EmbeddingBag(10, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x).relu())


class Transposed(Own):
    """Weights do not lie as their shape says."""

    def prepare(self) -> None:
        self.a.weight = nn.Parameter(torch.randn(6, 16).t())
        self.b.weight = nn.Parameter(torch.randn(16, 24).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


TRAPS: dict[str, tuple[Any, Any, set[str]]] = {
    "a hard gate": (HardGate, ROW, {"width.b"}),
    "NaN becomes a number": (NanToNum, ROW, {"width.b"}),
    "channels are sorted": (Sorted, ROW, {"width.a"}),
    "their mean": (Mean, ROW, {"width.b"}),
    "scaled by their number": (ScaledBySize, ROW, {"width.b"}),
    "softmax": (Softmax, ROW, {"width.b"}),
    "picked by index": (Permuted, ROW, {"width.a"}),
    "shuffled": (Shuffled, IMAGE, {"width.b.0"}),
    "heads of a fixed number": (HeadsOfFixedNumber, ROW, {"width.first"}),
    "tied by transposition": (Tied, ROW, {"width.enc"}),
    "low rank": (LowRank, ROW, {"width.a", "width.b"}),
    "rows meet": (Contrastive, (ROW, torch.randn(4, 6)), {"width.a", "width.b"}),
    "time first": (TimeFirst, torch.randn(5, 2, 6), {"width.a", "width.rnn"}),
    "cells": (Cells, ROW, {"width.a", "width.lstm", "width.gru"}),
    "states of another": (Translator, SEQUENCE, {"width.encoder"}),
    "packed": (Packed, SEQUENCE, {"width.rnn"}),
    "bag": (Bag, torch.tensor([[0, 3, 3], [7, 1, 2]]), {"width.a"}),
    "not contiguous": (Transposed, ROW, {"width.a", "width.b"}),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_is_elastic_is_right_and_what_is_not_has_a_reason(trap: str) -> None:
    build, example, names = TRAPS[trap]
    torch.manual_seed(0)
    net = check(build(), example)
    assert set(net.search_space().names) == names
    assert all(row.reason for row in net.elastic_report.refused)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "one group of a GroupNorm": (
        networks.one_group_norm, IMAGE, "all of its channels depend on one another"
    ),
    "spectral norm": (networks.spectral_norm, ROW, "weights that are computed across its channels"),
    "projections of an LSTM": (
        lambda: nn.Sequential(nn.LSTM(6, 16, proj_size=8)), SEQUENCE, "whose width is fixed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_networks_without_any_group_say_why(kind: str) -> None:
    build, example, reason = REFUSED[kind]
    with pytest.raises(ElasticityError, match=reason):
        elasticize(build(), example)


def test_weights_that_are_computed_across_channels_keep_what_they_read() -> None:
    for build, example in (
        (networks.standardised, IMAGE), (networks.old_weight_norm, ROW),
        (networks.parametrized, ROW),
    ):  # fmt: skip
        net = elasticize(build(), example, divisor=1)
        assert "width.2" in net.search_space().names
        part = net.extract(net.search_space().smallest)
        net.activate(net.search_space().smallest)
        torch.testing.assert_close(net.eval()(example), part(example))


def test_experts_that_no_data_reaches_are_told() -> None:
    report = elasticize(networks.RoutedExperts(), ROW, divisor=1).elastic_report
    assert "no data of the example reaches it" in {row.reason for row in report.refused}


def test_attention_of_torch_keeps_its_stream_and_heads() -> None:
    report = elasticize(networks.encoder(), SEQUENCE).elastic_report
    reasons = {row.name: row.reason for row in report.refused}
    assert "whose width is fixed" in reasons["embed"]
    assert {row.kind for row in report.elastic} == {"width", "depth"}
