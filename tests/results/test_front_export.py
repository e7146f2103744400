# SPDX-License-Identifier: Apache-2.0
"""A front as a folder of files."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_subnet import SearchResult, Subnet, SubnetSearch
from lightning_subnet.errors import ExportError, ExportWarning, ParityError, SearchError
from lightning_subnet.export import export, load_exported
from lightning_subnet.export.formats.registry import FORMATS
from lightning_subnet.results.front_export import FrontExport, _Entry, _weights, _weights_mb
from tests.networks import Digits, ElasticMlp, LitMlp, quiet_trainer
from tests.problems import assert_clear
from tests.results.mobile import LitMobile, searched


@pytest.fixture(name="searched", scope="module")
def _searched() -> tuple[LitMobile, SearchResult]:
    return searched()


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
    assert f"1-{subnets[1].key[:8]}.onnx: " in text
    assert "uses the operator" in text
    assert "all of its weights" not in text  # as the files have those that are used
    assert "not measured" in text
    with pytest.raises(ExportError, match="None of 1 files could be written"):
        result.export(tmp_path / "none", subnets=subnets[1:])
    assert not (tmp_path / "none").exists()


def test_the_weights_in_the_files_of_a_network_that_is_not_cut_apart(tmp_path: Path) -> None:
    net: Any = ElasticMlp().eval()
    subnet = net.search_space().smallest
    net.activate(subnet)
    net.sliced = False
    mb = _weights_mb(net)
    assert mb == sum(p.numel() * 4 for p in net.parameters()) / 1e6 + (2 * 64 * 4 + 8) / 1e6
    folded = export(net, tmp_path / "net.onnx", torch.randn(2, 64))  # a trace folds its slices
    whole = export(net, tmp_path / "net.pt2", torch.randn(2, 64))
    assert folded.size_mb < 0.6 * mb < mb < whole.size_mb
    sizes = f"net.onnx ({folded.size_mb:.3g} of {mb:.3g} MB)"
    for files, parts in (
        (
            [folded],
            [f"Smaller than all of its weights, as conversion cut them to what is used: {sizes}."],
        ),
        ([whole], ["each file holds all of its weights, with the sub-network in force."]),
        ([folded, whole], [f"{sizes}. As large as all of them, or larger: net.pt2."]),
    ):
        text = _weights([_Entry("net", subnet, None, files, {}, mb)])
        assert "The super-network cannot be cut apart" in text
        for part in parts:
            assert part in text
    net.sliced = True
    assert (
        _weights(
            [_Entry("net", subnet, None, [export(net, tmp_path / "net.onnx", torch.randn(2, 64))])]
        )
        == ""
    )


def test_a_subnet_that_is_not_what_was_scored_is_not_written(
    searched: tuple[LitMobile, SearchResult], tmp_path: Path
) -> None:
    _, result = searched
    wrong = result.front[0].subnet

    def extracted(subnet: Subnet) -> Any:
        net: Any = result.extract(subnet)
        if subnet == wrong:
            net.parity = 0.41
        return net

    job = FrontExport(result, tmp_path / "front", ["onnx"], None)
    with pytest.warns(ExportWarning, match=f"1 of {len(result.front)} files"):
        files = job.run(extracted, result.example_input(), dynamic_batch=True, tolerance=None)
    assert len(files) == len(result.front) - 1
    text = (tmp_path / "front/README.md").read_text()
    assert "is not the subnet that was scored: when it was extracted" in text
    job = FrontExport(result, tmp_path / "none", ["onnx"], [wrong])
    with pytest.raises(ParityError) as caught:
        job.run(extracted, result.example_input(), dynamic_batch=True, tolerance=None)
    assert isinstance(caught.value, ExportError)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("tolerance", [0, -1, 2, float("nan"), "1e-4", True])
def test_a_tolerance_that_is_none_fails_before_anything_is_written(
    searched: tuple[LitMobile, SearchResult], tolerance: Any, tmp_path: Path
) -> None:
    _, result = searched
    with pytest.raises(ExportError) as caught:
        result.export(tmp_path / "new", tolerance=tolerance)
    assert_clear(caught.value, f"tolerance={tolerance!r}", "a positive number up to 1")
    assert not (tmp_path / "new").exists()


def test_a_front_that_cannot_be_exported_fails_before_anything_is_written(
    searched: tuple[LitMobile, SearchResult], tmp_path: Path
) -> None:
    _, result = searched
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for arguments, parts in (
        ({"formats": ["onx"]}, ("'onx' is not a format", "Did you mean 'onnx'?")),
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


def test_nothing_warns(searched: tuple[LitMobile, SearchResult], tmp_path: Path) -> None:
    _, result = searched
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.export(tmp_path / "front", formats=[*FORMATS.table], subnets=[result.knee])
