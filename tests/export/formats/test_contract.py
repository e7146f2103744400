# SPDX-License-Identifier: Apache-2.0
"""The contract of a format: every one in the table writes and loads the same things alike."""

from __future__ import annotations

import json
import re
import site
import subprocess
import sys
import zipfile
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import Evaluation, activated, extract
from lightning_subnet._torch.outputs import named_outputs
from lightning_subnet.errors import ExportError, ParityError
from lightning_subnet.export import Format, export, load_exported
from lightning_subnet.export.formats import registry
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.export.networks import Fixed, Random, Several, lively, small
from tests.problems import assert_clear


@pytest.fixture(params=registry.FORMATS.table)
def form(request: pytest.FixtureRequest) -> Format:
    return registry.make(request.param)


@pytest.fixture
def net() -> ElasticMobileNetV3:
    torch.manual_seed(0)
    net = ElasticMobileNetV3.tiny(n_classes=10, depths=(1, 2), widths=(8, 12))
    return lively(net, (torch.randn(64, 1, 8, 8),))


def test_a_format_describes_itself(form: Format) -> None:
    assert registry.of_path(Path(f"net{form.suffix}")).name == form.name
    assert form.suffix == form.suffix.lower()
    assert form.suffix == Path(f"net{form.suffix}").suffix
    assert form.title
    assert form.writers()
    form.check()


def test_a_round_trip_gives_outputs_subnet_and_values(
    form: Format, net: ElasticMobileNetV3, tmp_path: Path
) -> None:
    space = net.search_space()
    evaluation = Evaluation(
        7, space.sample(1, 0)[0], {"val_acc": 0.9, "latency_ms": 1.5}, {"latency_ms": 0.1}
    )
    plain, x = extract(net, evaluation.subnet), torch.randn(4, 1, 8, 8)
    path = tmp_path / f"größe 大 1{form.suffix}"
    about = {"measures": {"latency_ms": {"unit": "ms"}}, "note": "for the board"}
    exported = export(plain, path, x, evaluation=evaluation, about=about)
    assert exported.path == path
    assert exported.dynamic_batch
    assert exported.parity < 1e-4
    written = {p.name for p in tmp_path.iterdir()}
    weights = {f"{path.stem}{form.weights}"} if form.weights else set()
    assert written == {path.name, f"{path.name}.json"} | weights
    size = sum((tmp_path / name).stat().st_size for name in {path.name} | weights)
    assert exported.size_mb == size / 1e6

    loaded = load_exported(str(path))
    assert loaded.subnet == evaluation.subnet
    assert loaded.values == {"val_acc": 0.9, "latency_ms": 1.5}
    assert loaded.inputs == ("x",)
    for rows in (1, 4, 9):
        images = torch.randn(rows, 1, 8, 8)
        with activated(net, evaluation.subnet), torch.no_grad():
            torch.testing.assert_close(loaded(images), net(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded(x=x), loaded(x))

    metadata = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert metadata == dict(exported.metadata) == dict(loaded.metadata)
    assert metadata["values"]["latency_ms"] == {"value": 1.5, "standard_error": 0.1, "unit": "ms"}
    assert metadata["subnet"] == evaluation.subnet.to_json()
    assert metadata["inputs"] == [{"name": "x", "shape": ["batch", 1, 8, 8], "dtype": "float32"}]
    assert metadata["outputs"] == [{"name": "output", "shape": ["batch", 10]}]
    assert metadata["parity"]["batches"] == [4, 5, 1]
    assert metadata["parity"]["absolute"] == exported.parity
    assert metadata["sliced"] is True
    assert metadata["note"] == "for the board"
    assert metadata["versions"]["torch"] == torch.__version__


def test_several_inputs_and_a_dict_of_outputs(form: Format, tmp_path: Path) -> None:
    net, x, scale = Several(), torch.randn(2, 3), torch.rand(2, 1)
    export(net, tmp_path / f"net{form.suffix}", (x, scale, True))
    loaded = load_exported(tmp_path / f"net{form.suffix}")
    assert loaded.inputs == ("x", "scale")
    outputs, expected = loaded(x, scale=scale), net(x, scale, True)
    assert list(outputs) == ["x_output", "total", "parts.0", "parts.1"]
    torch.testing.assert_close(outputs["x_output"], expected["x"].detach())
    torch.testing.assert_close(outputs["total"], expected["total"].detach())
    torch.testing.assert_close(outputs["parts.1"], scale)
    with pytest.raises(ExportError) as caught:
        loaded(x)
    assert_clear(caught.value, "takes 'x', 'scale'", "Pass one tensor for each")


def test_a_tuple_comes_back_as_a_tuple(form: Format, tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, ids: torch.Tensor) -> Any:
            return F.one_hot(ids, 9).float(), ids * 2

    ids = torch.randint(0, 9, (1, 5))
    export(Pair(), tmp_path / f"net{form.suffix}", ids)
    one, two = load_exported(tmp_path / f"net{form.suffix}")(ids)
    assert torch.equal(one, F.one_hot(ids, 9).float())
    assert torch.equal(two, ids * 2)
    assert two.dtype == torch.int64


def test_a_network_that_fixes_its_batch_keeps_that_of_the_example(
    form: Format, tmp_path: Path
) -> None:
    net, x = Fixed(), torch.randn(2, 3)
    exported = export(net, tmp_path / f"net{form.suffix}", x)
    assert not exported.dynamic_batch
    assert exported.metadata["inputs"][0]["shape"] == [2, 3]
    loaded = load_exported(exported.path)
    torch.testing.assert_close(loaded(x), net(x).detach())
    with pytest.raises(ExportError) as caught:
        loaded(torch.randn(5, 3))
    assert_clear(caught.value, "failed on inputs of (5, 3)", "exported for [[2, 3]]")


def test_a_batch_of_one_size_can_be_asked_for(form: Format, tmp_path: Path) -> None:
    net, x = small(), torch.randn(4, 3)
    exported = export(net, tmp_path / f"net{form.suffix}", x, dynamic_batch=False)
    assert not exported.dynamic_batch
    assert exported.metadata["inputs"][0]["shape"] == [4, 3]
    assert exported.metadata["parity"]["batches"] == [4]
    torch.testing.assert_close(load_exported(exported.path)(x), net(x).detach())


@pytest.mark.parametrize("threads", [None, 1])
def test_a_file_runs_with_the_threads_that_are_asked_for(
    form: Format, threads: int | None, tmp_path: Path
) -> None:
    net, x = small(), torch.randn(2, 3)
    path = export(net, tmp_path / f"net{form.suffix}", x).path
    torch.testing.assert_close(load_exported(path, threads=threads)(x), net(x).detach())


def test_other_outputs_are_refused_and_the_old_file_stays(form: Format, tmp_path: Path) -> None:
    path, x = tmp_path / f"net{form.suffix}", torch.randn(8, 3)
    export(small(), path, x)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ExportError) as caught:
        export(Random(), path, x)
    assert isinstance(caught.value, ParityError)
    assert_clear(caught.value, "gives other outputs than Random", "differs by up to", "random")
    assert re.search(
        r"(differs by up to|its shape is) .* in the network, .* in the file", str(caught.value)
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_snippet_runs_a_file_in_another_process(form: Format, tmp_path: Path) -> None:
    net, x = small(), torch.randn(2, 3)
    export(net, tmp_path / f"net{form.suffix}", x)
    code = form.snippet(f"net{form.suffix}", ["input"])
    value = f"torch.tensor({x.tolist()})"
    if "# tensors" not in code:  # arrays of NumPy
        value += ".numpy()"
    program = (
        f"import torch, json\ninput = {value}\n{code}\n"
        "y = outputs if hasattr(outputs, 'tolist') else outputs[0]\nprint(json.dumps(y.tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    outputs = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(outputs, net(x).detach())
    assert "lightning_subnet" not in code


def test_the_network_is_left_as_it_was(
    form: Format, net: ElasticMobileNetV3, tmp_path: Path
) -> None:
    plain = extract(net, net.search_space().smallest).train()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    export(plain, tmp_path / f"net{form.suffix}", torch.randn(2, 1, 8, 8))
    assert all(child.training for child in plain.modules())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, before[key])


def test_without_metadata_it_loads_and_knows_nothing(form: Format, tmp_path: Path) -> None:
    path, x, net = tmp_path / f"net{form.suffix}", torch.randn(2, 3), small()
    export(net, path, x)
    (tmp_path / f"net{form.suffix}.json").unlink()
    loaded = load_exported(path)
    torch.testing.assert_close(loaded(x), net(x).detach())
    assert (loaded.subnet, loaded.values, dict(loaded.metadata)) == (None, {}, {})
    path.write_bytes(b"no model")
    with pytest.raises(ExportError) as caught:
        load_exported(path)
    assert_clear(caught.value, "cannot be read", "damaged, or of another format")


# What a file tells of where it was made

HERE = Path(__file__).resolve()
TOLD = {
    "this file": str(HERE),
    "its name": HERE.name,
    "the repository": str(HERE.parents[3]),
    "home": f"{Path.home()}/",
    "site-packages": site.getsitepackages()[0],
    "where torch is": str(Path(torch.__file__).parent),
    "traces": "stack_trace",
}


class Halved(nn.Module):
    """A network that a trace cannot follow, so that exporters with stack traces are used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu()
        y = y / 2 if y.shape[1] == 8 else y
        return self.head(y.mean((2, 3)))


def parts_of(path: Path) -> dict[str, bytes]:
    """Return the bytes of a file, and of all in it if it is an archive."""
    parts = {path.name: path.read_bytes()}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts |= {name: archive.read(name) for name in archive.namelist()}
    return parts


@pytest.mark.parametrize("graph", [False, True])
def test_a_file_tells_nothing_of_the_machine(form: Format, graph: bool, tmp_path: Path) -> None:
    net = Halved() if graph else nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    x = torch.rand(4, 3, 9, 9)
    exported = export(net, tmp_path / f"net{form.suffix}", x)
    secrets = {name: text.encode() for name, text in TOLD.items()}
    secrets["the folder"] = str(tmp_path).encode()
    secrets["the example"] = x.numpy().tobytes()[:64]
    files = list(tmp_path.iterdir())
    assert len(files) == 2 + bool(form.weights)
    for file in files:
        for part, content in parts_of(file).items():
            for name, secret in secrets.items():
                assert secret not in content, f"{name} in {part}"
    weights = sum(p.numel() * 4 for p in net.parameters()) / 1e6
    if form.name == "onnx":
        assert exported.size_mb < weights + 0.004
    torch.testing.assert_close(load_exported(exported.path)(x), net.eval()(x).detach())


# Types of weights, and of outputs


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x).mean(1)


def convolutions() -> nn.Module:
    blocks = (
        nn.Sequential(nn.Conv2d(c, 16, 3), nn.BatchNorm2d(16), nn.ReLU()) for c in (3, 16, 16)
    )
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


@pytest.mark.parametrize(("make", "shape"), [(convolutions, (4, 3, 12, 12)), (Encoder, (4, 6, 32))])
def test_networks_of_half_precision_need_no_tolerance(
    form: Format, make: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = make().eval().half(), torch.randn(shape).half()
    exported = export(net, tmp_path / f"net{form.suffix}", x)
    step = torch.finfo(torch.float16).eps
    assert exported.metadata["parity"]["tolerance"] == 8 * step
    # Measured: at most .6 steps, of up to 20 convolutions and of up to 8 layers of attention.
    assert exported.metadata["parity"]["relative"] < 2 * step
    outputs = load_exported(exported.path)(x)
    assert outputs.dtype == torch.float16
    torch.testing.assert_close(outputs, net(x).detach(), atol=4e-3, rtol=4e-3)


def test_bfloat16_goes_where_it_can(form: Format, tmp_path: Path) -> None:
    net, x = small().bfloat16(), torch.randn(2, 3).bfloat16()
    path = tmp_path / f"net{form.suffix}"
    if form.name == "torch":
        exported = export(net, path, x)
        assert exported.metadata["parity"]["tolerance"] == 8 * torch.finfo(torch.bfloat16).eps
        assert torch.equal(load_exported(path)(x), net(x).detach())
        return
    with pytest.raises(ExportError) as caught:
        export(net, path, x)
    assert_clear(caught.value, "Sequential is of bfloat16", "net.half()", ".pt2")
    assert list(tmp_path.iterdir()) == []


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg] # as the libraries have it
    """An output in the style of transformers: a dict whose values are its fields."""

    logits: Any = None
    loss: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "loss", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


@dataclass
class Record:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


Pair = namedtuple("Pair", ["logits", "aux"])

OUTPUTS: dict[str, tuple[Any, list[str]]] = {
    "a model output": (
        lambda y: ModelOutput(y, hidden=(y, y * 2)),
        ["logits", "hidden.0", "hidden.1"],
    ),
    "a dataclass": (lambda y: Record(y, (y * 2,)), ["logits", "hidden.0"]),
    "a named tuple": (lambda y: Pair(y, y * 2), ["output_logits", "output_aux"]),
    "a dict with None": (lambda y: {"logits": y, "loss": None}, ["logits"]),
    "a tuple with None": (lambda y: (y, None), ["output_0"]),
    "nested": (lambda y: {"a": {"b": y}, "c": [y * 2, None]}, ["a.b", "c.0"]),
}


class Returning(nn.Module):
    """A network of two inputs, one of them optional, with an output of some type."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 2), kind

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        y = self.layer(x)
        return OUTPUTS[self.kind][0](y if mask is None else y * mask)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_any_type(form: Format, kind: str, by_name: bool, tmp_path: Path) -> None:
    net, x, mask = Returning(kind).eval(), torch.randn(2, 3), torch.rand(2, 1)
    exported = export(net, tmp_path / f"net{form.suffix}", {"x": x, "mask": mask} if by_name else x)
    assert exported.dynamic_batch
    assert [port["name"] for port in exported.metadata["outputs"]] == OUTPUTS[kind][1]
    loaded, other = load_exported(exported.path), torch.randn(5, 3)
    expected = named_outputs(net(other, mask[:1]) if by_name else net(other))
    arguments = {"x": other, "mask": mask[:1].repeat(5, 1)} if by_name else {"x": other}
    outputs = loaded(**arguments)
    values = outputs.values() if isinstance(outputs, dict) else outputs
    for one, value in zip(expected.values(), values, strict=True):
        torch.testing.assert_close(value, one.detach())
    assert list(expected) == OUTPUTS[kind][1]
