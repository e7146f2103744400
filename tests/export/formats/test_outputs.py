# SPDX-License-Identifier: Apache-2.0
"""The same outputs in every form: active, extracted, ONNX Runtime, torch.export, OpenVINO."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import (
    SearchSpace,
    SubnetMixin,
    activated,
    elastic,
    extract,
    supernets,
)
from lightning_subnet.export.formats.onnx import onnx_session, to_onnx
from lightning_subnet.export.formats.openvino import openvino_compiled, to_openvino
from lightning_subnet.export.formats.torch_export import to_exported_program
from lightning_subnet.supernets import (
    ElasticGPT,
    ElasticMobileNetV3,
    ElasticResNet,
    ElasticTransformer,
    ElasticViT,
)
from tests.export.networks import lively

AGREE = 1e-4  # the requirement of the project
N_SUBNETS = [1, pytest.param(20, marks=pytest.mark.slow)]  # a second each, for torch.export


class ForeignNet(nn.Module):
    """Someone else's super-network: a convolution whose width and kernel are set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 5, padding=2)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 7)
        self.width, self.kernel = 16, 5

    def set_active_subnet(self, width: int, kernel: int) -> None:
        self.width, self.kernel = width, kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, cut = self.width, (5 - self.kernel) // 2
        weight = self.conv.weight[:w, :, cut : 5 - cut, cut : 5 - cut]
        x = F.conv2d(x, weight, self.conv.bias[:w], padding=self.kernel // 2)
        n = self.norm
        x = F.batch_norm(x, n.running_mean[:w], n.running_var[:w], n.weight[:w], n.bias[:w])
        return F.linear(x.relu().mean((2, 3)), self.head.weight[:, :w], self.head.bias)


def foreign() -> nn.Module:
    space = SearchSpace(width=[*range(2, 17)], kernel=[1, 3, 5])
    return elastic(
        ForeignNet(), space=space, activate=lambda net, s: net.set_active_subnet(**s.grouped())
    )


def images(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda n: (torch.randn(n, *shape),)


def tokens(vocab: int, *lengths: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda n: tuple(torch.randint(vocab, (n, length)) for length in lengths)


# One small case of each super-network in the package, with its inputs, and one of nobody's.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "ElasticMobileNetV3": (
        lambda: ElasticMobileNetV3.tiny(n_classes=10, depths=(1, 2)),
        images(1, 8, 8),
    ),
    "ElasticResNet": (lambda: ElasticResNet.tiny(n_classes=10), images(1, 8, 8)),
    "ElasticTransformer": (
        lambda: ElasticTransformer.tiny(enc_depths=(1,), dec_depths=(1, 2), attend=(1,)),
        tokens(20, 7, 9),
    ),
    "ElasticGPT": (lambda: ElasticGPT.tiny(depths=(1, 2)), tokens(65, 12)),
    "ElasticViT": (lambda: ElasticViT.tiny(depths=(1, 2)), images(1, 8, 8)),
    "foreign": (foreign, images(3, 9, 9)),
}
NO_GRAPH = {"ElasticDecoding"}  # a loop of forward passes that picks tokens, for timing


def test_every_super_network_of_the_package_has_a_case() -> None:
    names = {
        name
        for name in supernets.__all__
        if inspect.isclass(getattr(supernets, name))
        and issubclass(getattr(supernets, name), SubnetMixin)
    }
    assert names - NO_GRAPH <= set(NETWORKS), "add a case of the new super-network to NETWORKS"


@pytest.mark.parametrize("n", N_SUBNETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_random_subnets_give_the_same_outputs_in_every_form(name: str, n: int) -> None:
    torch.manual_seed(0)
    make, draw = NETWORKS[name]
    net = lively(make(), draw(64))
    inputs = draw(3)
    distinct = set()
    for subnet in net.search_space().sample(n, np.random.default_rng(0)):
        with activated(net, subnet), torch.no_grad():
            active = net(*inputs)
        assert active.std(dim=0).max() > 1e-2, "outputs that depend on the input"
        distinct.add(active.sum().item())
        plain = extract(net, subnet)
        program = to_exported_program(plain, inputs).module()
        with torch.no_grad():
            results = {
                "extracted": plain(*inputs),
                "torch.export": program(*inputs),
                "one row": program(*(x[:1] for x in inputs)),
            }
        session = onnx_session(to_onnx(plain, inputs), threads=1)
        arrays = [x.numpy() for x in inputs]
        named = {port.name: x for port, x in zip(session.get_inputs(), arrays, strict=True)}
        results["onnx"] = torch.as_tensor(session.run(None, named)[0])
        compiled = openvino_compiled(to_openvino(plain, inputs), threads=1)
        results["openvino"] = torch.tensor(compiled(arrays)[0])
        scale = max(1.0, float(active.abs().max()))
        for form, outputs in results.items():
            torch.testing.assert_close(
                outputs, active[: len(outputs)], rtol=AGREE, atol=AGREE * scale,
                msg=f"{form}: {subnet}",
            )  # fmt: skip
    assert len(distinct) == n
