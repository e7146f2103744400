# SPDX-License-Identifier: Apache-2.0
"""Public names of lightning_subnet.supernets; the one list of them."""

from ._blocks.resnet_space import (
    ResNetConfig as ResNetConfig,
)
from ._blocks.transformer_config import (
    TransformerConfig as TransformerConfig,
)
from .adapters import (
    from_hat as from_hat,
    from_ofa as from_ofa,
    from_whittle as from_whittle,
)
from .decoding import (
    Decoding as Decoding,
    ElasticDecoding as ElasticDecoding,
    beam_search as beam_search,
    decode as decode,
)
from .elasticizing import (
    elasticize as elasticize,
)
from .gpt import (
    GPT as GPT,
    ElasticGPT as ElasticGPT,
    GPTConfig as GPTConfig,
)
from .mobilenet_v3 import (
    ElasticMobileNetV3 as ElasticMobileNetV3,
    MobileNetV3 as MobileNetV3,
    MobileNetV3Config as MobileNetV3Config,
)
from .resnet import (
    ElasticResNet as ElasticResNet,
    ResNet as ResNet,
)
from .skipping import (
    skippable_blocks as skippable_blocks,
)
from .transformer import (
    ElasticTransformer as ElasticTransformer,
    Transformer as Transformer,
)
from .vit import (
    ElasticViT as ElasticViT,
    ViT as ViT,
    ViTConfig as ViTConfig,
)
