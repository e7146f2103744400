# SPDX-License-Identifier: Apache-2.0
"""The super-networks of this package."""

from __future__ import annotations

import torch

from lightning_subnet.supernets import (
    ElasticGPT,
    ElasticMobileNetV3,
    ElasticResNet,
    ElasticTransformer,
    ElasticViT,
)
from tests.families.family import (
    LENGTH,
    PAD,
    START,
    VOCAB,
    Family,
    Lit,
    LitLanguage,
    LitTranslation,
    images,
    seeded,
    texts,
    translations,
)


def mobilenet_v3() -> Lit:
    return Lit(seeded(lambda: ElasticMobileNetV3.tiny(n_classes=10, width_mult=0.5)))


def resnet() -> Lit:
    return Lit(seeded(lambda: ElasticResNet.tiny(n_classes=10)))


def vit() -> Lit:
    return Lit(seeded(ElasticViT.tiny))


def gpt() -> LitLanguage:
    return LitLanguage(seeded(lambda: ElasticGPT.tiny(vocab=VOCAB, context=LENGTH, embed=(16, 24))))


def transformer() -> LitTranslation:
    net = seeded(lambda: ElasticTransformer.tiny(vocab=VOCAB, pad=PAD, bos=START, target_length=8))
    example = (torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))
    return LitTranslation(net, example)


FAMILIES = [
    Family(
        "MobileNetV3",
        mobilenet_v3,
        images,
        "net = ElasticMobileNetV3()",
        "Cai et al., Once-for-All, ICLR 2020",
    ),
    Family(
        "ResNet50", resnet, images, "net = ElasticResNet()", "Cai et al., Once-for-All, ICLR 2020"
    ),
    Family(
        "Transformer",
        transformer,
        translations,
        "net = ElasticTransformer.hat_wmt14()",
        "Wang et al., HAT, ACL 2020",
    ),
    Family("GPT", gpt, texts, "net = ElasticGPT()", "Sukthanker et al., HW-GPT-Bench, 2024"),
    Family("ViT", vit, images, "net = ElasticViT()", "Dosovitskiy et al., ViT, ICLR 2021"),
]
