# SPDX-License-Identifier: Apache-2.0
"""The same families as their packages have them, of those that are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_subnet import SearchSpace
from lightning_subnet.supernets import from_ofa, from_whittle, skippable_blocks
from tests.families.family import (
    CLASSES,
    LENGTH,
    VOCAB,
    Family,
    Lit,
    LitLanguage,
    images,
    seeded,
    texts,
)
from tests.programs.ofa_parity_program import import_originals

ROOT = Path(__file__).resolve().parents[2]
ORACLES = ROOT / ".venv" / "oracles"  # see tests/oracles.txt
PIXELS = 64
IMAGE = torch.zeros(1, 3, PIXELS, PIXELS)


def _ofa(kind: str, **options: Any) -> Lit:
    if folder_of("ofa"):
        from ofa.imagenet_classification.elastic_nn import networks
    else:
        networks = import_originals(ORACLES)
    return Lit(from_ofa(seeded(lambda: getattr(networks, kind)(n_classes=CLASSES, **options))))


def _whittle() -> LitLanguage:
    from litgpt import Config
    from whittle.models.gpt import GPT

    config = Config(
        n_embd=32, n_head=4, n_layer=3, padded_vocab_size=VOCAB, block_size=LENGTH,
        intermediate_size=128, n_query_groups=4,
    )  # fmt: skip
    space = SearchSpace(
        embed_dim=[16, 24, 32], mlp_ratio=[1, 2, 4], num_heads=[1, 2, 4], depth=[1, 2, 3],
        head_size=[4, 8],
    )  # fmt: skip
    return LitLanguage(from_whittle(seeded(lambda: GPT(config)), space))


def _timm(name: str, **options: Any) -> Lit:
    import timm

    return Lit(
        skippable_blocks(
            seeded(lambda: timm.create_model(name, num_classes=CLASSES, **options)), IMAGE
        )
    )


def folder_of(package: str) -> Path | None:
    """Return the folder in which a package is installed, without importing it."""
    spec = find_spec(package)
    return Path(spec.origin).parents[1] if spec and spec.origin else None


def _family(
    name: str, build: Callable[[], Any], data: Callable[[], Any], code: str, source: str
) -> Family:
    # Of deep networks with random weights rounding is more.
    return Family(f"{name} (package)", build, data, code, source, tolerance=1e-3)


_RGB = partial(images, 3, PIXELS)
_SKIPS = "net = skippable_blocks(net, example_input)"

REAL: dict[str, list[Family]] = {
    "ofa": [
        _family(
            "OFA MobileNetV3",
            partial(
                _ofa, "OFAMobileNetV3", width_mult=0.35, ks_list=[3, 5, 7],
                expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4],
            ),
            _RGB, "net = from_ofa(net)", "package ofa",
        ),
        _family(
            "OFA ResNets",
            partial(
                _ofa, "OFAResNets", depth_list=[0, 1, 2], expand_ratio_list=[0.2, 0.25, 0.35],
                width_mult_list=[0.65, 0.8, 1.0],
            ),
            _RGB, "net = from_ofa(net)", "package ofa",
        ),
    ],
    "whittle": [
        _family("whittle GPT", _whittle, texts, "net = from_whittle(net, space)", "package whittle")
    ],
    "timm": [
        _family("timm ResNet-18", partial(_timm, "resnet18"), _RGB, _SKIPS, "package timm"),
        _family(
            "timm ConvNeXt V2", partial(_timm, "convnextv2_atto"), _RGB, _SKIPS, "package timm"
        ),
        _family(
            "timm ViT",
            partial(_timm, "vit_tiny_patch16_224", img_size=PIXELS, patch_size=16),
            _RGB, _SKIPS, "package timm",
        ),
    ],
}  # fmt: skip


def installed() -> dict[str, Family]:
    """Return the families of the packages that are installed, by name."""
    return {
        family.name: family
        for package, families in REAL.items()
        if folder_of(package) or (package == "ofa" and (ORACLES / "ofa").is_dir())
        for family in families
    }
