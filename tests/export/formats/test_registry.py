# SPDX-License-Identifier: Apache-2.0
"""Formats by name and suffix, and those of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_subnet.errors import ExportError, PluginError
from lightning_subnet.export import export, load_exported
from lightning_subnet.export.formats import registry
from tests.export.networks import small
from tests.plugins import installed, write_package
from tests.problems import assert_clear

PLUGIN = """
from lightning_subnet.export import Format
from lightning_subnet.export.formats.onnx import Onnx

class Doubled(Format):
    name, title, suffix = "doubled", "Doubled ONNX", ".onnx"

    def writers(self):
        return Onnx().writers()

    def load(self, path, threads):
        return Onnx().load(path, threads)

    def snippet(self, file, inputs):
        return f"run({file!r}, {inputs})"

class Other(Doubled):
    name, suffix = "other", ".other"
"""
POINTS = "doubled = demo:Doubled\nother = demo:Other"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    points = f"[lightning_subnet.formats]\n{POINTS}\n"
    write_package(tmp_path / "demo", "demo", {"demo": PLUGIN}, points)
    return tmp_path / "demo"


@pytest.fixture
def plugin(folder: Path) -> Iterator[None]:
    with installed(registry.FORMATS, folder):
        yield


def test_formats_are_found_by_name_and_suffix() -> None:
    table = registry.FORMATS.table
    assert registry.names()[: len(table)] == list(table)
    suffixes = {name: registry.make(name).suffix for name in table}
    assert suffixes.items() >= {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}.items()
    assert {name: registry.of_path(Path(f"a/b.c{s}")).name for name, s in suffixes.items()} == {
        name: name for name in suffixes
    }


@pytest.mark.usefixtures("plugin")
def test_another_package_offers_a_format(tmp_path: Path) -> None:
    assert registry.names() == [*registry.FORMATS.table, "doubled", "other"]
    net, x = small(), torch.randn(2, 3)
    exported = export(net, tmp_path / "net.other", x)
    assert exported.format == exported.metadata["runtime"] == "other"
    loaded = load_exported(exported.path)
    assert loaded.format == "other"
    torch.testing.assert_close(loaded(x), net(x).detach())
    with pytest.raises(ExportError) as caught:
        export(net, tmp_path / "net.othr", x)
    assert_clear(caught.value, "Did you mean '.other'?", ".xml (openvino)", ".other (other)")


def test_a_suffix_of_two_formats_is_ours_unless_the_name_is_said(
    folder: Path, tmp_path: Path
) -> None:
    net, x = small(), torch.randn(2, 3)
    with installed(registry.FORMATS, folder):
        assert export(net, tmp_path / "one.onnx", x).format == "onnx"
        exported = export(net, tmp_path / "two.onnx", x, format="doubled")
        assert exported.format == "doubled"
        assert load_exported(tmp_path / "one.onnx").format == "onnx"
        assert load_exported(tmp_path / "two.onnx").format == "doubled"
    loaded = load_exported(tmp_path / "two.onnx")  # by its suffix, as the package is gone
    assert loaded.format == "onnx"
    torch.testing.assert_close(loaded(x), net(x).detach())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("import nothing_of_this_name", ("cannot be imported", "nothing_of_this_name")),
        ("Doubled = Other = dict", ("not a subclass of lightning_subnet.export.formats.base",)),
        ("Doubled = Other = 3", ("is 3, which is not a subclass",)),
    ],
)
def test_a_package_that_offers_something_else_does_not_disturb_our_formats(
    text: str, parts: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    (folder / "demo.py").write_text(text)
    net, x = small(), torch.randn(2, 3)
    with installed(registry.FORMATS, folder):
        assert load_exported(export(net, tmp_path / "net.onnx", x).path).format == "onnx"
        with pytest.raises(PluginError) as caught:
            export(net, tmp_path / "two.onnx", x, format="doubled")
        assert_clear(caught.value, "'doubled'", "demo", *parts)


def test_a_format_that_cannot_be_imported_hides_no_other(tmp_path: Path) -> None:
    points = f"[lightning_subnet.formats]\nabroken = demo:Nothing\n{POINTS}\n"
    write_package(tmp_path / "demo", "demo", {"demo": PLUGIN}, points)
    with installed(registry.FORMATS, tmp_path / "demo"):
        assert registry.of_path(Path("net.other")).name == "other"
        with pytest.raises(PluginError, match="'abroken' of demo"):
            registry.of_path(Path("net.abroken"))
