# SPDX-License-Identifier: Apache-2.0
"""The same outputs in every form: active, extracted, ONNX Runtime, torch.export, OpenVINO."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    recalibrate,
    supernets,
)
from lightning_subnet.errors import ExportError, FixedBatchError
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
from tests.problems import assert_clear

ROOT = Path(__file__).resolve().parents[2]
AGREE = 1e-4  # the requirement of the project
N_SUBNETS = 20


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


def lively(net: nn.Module, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
    """Give a network weights as after training: at first, much of what goes in makes no odds."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim > 1:
                nn.init.kaiming_normal_(p)
            else:
                nn.init.uniform_(p, -0.5, 0.5) if "bias" in name else nn.init.uniform_(p, 0.5, 1.5)
    if inputs[0].is_floating_point():
        recalibrate(net, list(inputs))
    return net.eval()


def test_every_super_network_of_the_package_has_a_case() -> None:
    own = {
        name
        for name in supernets.__all__
        if inspect.isclass(getattr(supernets, name))
        and issubclass(getattr(supernets, name), SubnetMixin)
    }
    assert own - NO_GRAPH <= set(NETWORKS), "add a case of the new super-network to NETWORKS"


@pytest.mark.parametrize("name", NETWORKS)
def test_twenty_random_subnets_give_the_same_outputs_in_every_form(name: str) -> None:
    torch.manual_seed(0)
    make, draw = NETWORKS[name]
    net = lively(make(), draw(64))
    inputs = draw(3)
    distinct = set()
    for subnet in net.search_space().sample(N_SUBNETS, np.random.default_rng(0)):
        with activated(net, subnet), torch.no_grad():
            active = net(*inputs)
        assert active.std(dim=0).max() > 1e-2, "outputs that depend on the input"
        distinct.add(active.sum().item())
        plain = extract(net, subnet)
        program = to_exported_program(plain, inputs).module()
        with torch.no_grad():
            found = {
                "extracted": plain(*inputs),
                "torch.export": program(*inputs),
                "one row": program(*(x[:1] for x in inputs)),
            }
        session = onnx_session(to_onnx(plain, inputs), threads=1)
        given = [x.numpy() for x in inputs]
        named = {port.name: x for port, x in zip(session.get_inputs(), given, strict=True)}
        found["onnx"] = torch.as_tensor(session.run(None, named)[0])
        compiled = openvino_compiled(to_openvino(plain, inputs), threads=1)
        found["openvino"] = torch.tensor(compiled(given)[0])
        scale = max(1.0, float(active.abs().max()))
        for form, outputs in found.items():
            torch.testing.assert_close(
                outputs, active[: len(outputs)], rtol=AGREE, atol=AGREE * scale,
                msg=f"{form}: {subnet}",
            )  # fmt: skip
    assert len(distinct) == N_SUBNETS


# The batch


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).reshape(2, -1)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_batch_size_is_open_whatever_the_example_has(rows: int) -> None:
    net, x, other = nn.Linear(3, 2).eval(), torch.randn(rows, 3), torch.randn(7, 3)
    expected = net(other).detach()
    session = onnx_session(to_onnx(net, x))
    assert session.get_inputs()[0].shape == ["batch", 3]
    assert session.get_outputs()[0].shape == ["batch", 2]
    model = to_openvino(net, x)
    assert str(model.input(0).partial_shape) == "[?,3]"
    one = openvino_compiled(model)(other.numpy())[0]
    for found in (
        session.run(None, {"input": other.numpy()})[0],
        one,
        to_exported_program(net, x).module()(other).detach().numpy(),
    ):
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_a_fixed_batch_size_is_told_and_can_be_asked_for() -> None:
    for convert in (to_onnx, to_exported_program, to_openvino):
        with pytest.raises(FixedBatchError) as caught:
            convert(Fixed(), torch.randn(2, 3))
        assert_clear(caught.value, "Fixed", "fixes the size of its batch", "dynamic_batch=False")
        assert convert(Fixed(), torch.randn(2, 3), dynamic_batch=False)
    fixed = onnx_session(to_onnx(nn.Linear(3, 2), torch.randn(4, 3), dynamic_batch=False))
    assert fixed.get_inputs()[0].shape == [4, 3]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # a trace makes a constant of the first test, and takes the loop for two rounds
        x = self.layer(x) if x.shape[1] == 3 else x
        return x + torch.stack([x.new_ones(3) for _ in range(int(x.shape[1]))]).sum(0)


def test_what_a_trace_would_freeze_takes_the_other_way() -> None:
    net, x = Branching().eval(), torch.randn(2, 3)
    with pytest.raises(ExportError, match="freeze"):
        to_onnx(net, x, exporter="trace")
    other = torch.randn(5, 3)
    (found,) = onnx_session(to_onnx(net, x)).run(None, {"x": other.numpy()})
    np.testing.assert_allclose(found, net(other).detach().numpy(), atol=1e-6)


def test_attention_is_converted_and_its_fast_path_is_back_afterwards() -> None:
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, enable_nested_tensor=False
    ).eval()
    x, other = torch.randn(1, 5, 4), torch.randn(3, 5, 4)
    fast = torch.backends.mha.get_fastpath_enabled()
    (found,) = onnx_session(to_onnx(net, x)).run(None, {"src": other.numpy()})
    np.testing.assert_allclose(found, net(other).detach().numpy(), atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled() == fast


# Inputs and outputs


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Any, scale: Any, double: bool = False, rest: Any = None) -> Any:
        y = self.layer(x) * scale * (2 if double else 1)
        return {"x": y, "total": y.sum(), "parts": [x, scale]}


@pytest.mark.parametrize("by_name", [False, True])
def test_several_inputs_and_outputs_have_their_names(by_name: bool) -> None:
    net, x = Several().eval(), torch.randn(2, 3)
    scale = torch.rand(2, 1)
    given = {"scale": scale, "x": x, "double": True} if by_name else (x, scale, True, None)
    session = onnx_session(to_onnx(net, given))
    assert {port.name for port in session.get_inputs()} == {"x", "scale"}
    names = [port.name for port in session.get_outputs()]
    assert names == ["x_output", "total", "parts.0", "parts.1"]
    arrays = {"x": x.numpy(), "scale": scale.numpy()}
    expected = net(x, scale, True)["x"].detach().numpy()
    np.testing.assert_allclose(session.run(["x_output"], arrays)[0], expected, atol=1e-6)
    compiled = openvino_compiled(to_openvino(net, given))
    np.testing.assert_allclose(compiled(arrays)["x_output"], expected, atol=1e-6)


def test_an_input_that_is_not_used_stays_an_input() -> None:
    class Ignoring(nn.Module):
        def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    given = (torch.randn(2, 4), torch.randn(2, 3))
    session = onnx_session(to_onnx(Ignoring(), given))
    assert [port.name for port in session.get_inputs()] == ["y", "x"]
    model = to_openvino(Ignoring(), given)
    assert [port.any_name for port in model.inputs] == ["y", "x"]
    assert [str(port.partial_shape) for port in model.inputs] == ["[?,4]", "[?,3]"]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (torch.randn(2, 5), ("Linear failed on inputs", "(2, 5)", "Give an example input")),
        (torch.zeros(0, 3), ("is no batch", "(0, 3)")),
        ((None,), ("is no batch",)),
        (([torch.zeros(1, 3)], torch.zeros(1, 3)), ("Input 'input' is a list", "Wrap")),
    ],
)
def test_inputs_that_do_not_fit(given: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ExportError) as caught:
        to_onnx(nn.Linear(3, 2), given)
    assert_clear(caught.value, *parts)


# What cannot be converted, and silence


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(self.layer(x)[:, None] * torch.eye(3)).abs()


def test_an_operator_without_a_form_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    for convert, form in ((to_onnx, "ONNX"), (to_openvino, "OpenVINO")):
        with pytest.raises(ExportError) as caught:
            convert(Unsupported(), torch.randn(2, 3))
        assert_clear(caught.value, "Unsupported", "linalg_eig", form, "export to another format")
    assert to_exported_program(Unsupported(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


def test_conversions_are_quiet_and_leave_nothing_changed(capfd: pytest.CaptureFixture[str]) -> None:
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)), torch.randn(2, 3)
    net[2].eval()
    branching = Branching()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    names = ("root", "torch", "torch.onnx", "onnxscript")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = [*logging.getLogger().handlers]
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        to_onnx(net, x)
        to_onnx(net, x, exporter="graph")
        to_exported_program(net, x)
        to_openvino(net, x)
        to_openvino(branching, x)  # the other way
    assert [str(w.message) for w in told] == []
    assert capfd.readouterr() == ("", "")
    assert levels == {name: logging.getLogger(name).level for name in levels}
    assert handlers == logging.getLogger().handlers
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_missing_extra_is_named() -> None:
    code = """
import sys, json
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
hidden = ("onnx", "onnxscript", "onnxruntime", "openvino")
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] in hidden else find(name, *rest)
)
import torch
from lightning_subnet.export.formats.onnx import to_onnx
from lightning_subnet.export.formats.openvino import to_openvino
from lightning_subnet.export.formats.torch_export import to_exported_program
from lightning_subnet.errors import ExportError
net, x, told = torch.nn.Linear(3, 2), torch.zeros(1, 3), []
for convert in (to_onnx, to_openvino):
    try:
        convert(net, x)
    except ExportError as error:
        told.append(str(error))
to_exported_program(net, x)
print(json.dumps(told))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    onnx, openvino = json.loads(done.stdout.splitlines()[-1])
    assert "pip install 'lightning-subnet[onnx]'" in onnx
    assert "pip install 'lightning-subnet[openvino]'" in openvino
