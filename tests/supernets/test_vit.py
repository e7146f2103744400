# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from lightning_subnet import extract
from lightning_subnet.errors import ElasticityError, ExportError, SpaceError
from lightning_subnet.export import export, load_exported
from lightning_subnet.export.formats.onnx import to_onnx
from lightning_subnet.supernets.vit import ElasticViT, ViT
from tests.supernets.attention_contract import AttentionContract


class TestViT(AttentionContract):
    SIZES: ClassVar = {
        "tiny": ElasticViT.tiny,
        "small": partial(ElasticViT.small, depths=(2, 3), embed=48, head_dim=16, dropout=0.0),
        "wide": partial(ElasticViT.tiny, image_size=(4, 16)),
    }
    PLAIN = ViT
    OTHER: ClassVar = {
        ("depths", (2, 4)): r"'heads.3' is not a choice of this space",
        ("heads", (1, 3)): r"'heads.0' cannot be 3. It takes one of 1, 2, 4",
        ("ffn", (16, 20)): r"'ffn.0' cannot be 20",
    }

    def inputs_of(self, net: Any, n: int) -> tuple[torch.Tensor, ...]:
        rng = torch.Generator().manual_seed(0)
        return (torch.randn(n, net.config.in_channels, *net.config.image, generator=rng),)

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
        ({"image_size": 0}, "image_size=0 must be a positive integer"),
        ({"image_size": 2.5}, "image_size=2.5 must be a positive integer"),
        ({"image_size": (8, 0)}, r"image_size=\(8, 0\) must be a positive integer, or a pair"),
        (
            {"image_size": (8, 8, 8)},
            r"image_size=\(8, 8, 8\) must be a positive integer, or a pair",
        ),
        ({"image_size": (8, 9)}, r"patch_size=2 does not divide image_size=\(8, 9\)"),
    ],
)
def test_sizes_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        ElasticViT.tiny(**changes)


BAD = [(2, 1, 4, 16), (2, 1, 12, 12), (2, 1, 9, 9), (2, 3, 8, 8), (1, 8, 8)]


@pytest.mark.parametrize("shape", BAD)
def test_images_of_another_shape_are_refused_with_both(shape: tuple[int, ...]) -> None:
    net = ElasticViT.tiny()
    plain = extract(net, net.search_space().smallest)
    given = ", ".join(map(str, shape[1:]))
    expected = rf"Images are \(n, {given}\), but .* made for \(n, 1, 8, 8\)"
    for module in (net, plain):
        with pytest.raises(ElasticityError, match=expected):
            module(torch.zeros(shape))


def test_a_file_of_another_shape_refuses_too(tmp_path: Path) -> None:
    net = ElasticViT.tiny()
    plain = extract(net, net.search_space().smallest)
    x = torch.randn(2, 1, 8, 8)
    assert to_onnx(plain, x, exporter="trace")  # a trace would freeze no decision of the check
    for suffix in (".onnx", ".pt2", ".xml"):
        path = tmp_path / f"net{suffix}"
        assert export(plain, path, x).dynamic_batch
        deployed = load_exported(path)
        assert deployed(torch.cat([x, x])).shape == (4, 10)
        for shape in BAD:
            with pytest.raises(ExportError, match=r"failed on inputs of"):
                deployed(torch.zeros(shape))


def test_an_image_that_is_wide_has_as_many_positions_as_patches() -> None:
    net = ElasticViT.tiny(image_size=(4, 16))
    assert net.positions.shape == (1, 2 * 8 + 1, 32)
    assert net(torch.zeros(3, 1, 4, 16)).shape == (3, 10)
    with pytest.raises(ElasticityError, match=r"made for \(n, 1, 4, 16\)"):
        net(torch.zeros(3, 1, 16, 4))
