# SPDX-License-Identifier: Apache-2.0
"""Super-networks of the field, each one class."""

from lightning_subnet.supernets._resnet import ResNetConfig
from lightning_subnet.supernets.mobilenet_v3 import (
    ElasticMobileNetV3,
    MobileNetV3,
    MobileNetV3Config,
)
from lightning_subnet.supernets.resnet import ElasticResNet, ResNet

__all__ = [
    "ElasticMobileNetV3",
    "ElasticResNet",
    "MobileNetV3",
    "MobileNetV3Config",
    "ResNet",
    "ResNetConfig",
]
