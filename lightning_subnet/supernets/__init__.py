# SPDX-License-Identifier: Apache-2.0
"""Super-networks of the field, each one class."""

from lightning_subnet.supernets._blocks.resnet_space import ResNetConfig
from lightning_subnet.supernets._blocks.transformer_config import TransformerConfig
from lightning_subnet.supernets.decoding import Decoding, ElasticDecoding
from lightning_subnet.supernets.gpt import GPT, ElasticGPT, GPTConfig
from lightning_subnet.supernets.mobilenet_v3 import (
    ElasticMobileNetV3,
    MobileNetV3,
    MobileNetV3Config,
)
from lightning_subnet.supernets.resnet import ElasticResNet, ResNet
from lightning_subnet.supernets.transformer import ElasticTransformer, Transformer
from lightning_subnet.supernets.vit import ElasticViT, ViT, ViTConfig

__all__ = [
    "GPT",
    "Decoding",
    "ElasticDecoding",
    "ElasticGPT",
    "ElasticMobileNetV3",
    "ElasticResNet",
    "ElasticTransformer",
    "ElasticViT",
    "GPTConfig",
    "MobileNetV3",
    "MobileNetV3Config",
    "ResNet",
    "ResNetConfig",
    "Transformer",
    "TransformerConfig",
    "ViT",
    "ViTConfig",
]
