# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from lightning_subnet import extract
from lightning_subnet.errors import SpaceError
from lightning_subnet.supernets.vit import ElasticViT, ViT
from tests.supernets.attention_contract import AttentionContract


class TestViT(AttentionContract):
    SIZES: ClassVar = {
        "tiny": ElasticViT.tiny,
        "small": partial(ElasticViT.small, depths=(2, 3), embed=48, head_dim=16, dropout=0.0),
    }
    PLAIN = ViT
    OTHER: ClassVar = {
        ("depths", (2, 4)): r"'heads.3' is not a choice of this space",
        ("heads", (1, 3)): r"'heads.0' cannot be 3. It takes one of 1, 2, 4",
        ("ffn", (16, 20)): r"'ffn.0' cannot be 20",
    }

    def inputs_of(self, net: Any, n: int) -> tuple[torch.Tensor, ...]:
        size, rng = net.config.image_size, torch.Generator().manual_seed(0)
        return (torch.randn(n, net.config.in_channels, size, size, generator=rng),)

    def loss(self, net: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return F.cross_entropy(net(*inputs), torch.arange(len(inputs[0])) % 10)


def test_the_largest_of_the_default_is_vit_b_16() -> None:
    with torch.device("meta"):
        net = ElasticViT()
    space = net.search_space()
    assert space.size == sum(12**n for n in (10, 11, 12))
    macs, params, _ = (
        m.evaluate(space, space.indices([space.largest]))[0][0] for m in net.exact_measures()
    )
    # torchvision's vit_b_16 has 86,567,656 parameters and 17.56 GFLOPs (its MACs, attention's
    # products of queries, keys and values included); the feed-forward of the space is 3072 at most.
    assert params == 86_567_656
    assert round(macs / 1e9, 2) == 17.56
    assert sum(p.numel() for p in extract(net, space.largest).parameters()) == params


def test_a_head_keeps_its_channels() -> None:
    net = ElasticViT.tiny()
    space = net.search_space()
    plain = extract(net, space.subnet({**space.largest, "heads.1": 2}))
    assert plain.layers[1].attention.q.weight.shape == (2 * 8, 32)
    assert torch.equal(plain.layers[1].attention.q.weight, net.layers[1].attention.q.weight[:16])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "patch_size=3 does not divide image_size=8"),
        ({"heads": ()}, r"heads=\(\) must be positive integers"),
        ({"depths": (0, 1)}, r"depths=\(0, 1\) must be positive integers"),
        ({"embed": True}, "embed=True must be a positive integer"),
    ],
)
def test_sizes_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        ElasticViT.tiny(**changes)
