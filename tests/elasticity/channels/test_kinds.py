# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.elasticity.channels import networks
from tests.elasticity.channels.checks import check

IMAGE, ROW, SEQUENCE = (torch.randn(2, 3, 8, 8), torch.randn(4, 6), torch.randn(2, 5, 6))
TOKENS = torch.randint(0, 20, (2, 5))

WORK = {
    "mlp": (networks.mlp, ROW, {"width.0": 16, "width.2": 24}),
    "convolutions": (networks.convolutions, IMAGE, {"width.0.0": 16, "width.1.0": 32}),
    "flattened": (networks.flattened, IMAGE, {"width.0.0": 16}),
    "depthwise": (networks.depthwise, IMAGE, {"width.0.0": 16, "width.2.0": 24}),
    "grouped": (networks.grouped, IMAGE, {"width.0.0": 4, "width.2.0": 16}),
    "group norm": (networks.group_norm, IMAGE, {"width.0": 4, "width.3": 24}),
    "instance norm": (networks.instance_norm, IMAGE, {"width.0": 16}),
    "inverted residuals": (
        networks.inverted_residuals, IMAGE,
        {"keep.0": 2, "keep.1": 2} | {
            f"width.{i}.inner.{layer}": n for i in (1, 2) for layer, n in
            (("0.0", 32), ("2.down", 8))
        },
    ),
    "gated": (
        networks.gated, ROW,
        {"keep.0": 2, "keep.1": 2, "width.1.inner.1.gate": 32, "width.2.inner.1.gate": 32},
    ),
    "chunked glu": (networks.ChunkedGLU, ROW, {"width.both": 24}),
    "u-net": (
        networks.UNet, IMAGE,
        {"width.down1.0": 8, "width.down2.0": 16, "width.middle.0": 32, "width.up2": 16,
         "width.join2.0": 16, "width.up1": 8, "width.join1.0": 8},
    ),
    "dense": (
        networks.DenseNet, IMAGE,
        {"width.stem": 16, "width.layers.0": 8, "width.layers.1": 8, "width.layers.2": 8},
    ),
    "grouped queries": (
        networks.LanguageModel, TOKENS,
        {f"keep.{i}": 2 for i in range(4)}
        | {f"heads.layers.{i}.0.inner.1": 4 for i in (0, 1)}
        | {f"width.layers.{i}.1.inner.1.gate": 64 for i in (0, 1)},
    ),
    "fused qkv": (networks.fused_attention, SEQUENCE, {"keep.0": 2, "heads.inner.inner.1": 4}),
    "position biases": (
        networks.position_biases, SEQUENCE, {"keep.0": 2, "heads.inner.inner.1": 4}
    ),
    "two inputs": (
        networks.TwoInputs, (ROW, torch.randn(4, 4)), {"width.image": 16, "width.shared": 24}
    ),
    "siamese": (
        networks.Siamese, (ROW, torch.randn(4, 6)), {"width.body.0": 16, "width.body.2": 24}
    ),
    "shared weight": (networks.SharedWeight, ROW, {"width.first": 16}),
    "pixel shuffle": (networks.pixel_shuffle, IMAGE, {"width.0": 16, "width.3": 8}),
    "transposed": (networks.transposed, IMAGE, {"width.0": 16, "width.2": 24}),
    "one dimension": (networks.one_dimension, torch.randn(2, 3, 9), {"width.0": 16, "width.3": 8}),
    "einsum": (networks.Einsum, ROW, {"width.a": 16}),
    "prelu": (networks.prelu, IMAGE, {"width.0": 16, "width.2": 24}),
    "transformer encoder": (
        networks.encoder, SEQUENCE,
        {"keep.0": 2, "keep.1": 2, "width.inner.layers.0.linear1": 64,
         "width.inner.layers.1.linear1": 64},
    ),
    "lstm": (lambda: networks.Recurrent(nn.LSTM), SEQUENCE, {"width.embed": 16, "width.rnn": 24}),
    "bidirectional gru": (
        lambda: networks.Recurrent(nn.GRU, num_layers=2, bidirectional=True), SEQUENCE,
        {"width.embed": 16, "width.rnn": 24},
    ),
    "rnn without biases": (
        lambda: networks.Recurrent(nn.RNN, bias=False), SEQUENCE,
        {"width.embed": 16, "width.rnn": 24},
    ),
    "experts as one tensor": (networks.TensorExperts, ROW, {"width.embed": 16, "width.up": 24}),
}  # fmt: skip


@pytest.mark.parametrize("kind", WORK)
def test_active_extracted_and_masked_are_one(kind: str) -> None:
    build, example, units = WORK[kind]
    torch.manual_seed(0)
    net = check(build(), example)
    values = net.search_space().values
    assert {name: max(v) if max(v) > 1 else len(v) for name, v in values.items()} == units
    assert all(row.verified for row in net.elastic_report.elastic)
