# SPDX-License-Identifier: Apache-2.0
"""Exports: the format by name or suffix, paths, tolerances, and metadata as they ever were."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_subnet import Evaluation, SubnetSearch, export_onnx, extract
from lightning_subnet.errors import ExportError
from lightning_subnet.export import Exported, export, export_openvino, export_torch, load_exported
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.export.networks import lively, small, train
from tests.networks import Digits, LitMlp, digits, quiet_trainer
from tests.problems import assert_clear

NAMES: dict[str, tuple[str, Callable[..., Exported]]] = {
    "onnx": (".onnx", export_onnx),
    "torch": (".pt2", export_torch),
    "openvino": (".xml", export_openvino),
}
"""The suffix of each format of the first version, and the function of its name."""


@pytest.fixture
def net() -> ElasticMobileNetV3:
    torch.manual_seed(0)
    net = ElasticMobileNetV3.tiny(n_classes=10, depths=(1, 2), widths=(8, 12))
    return lively(net, (torch.randn(64, 1, 8, 8),))


# The format


@pytest.mark.parametrize("name", NAMES)
def test_the_suffix_the_name_and_the_function_write_the_same(name: str, tmp_path: Path) -> None:
    (suffix, function), net, x = NAMES[name], small(), torch.randn(2, 3)
    by_suffix = export(net, tmp_path / f"one{suffix}", x)
    by_name = export(net, tmp_path / f"two{suffix}", x, format=name)
    by_function = function(net, tmp_path / f"three{suffix}", x)
    changing = {"sha256", "size_mb"}  # some formats hold the path or the time

    def facts(exported: Exported) -> dict[str, Any]:
        return {k: v for k, v in exported.metadata.items() if k not in changing}

    assert by_suffix.format == by_name.format == by_function.format == name
    assert facts(by_suffix) == facts(by_name) == facts(by_function)


@pytest.mark.parametrize("name", NAMES)
def test_the_function_of_a_format_takes_the_same_arguments(name: str) -> None:
    parameters = dict(inspect.signature(export).parameters)
    del parameters["format"]
    assert dict(inspect.signature(NAMES[name][1]).parameters) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_function_of_a_format_hands_everything_on(
    name: str, net: ElasticMobileNetV3, tmp_path: Path
) -> None:
    suffix, function = NAMES[name]
    subnet = net.search_space().smallest
    exported = function(
        extract(net, subnet), tmp_path / f"net{suffix}", torch.randn(3, 1, 8, 8), evaluation=subnet,
        about={"note": "for the board"}, dynamic_batch=False, tolerance=1e-2,
    )  # fmt: skip
    assert exported.metadata["subnet"] == subnet.to_json()
    assert exported.metadata["note"] == "for the board"
    assert not exported.dynamic_batch
    assert exported.metadata["parity"]["tolerance"] == 1e-2


def test_formats_that_do_not_exist(tmp_path: Path) -> None:
    net, x = small(), torch.randn(1, 3)
    listed = "Known are .onnx (onnx), .pt2 (torch), .xml (openvino)"
    for file, options, parts in (
        ("net.onx", {}, ("the suffix '.onx'", "Did you mean '.onnx'?", listed)),
        ("net.pt", {}, ("the suffix '.pt'", "Did you mean '.pt2'?", listed)),
        ("net", {}, ("no suffix", listed)),
        ("net.onnx", {"format": "onx"}, ("'onx' is not a format", "Did you mean 'onnx'?")),
        ("net.onnx", {"format": 3}, ("3 is not a format", "Known are 'onnx', 'torch', 'openvino'")),
        ("net.onnx", {"format": "torch"}, ("does not end in '.pt2'", "net.pt2")),
        (".", {}, ("is a folder", "net.onnx")),
        (".", {"format": "openvino"}, ("is a folder", "net.xml")),
    ):
        with pytest.raises(ExportError) as caught:
            export(net, tmp_path / file, x, **options)  # type: ignore[arg-type] # wrong on purpose
        assert_clear(caught.value, *parts)
    assert list(tmp_path.iterdir()) == []


# Metadata


def test_the_metadata_have_the_keys_of_the_first_version(
    net: ElasticMobileNetV3, tmp_path: Path
) -> None:
    evaluation = Evaluation(7, net.search_space().smallest, {"val_acc": 0.9})
    x = torch.randn(2, 1, 8, 8)
    exported = export(
        extract(net, evaluation.subnet), tmp_path / "net.onnx", x, evaluation=evaluation
    )
    keys = (
        "format runtime subnet choices evaluation values network sliced inputs outputs returns "
        "dynamic_batch parity size_mb sha256 versions"
    )
    assert list(exported.metadata) == keys.split()
    assert exported.metadata["format"] == "lightning-subnet export 1"
    assert exported.metadata["runtime"] == "onnx"
    assert list(exported.metadata["parity"]) == [
        "absolute", "relative", "tolerance", "batches", "extraction",
    ]  # fmt: skip
    assert list(exported.metadata["versions"]) == [
        "torch", "lightning-subnet", "onnx", "onnxscript", "onnxruntime",
    ]  # fmt: skip
    assert list(export(small(), tmp_path / "net.xml", torch.randn(2, 3)).metadata["versions"]) == [
        "torch", "lightning-subnet", "openvino", "onnx",
    ]  # fmt: skip


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
    outputs = load_exported(tmp_path / "net.onnx")(x)
    right = (outputs.argmax(1) == y).float().mean().item()
    assert right == pytest.approx(best.values["val_acc"], abs=0.1)
    assert right > (model.eval()(x).argmax(1) == y).float().mean().item() + 0.1


# Nothing is written


def test_the_tolerance_decides(net: ElasticMobileNetV3, tmp_path: Path) -> None:
    plain, x = extract(net, net.search_space().largest), torch.randn(8, 1, 8, 8)
    with pytest.raises(ExportError, match="allowed 1e-12"):
        export_openvino(plain, tmp_path / "net.xml", x, tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []
    assert 1e-12 < export_openvino(plain, tmp_path / "net.xml", x).parity < 1e-3
    for tolerance in (0, -1.0, float("nan"), float("inf"), 1.5, True, "small", torch.ones(2)):
        with pytest.raises(ExportError) as caught:
            export_onnx(plain, tmp_path / "net.onnx", x, tolerance=tolerance)  # type: ignore[arg-type] # wrong on purpose
        assert_clear(caught.value, "tolerance=", "positive number", "a share of the largest output")


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
    with pytest.raises(ExportError, match="is not a network"):
        export_onnx(net.state_dict(), tmp_path / "net.onnx", x)  # type: ignore[arg-type] # wrong on purpose
    assert [p.name for p in tmp_path.rglob("*")] == ["folder.onnx"]
