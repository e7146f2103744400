# SPDX-License-Identifier: Apache-2.0
"""Files that give the same outputs: written, refused, loaded, whole fronts; training the winner."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import (
    Evaluation,
    Latency,
    SearchResult,
    SubnetSearch,
    activated,
    elastic,
    export_onnx,
    extract,
)
from lightning_subnet.errors import ExportError, ExportWarning, SearchError
from lightning_subnet.export import export_openvino, export_torch, load_exported
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.export.test_formats import Fixed, Several, Unsupported, lively
from tests.networks import Digits, ElasticMlp, LitMlp, digits, quiet_trainer
from tests.problems import assert_clear

EXPORTERS: dict[str, Callable[..., Any]] = {
    ".onnx": export_onnx,
    ".pt2": export_torch,
    ".xml": export_openvino,
}
suffixes = pytest.mark.parametrize("suffix", EXPORTERS)


@pytest.fixture
def net() -> ElasticMobileNetV3:
    torch.manual_seed(0)
    net = ElasticMobileNetV3.tiny(n_classes=10, depths=(1, 2), widths=(8, 12))
    return lively(net, (torch.randn(64, 1, 8, 8),))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


# One file


@suffixes
def test_a_round_trip_gives_outputs_subnet_and_values(
    suffix: str, net: ElasticMobileNetV3, tmp_path: Path
) -> None:
    space = net.search_space()
    evaluation = Evaluation(
        7, space.sample(1, 0)[0], {"val_acc": 0.9, "latency_ms": 1.5}, {"latency_ms": 0.1}
    )
    plain, x = extract(net, evaluation.subnet), torch.randn(4, 1, 8, 8)
    path = tmp_path / f"größe 大 1{suffix}"
    about = {"measures": {"latency_ms": {"unit": "ms"}}, "note": "for the board"}
    exported = EXPORTERS[suffix](plain, path, x, evaluation=evaluation, about=about)
    assert exported.path == path
    assert exported.dynamic_batch
    assert exported.parity < 1e-4
    written = {p.name for p in tmp_path.iterdir()}
    weights = {f"{path.stem}.bin"} if suffix == ".xml" else set()
    assert written == {path.name, f"{path.name}.json"} | weights
    size = sum((tmp_path / name).stat().st_size for name in {path.name} | weights)
    assert exported.size_mb == size / 1e6

    loaded = load_exported(str(path))
    assert loaded.subnet == evaluation.subnet
    assert loaded.values == {"val_acc": 0.9, "latency_ms": 1.5}
    assert loaded.inputs == ("x",)
    for rows in (1, 4, 9):
        given = torch.randn(rows, 1, 8, 8)
        with activated(net, evaluation.subnet), torch.no_grad():
            torch.testing.assert_close(loaded(given), net(given), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded(x=x), loaded(x))

    told = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert told == dict(exported.metadata) == dict(loaded.metadata)
    assert told["values"]["latency_ms"] == {"value": 1.5, "standard_error": 0.1, "unit": "ms"}
    assert told["subnet"] == evaluation.subnet.to_json()
    assert told["inputs"] == [{"name": "x", "shape": ["batch", 1, 8, 8], "dtype": "float32"}]
    assert told["outputs"] == [{"name": "output", "shape": ["batch", 10]}]
    assert told["parity"]["batches"] == [4, 5, 1]
    assert told["parity"]["absolute"] == exported.parity
    assert told["sliced"] is True
    assert told["note"] == "for the board"
    assert told["versions"]["torch"] == torch.__version__


@suffixes
def test_several_inputs_and_a_dict_of_outputs(suffix: str, tmp_path: Path) -> None:
    net, x, scale = Several(), torch.randn(2, 3), torch.rand(2, 1)
    EXPORTERS[suffix](net, tmp_path / f"net{suffix}", (x, scale, True))
    loaded = load_exported(tmp_path / f"net{suffix}")
    assert loaded.inputs == ("x", "scale")
    found, expected = loaded(x, scale=scale), net(x, scale, True)
    assert list(found) == ["x_output", "total", "parts.0", "parts.1"]
    torch.testing.assert_close(found["x_output"], expected["x"].detach())
    torch.testing.assert_close(found["total"], expected["total"].detach())
    torch.testing.assert_close(found["parts.1"], scale)
    with pytest.raises(ExportError) as caught:
        loaded(x)
    assert_clear(caught.value, "takes 'x', 'scale'", "Pass one tensor for each")


@suffixes
def test_a_tuple_comes_back_as_a_tuple(suffix: str, tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, ids: torch.Tensor) -> Any:
            return F.one_hot(ids, 9).float(), ids * 2

    ids = torch.randint(0, 9, (1, 5))
    EXPORTERS[suffix](Pair(), tmp_path / f"net{suffix}", ids)
    one, two = load_exported(tmp_path / f"net{suffix}")(ids)
    assert torch.equal(one, F.one_hot(ids, 9).float())
    assert torch.equal(two, ids * 2)
    assert two.dtype == torch.int64


@suffixes
def test_a_network_that_fixes_its_batch_keeps_that_of_the_example(
    suffix: str, tmp_path: Path
) -> None:
    net, x = Fixed(), torch.randn(2, 3)
    exported = EXPORTERS[suffix](net, tmp_path / f"net{suffix}", x)
    assert not exported.dynamic_batch
    assert exported.metadata["inputs"][0]["shape"] == [2, 3]
    loaded = load_exported(exported.path)
    torch.testing.assert_close(loaded(x), net(x).detach())
    with pytest.raises(ExportError) as caught:
        loaded(torch.randn(5, 3))
    assert_clear(caught.value, "failed on inputs of (5, 3)", "exported for [[2, 3]]")


def test_batch_norm_that_was_recalibrated_is_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LitMlp()
    train(model)
    result = SubnetSearch(
        objectives={"val_acc": "max"}, strategy="random", budget=3, storage=None,
        trainer=quiet_trainer(),
    ).fit(model, Digits(), progress=False)  # fmt: skip
    model.net.norm.running_mean.fill_(100.0)  # as of another subnet
    best = result.best("val_acc")
    x, y = (torch.stack(items) for items in zip(*digits(), strict=True))
    export_onnx(result.extract(best), tmp_path / "net.onnx", result.example_input())
    found = load_exported(tmp_path / "net.onnx")(x)
    right = (found.argmax(1) == y).float().mean().item()
    assert right == pytest.approx(best.values["val_acc"], abs=0.1)
    assert right > (model.eval()(x).argmax(1) == y).float().mean().item() + 0.1


# Nothing is written


class Random(nn.Module):
    """Dropout left functional, with its default training=True."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.layer(x), 0.5)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_other_outputs_are_refused_and_the_old_file_stays(suffix: str, tmp_path: Path) -> None:
    path, x = tmp_path / f"net{suffix}", torch.randn(8, 3)
    EXPORTERS[suffix](small(), path, x)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ExportError) as caught:
        EXPORTERS[suffix](Random(), path, x)
    assert_clear(caught.value, "gives other outputs than Random", "differs by up to", "random")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_tolerance_decides(net: ElasticMobileNetV3, tmp_path: Path) -> None:
    plain, x = extract(net, net.search_space().largest), torch.randn(8, 1, 8, 8)
    with pytest.raises(ExportError, match="allowed 1e-12"):
        export_openvino(plain, tmp_path / "net.xml", x, tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []
    assert 1e-12 < export_openvino(plain, tmp_path / "net.xml", x).parity < 1e-3
    for tolerance in (0, -1.0, float("nan"), "small"):
        with pytest.raises(ExportError) as caught:
            export_onnx(plain, tmp_path / "net.onnx", x, tolerance=tolerance)
        assert_clear(caught.value, "tolerance=", "positive number")


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    net, x = small(), torch.randn(1, 3)
    (tmp_path / "folder.onnx").mkdir()
    wrong = {
        tmp_path / "folder.onnx": ("is a folder", "Name a file in it"),
        tmp_path / "none" / "net.onnx": ("does not exist", "Make it first"),
        tmp_path / "net.pt": ("does not end in '.onnx'", "net.onnx"),
        tmp_path / "net": ("does not end in '.onnx'", "net.onnx"),
    }
    for path, parts in wrong.items():
        with pytest.raises(ExportError) as caught:
            export_onnx(net, path, x)
        assert_clear(caught.value, *parts)
    with pytest.raises(ExportError, match="is no network"):
        export_onnx(net.state_dict(), tmp_path / "net.onnx", x)  # type: ignore[arg-type] # wrong on purpose
    assert [p.name for p in tmp_path.rglob("*")] == ["folder.onnx"]


def test_the_network_is_left_as_it_was(net: ElasticMobileNetV3, tmp_path: Path) -> None:
    plain = extract(net, net.search_space().smallest).train()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    for suffix, export in EXPORTERS.items():
        export(plain, tmp_path / f"net{suffix}", torch.randn(2, 1, 8, 8))
    assert all(child.training for child in plain.modules())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, before[key])


# Loading


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    x = torch.randn(1, 3)
    path = export_onnx(small(), tmp_path / "winner.onnx", x).path
    for wrong, parts in {
        "winner.tflite": ("suffix '.tflite'", ".onnx (onnx), .pt2 (torch), .xml (openvino)"),
        "winer.onnx": ("There is no file", "Did you mean 'winner.onnx'?"),
    }.items():
        with pytest.raises(ExportError) as caught:
            load_exported(tmp_path / wrong)
        assert_clear(caught.value, *parts)
    metadata = tmp_path / "winner.onnx.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ExportError) as caught:
        load_exported(path)
    assert_clear(caught.value, "is damaged, or another file", "winner.onnx.json")
    path.write_bytes(whole)
    metadata.write_text("{}")
    with pytest.raises(ExportError) as caught:
        load_exported(path)
    assert_clear(caught.value, "winner.onnx.json holds no metadata", "Export again")


@suffixes
def test_without_metadata_it_loads_and_knows_nothing(suffix: str, tmp_path: Path) -> None:
    path, x, net = tmp_path / f"net{suffix}", torch.randn(2, 3), small()
    EXPORTERS[suffix](net, path, x)
    (tmp_path / f"net{suffix}.json").unlink()
    loaded = load_exported(path)
    torch.testing.assert_close(loaded(x), net(x).detach())
    assert (loaded.subnet, loaded.values, dict(loaded.metadata)) == (None, {}, {})
    path.write_bytes(b"no model")
    with pytest.raises(ExportError) as caught:
        load_exported(path)
    assert_clear(caught.value, "cannot be read", "damaged, or of another format")


def test_another_process_needs_only_the_runtime(tmp_path: Path) -> None:
    net, x = small(), torch.randn(2, 3)
    export_onnx(net, tmp_path / "net.onnx", x)
    code = (
        "import onnxruntime, json, sys\n"
        "session = onnxruntime.InferenceSession('net.onnx')\n"
        f"(y,) = session.run(None, {{'input': {x.tolist()}}})\n"
        "print(json.dumps([y.tolist(), 'torch' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    y, loaded_torch = json.loads(done.stdout)
    assert not loaded_torch
    np.testing.assert_allclose(y, net(x).detach().numpy(), atol=1e-5)


# Fronts


class LitMobile(L.LightningModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or ElasticMobileNetV3.tiny(n_classes=10, depths=(1, 2), widths=(8, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.reshape(-1, 1, 8, 8))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=3e-3)


@pytest.fixture(scope="module")
def searched() -> tuple[LitMobile, SearchResult]:
    torch.manual_seed(0)
    model = LitMobile()
    search = SubnetSearch(
        objectives={"val_acc": "max", "macs": "min", "latency_ms": "min"}, name="digits",
        measures=[Latency(seconds=0.05)], strategy="random", budget=4, storage=None,
        trainer=quiet_trainer(), verify_front=False,
    )  # fmt: skip
    return model, search.fit(model, Digits(), progress=False)


def test_a_front_becomes_a_folder_that_explains_itself(
    searched: tuple[LitMobile, SearchResult], tmp_path: Path
) -> None:
    _, result = searched
    folder = tmp_path / "new" / "front"
    written = result.export(folder, formats=("onnx", "openvino"))
    assert len(written) == 2 * len(result.front)
    names = sorted(p.name for p in folder.glob("*.onnx"))
    assert names == [f"{i}-evaluation-{e.number}.onnx" for i, e in enumerate(result.front)]
    for evaluation, name in zip(result.front, names, strict=True):
        loaded = load_exported(folder / name)
        assert loaded.subnet == evaluation.subnet
        assert loaded.values == pytest.approx(evaluation.values)
        assert loaded.metadata["objectives"] == {
            "val_acc": "max", "macs": "min", "latency_ms": "min",
        }  # fmt: skip
        assert loaded.metadata["measures"]["macs"] == {"unit": "MAC"}
        assert loaded.metadata["space_fingerprint"] == result.history.space.fingerprint
        (x,) = result.example_input()
        plain = result.extract(evaluation)
        torch.testing.assert_close(loaded(x), plain(x).detach(), rtol=1e-4, atol=1e-4)
    text = (folder / "README.md").read_text()
    for part in (
        "'digits'", "val_acc (more is better)", "latency_ms [ms]", "macs [MAC]", "1 threads",
        "± is one standard error", "load_exported", "onnxruntime.InferenceSession", "difference",
        "x` float32 (batch, 1, 8, 8)", f"{int(result.front[0].values['macs']):,}", *names,
    ):  # fmt: skip
        assert part in text
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    done = subprocess.run(
        [sys.executable, "-c", f"import numpy\nx = numpy.zeros((3, 1, 8, 8), 'f4')\n{blocks[1]}"],
        cwd=folder, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_a_format_cannot_take_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    class Odd(ElasticMlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            if self.width == 4:
                y = y + torch.linalg.eigvals(y[:, :1, None]).abs()
            return y

    model = LitMlp()
    model.net = Odd()
    result = SubnetSearch(
        objectives={"val_acc": "max"}, strategy="random", budget=2, storage=None,
        trainer=quiet_trainer(),
    ).fit(model, Digits(), progress=False)  # fmt: skip
    space = result.history.space
    subnets = [space.subnet(width=w, sharpen=1) for w in (8, 4)]
    with pytest.warns(ExportWarning, match="1 of 2 files"):
        written = result.export(tmp_path / "some", subnets=subnets)
    assert [e.path.name for e in written] == [f"0-{subnets[0].key[:8]}.onnx"]
    text = (tmp_path / "some/README.md").read_text()
    assert f"1-{subnets[1].key[:8]}.onnx: Odd uses the operator" in text
    assert "each file holds all of its weights" in text
    assert "not measured" in text
    with pytest.raises(ExportError, match="None of 1 files could be written"):
        result.export(tmp_path / "none", subnets=subnets[1:])
    assert not (tmp_path / "none").exists()


def test_a_front_that_cannot_be_exported_fails_before_anything_is_written(
    searched: tuple[LitMobile, SearchResult], tmp_path: Path
) -> None:
    _, result = searched
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for arguments, parts in (
        ({"formats": ["onx"]}, ("'onx' is no format", "Did you mean 'onnx'?")),
        ({"formats": []}, ("names nothing", "formats=('onnx',)")),
        ({"subnets": []}, ("nothing to export",)),
        ({"directory": tmp_path / "full"}, ("holds files already",)),
        ({"directory": tmp_path / "full/notes.txt"}, ("is a file",)),
    ):
        with pytest.raises(ExportError) as caught:
            result.export(**{"directory": tmp_path / "new", **arguments})
        assert_clear(caught.value, *parts)
    assert not (tmp_path / "new").exists()
    result.save(tmp_path / "result.json")
    loaded = SearchResult.load(tmp_path / "result.json")
    assert loaded.measures == result.measures
    with pytest.raises(SearchError, match=r"Pass example_input="):
        loaded.export(tmp_path / "new")


# Training the winner


def train(module: L.LightningModule, **options: Any) -> tuple[float, L.Trainer]:
    """Train a few steps; return how much the loss fell."""
    x, y = (torch.stack(items)[:256] for items in zip(*digits(), strict=True))
    data = DataLoader(TensorDataset(x, y), batch_size=64)

    def loss() -> float:
        with torch.no_grad():
            return F.cross_entropy(module(x), y).item()

    before = loss()
    trainer = quiet_trainer(max_epochs=3, **options)
    trainer.fit(module, data, data)
    return before - loss(), trainer


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


def test_the_winner_trains_as_any_module_and_is_exported(
    searched: tuple[LitMobile, SearchResult], tmp_path: Path
) -> None:
    model, result = searched
    before = {key: value.clone() for key, value in model.state_dict().items()}
    best = result.best("val_acc")
    module = result.to_module(model, best)
    assert type(module) is LitMobile
    assert type(module.net).__name__ == "MobileNetV3"
    assert module._trainer is None
    assert all(p.requires_grad for p in module.parameters())
    assert all(child.training for child in module.modules())
    x = torch.randn(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), result.extract(best)(x.reshape(-1, 1, 8, 8)))
    fell, trainer = train(module.train(), enable_checkpointing=False)
    assert fell > 0.1
    assert unchanged(model, before)
    assert "val_acc" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    again = result.to_module(model, best)
    again.load_state_dict(torch.load(tmp_path / "tuned.ckpt", weights_only=False)["state_dict"])
    exported = export_onnx(again.net, tmp_path / "tuned.onnx", x.reshape(-1, 1, 8, 8))
    with torch.no_grad():
        expected = module.eval()(x)
    torch.testing.assert_close(
        load_exported(exported.path)(x.reshape(-1, 1, 8, 8)), expected, rtol=1e-4, atol=1e-4
    )
    whole = export_torch(again, tmp_path / "whole.pt2", x)  # with its forward
    torch.testing.assert_close(load_exported(whole.path)(x), expected, rtol=1e-4, atol=1e-4)


class LitElastic(ElasticMlp, L.LightningModule):
    """A LightningModule that is the super-network itself, and activates others in training."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.activate(self.search_space().sample(1, index)[0])
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    configure_optimizers = LitMlp.configure_optimizers


def attached() -> L.LightningModule:
    """A LightningModule that knows nothing of subnets, made searchable from outside."""
    return elastic(
        LitMlp(), space=ElasticMlp().search_space(),
        activate=lambda m, s: (setattr(m.net, "width", s["width"]), setattr(m.net, "sharpen", 1)),
    )  # fmt: skip


@pytest.mark.parametrize("make", [LitMlp, LitElastic, attached])
def test_a_super_network_that_cannot_be_sliced_keeps_the_subnet_for_good(
    make: Callable[[], L.LightningModule],
) -> None:
    torch.manual_seed(0)
    model = make()
    result = SubnetSearch(
        objectives={"val_acc": "max"}, strategy="random", budget=3, storage=None,
        trainer=quiet_trainer(),
    ).fit(model, Digits(), progress=False)  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    subnet = result.history.space.subnet(width=8, sharpen=1)
    module = result.to_module(model, subnet)
    assert type(module) is type(model)
    assert module is not model
    net: Any = module.net if hasattr(module, "net") else module
    assert net.width == 8
    fell, trainer = train(module)
    assert fell > 0.1
    assert net.width == 8
    assert unchanged(model, before)
    assert trainer.callback_metrics["val_acc"] > 0.1
    rest = net.first.weight[8:].detach(), before[next(k for k in before if "first.weight" in k)][8:]
    assert torch.equal(*rest), "what is not of the subnet did not learn"


def test_a_model_with_a_trainer_is_copied_without_it() -> None:
    model = LitMlp()
    _, trainer = train(model)
    assert model._trainer is trainer
    result = SubnetSearch(
        objectives={"val_acc": "max"}, strategy="random", budget=2, storage=None,
        trainer=quiet_trainer(),
    ).fit(model, Digits(), progress=False)  # fmt: skip
    module = result.to_module(model, result.best("val_acc"))
    assert module._trainer is None
    assert model._trainer is trainer


def test_a_loaded_result_replaces_in_a_model_that_is_given(
    searched: tuple[LitMobile, SearchResult], tmp_path: Path
) -> None:
    model, result = searched
    result.save(tmp_path / "result.json")
    loaded = SearchResult.load(tmp_path / "result.json")
    module = loaded.to_module(model, loaded.best("val_acc"))
    assert type(module.net).__name__ == "MobileNetV3"


def test_frozen_layers_stay_frozen(searched: tuple[LitMobile, SearchResult]) -> None:
    _, result = searched
    model = LitMobile()
    model.net.stem.requires_grad_(False)
    model.net.stem.eval()
    module = result.to_module(model, result.best("val_acc"))
    assert not any(p.requires_grad for p in module.net.stem.parameters())
    assert all(p.requires_grad for p in module.net.stages.parameters())
    assert not module.net.stem.training
    assert module.net.stages.training


def test_models_in_which_nothing_can_be_replaced(
    searched: tuple[LitMobile, SearchResult],
) -> None:
    _, result = searched
    best = result.best("val_acc")

    class Itself(LitMobile):
        """The super-network by its own methods, which extracts a bare network."""

        def search_space(self) -> Any:
            return self.net.search_space()

        def activate(self, subnet: Any) -> None:
            self.net.activate(subnet)

        def extract(self, subnet: Any) -> nn.Module:
            return self.net.extract(subnet)

    model = Itself()
    with pytest.raises(SearchError) as caught:
        result.to_module(model, best)
    assert_clear(
        caught.value, "Itself is the super-network itself", "Move the network into a child"
    )
    with pytest.raises(SearchError, match="not a module"):
        result.to_module("model.ckpt", best)
    with pytest.raises(SearchError, match="no elastic part"):
        result.to_module(LitMobile(nn.Linear(64, 10)), best)
    holding = LitMobile()
    holding.last = holding(torch.randn(1, 64))  # a tensor of a graph, which torch does not copy
    copied: Any = result.to_module(holding, best)
    assert torch.equal(copied.last, holding.last.detach())
    holding.last = threading.Lock()
    with pytest.raises(SearchError) as caught:
        result.to_module(holding, best)
    assert_clear(caught.value, "LitMobile cannot be copied", "lock", "no locks or open files")


def test_nothing_warns(searched: tuple[LitMobile, SearchResult], tmp_path: Path) -> None:
    _, result = searched
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.export(tmp_path / "front", formats=EXPORTERS_BY_NAME, subnets=[result.knee])


EXPORTERS_BY_NAME = ("onnx", "torch", "openvino")


def test_an_unsupported_operator_has_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(Unsupported(), tmp_path / "net.onnx", torch.randn(2, 3))
    assert_clear(caught.value, "linalg_eig", "Unsupported")
    assert list(tmp_path.iterdir()) == []
