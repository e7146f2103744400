# SPDX-License-Identifier: Apache-2.0
"""The contract of measures on those that run or measure the network; counts have it beside them."""

from __future__ import annotations

import torch

from lightning_subnet import Latency
from lightning_subnet.costs import PeakMemory, SynFlow, Throughput
from lightning_subnet.supernets import ElasticMobileNetV3
from lightning_subnet.testing import MeasureContract

QUICK = {"threads": 1, "repeats": 15, "seconds": 0.01}


class OnImages(MeasureContract):
    def network(self) -> ElasticMobileNetV3:
        torch.manual_seed(0)
        return ElasticMobileNetV3.tiny(n_classes=10)

    def example_input(self) -> torch.Tensor:
        return torch.zeros(1, 1, 8, 8)


class TestPeakMemory(OnImages):
    def make(self) -> PeakMemory:
        return PeakMemory()


class TestSynFlow(OnImages):
    def make(self) -> SynFlow:
        return SynFlow()


class TestLatency(OnImages):
    grows = False  # it does, but the pace of a machine decides no test

    def make(self) -> Latency:
        return Latency(**QUICK)


class TestThroughput(OnImages):
    grows = False

    def make(self) -> Throughput:
        return Throughput(**QUICK)
