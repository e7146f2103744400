# SPDX-License-Identifier: Apache-2.0
"""Subnets as files for other runtimes: written, run there, compared, and only then kept."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lightning_subnet.errors import ExportError, FixedBatchError, SubnetError
from lightning_subnet.export.call import Call, brief
from lightning_subnet.export.formats.base import library, quiet
from lightning_subnet.export.formats.onnx import to_onnx
from lightning_subnet.export.formats.openvino import to_openvino
from lightning_subnet.export.formats.torch_export import to_exported_program
from lightning_subnet.export.loading import FORMAT, SUFFIXES, beside, fingerprint
from lightning_subnet.export.parity import compared, rows
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.history import Evaluation

NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
    "openvino": ("openvino", "onnx"),
}


@dataclass(frozen=True)
class Exported:
    """One written file.

    Args:
        path: The file; its metadata are beside it, in `<path>.json`.
        format: `"onnx"`, `"torch"` or `"openvino"`.
        parity: The largest absolute difference of its outputs to those of the network.
        dynamic_batch: Whether it takes batches of any size.
        size_mb: What it takes on disk, in 10^6 bytes, without the metadata.
        metadata: What stands beside it.
    """

    path: Path
    format: str
    parity: float
    dynamic_batch: bool
    size_mb: float
    metadata: Mapping[str, Any]


def export_onnx(
    net: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    evaluation: Evaluation | Subnet | None = None,
    about: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a network as an ONNX file that gives the same outputs, or write nothing.

    The file is run by ONNX Runtime on the example and, if its batch is dynamic, on batches of one
    row and of one row more. Beside it goes `<path>.json`: subnet, measured values, inputs, outputs,
    differences and versions. `load_exported` reads both.

    Args:
        net: What `extract` returned, or any network. It is exported as in eval mode, from a copy on
            the CPU if it is elsewhere.
        path: An .onnx file in a folder that exists.
        example_input: A tensor (batch, ...), a tuple of positional or a dict of keyword arguments.
            Take real data: it is what the outputs are compared on.
        evaluation: Which subnet it is, for the metadata, with its measured values if it is an
            evaluation.
        about: More for the metadata, JSON-able, by name.
        dynamic_batch: Leave the batch size open. A network that fixes it gets the example's, which
            the returned record and the metadata tell.
        tolerance: Largest allowed difference of outputs, as a share of the largest absolute output.

    Returns:
        What was written.

    Raises:
        ExportError: The path cannot be written, the extra is not installed, an operator has no ONNX
            form, or the outputs differ by more than the tolerance. Nothing is written then, and a
            file that was there stays.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export_onnx(nn.Linear(3, 2), f"{folder}/net.onnx", torch.randn(4, 3))
        >>> exported.parity < 1e-5, exported.dynamic_batch
        (True, True)
    """
    job = _Job("onnx", net, Path(path), example_input, dynamic_batch, tolerance)
    return job.run(evaluation, about, [_write_onnx("trace"), _write_onnx("graph")])


def export_torch(
    net: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    evaluation: Evaluation | Subnet | None = None,
    about: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a network as a `torch.export` file (.pt2), or write nothing; see `export_onnx`.

    It needs torch alone, and `torch.export.load(path).module()` has the signature of the network.

    Args:
        net: As in `export_onnx`.
        path: A .pt2 file in a folder that exists.
        example_input: As in `export_onnx`.
        evaluation: As in `export_onnx`.
        about: As in `export_onnx`.
        dynamic_batch: As in `export_onnx`.
        tolerance: As in `export_onnx`.

    Returns:
        What was written.

    Raises:
        ExportError: As `export_onnx`.
    """
    job = _Job("torch", net, Path(path), example_input, dynamic_batch, tolerance)
    return job.run(evaluation, about, [_write_torch])


def export_openvino(
    net: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    evaluation: Evaluation | Subnet | None = None,
    about: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a network as an OpenVINO model, or write nothing; see `export_onnx`.

    The weights keep their precision; they go into a .bin file of the same name.

    Args:
        net: As in `export_onnx`.
        path: An .xml file in a folder that exists.
        example_input: As in `export_onnx`.
        evaluation: As in `export_onnx`.
        about: As in `export_onnx`.
        dynamic_batch: As in `export_onnx`.
        tolerance: As in `export_onnx`.

    Returns:
        What was written.

    Raises:
        ExportError: As `export_onnx`.
    """
    job = _Job("openvino", net, Path(path), example_input, dynamic_batch, tolerance)
    return job.run(evaluation, about, [_write_openvino])


EXPORTERS: dict[str, Callable[..., Exported]] = {
    "onnx": export_onnx,
    "torch": export_torch,
    "openvino": export_openvino,
}

_Writer = Callable[[nn.Module, Call, bool, Path], None]


def _inputs(call: Call) -> Any:
    return call.kwargs or call.args


def _write_onnx(exporter: Any) -> _Writer:
    def write(net: nn.Module, call: Call, dynamic: bool, path: Path) -> None:
        path.write_bytes(to_onnx(net, _inputs(call), dynamic_batch=dynamic, exporter=exporter))

    return write


def _write_torch(net: nn.Module, call: Call, dynamic: bool, path: Path) -> None:
    program = to_exported_program(net, _inputs(call), dynamic_batch=dynamic)
    with quiet():
        torch.export.save(program, str(path))


def _write_openvino(net: nn.Module, call: Call, dynamic: bool, path: Path) -> None:
    model = to_openvino(net, _inputs(call), dynamic_batch=dynamic)
    library("openvino").save_model(model, str(path), compress_to_fp16=False)


class _Job:
    """One export: what is wrong with the request shows before anything is converted."""

    def __init__(
        self,
        form: str,
        net: nn.Module,
        path: Path,
        example_input: Any,
        dynamic_batch: bool,
        tolerance: float,
    ) -> None:
        self.form, self.path = form, path
        _check_path(path, form)
        if not isinstance(net, nn.Module):
            msg = f"net={net!r:.60} is no network. Pass what result.extract(best) returns."
            raise ExportError(msg)
        if not (isinstance(tolerance, (int, float)) and 0 < tolerance < math.inf):
            msg = f"tolerance={tolerance!r:.60} must be a positive number, such as 1e-4."
            raise ExportError(msg)
        for name in NEEDS[form]:
            library(name)
        self.net, self.tolerance = _on_cpu(net), tolerance
        self.example, self.dynamic_batch = example_input, dynamic_batch

    def run(
        self,
        evaluation: Evaluation | Subnet | None,
        about: Mapping[str, Any] | None,
        writers: list[_Writer],
    ) -> Exported:
        """Write with the first writer whose file holds; with a fixed batch size if none does."""
        for dynamic in (True, False) if self.dynamic_batch else (False,):
            first: ExportError | None = None
            call = Call.of(self.net, self.example, dynamic_batch=dynamic)
            if dynamic and call.batch is None:
                continue  # no input has rows
            fixed = False
            for write in writers:
                try:
                    return self._written(write, call, _described(evaluation, about))
                except ExportError as error:
                    first = first or error
                    fixed = fixed or isinstance(error, FixedBatchError)
            if not fixed:
                break
        assert first is not None
        raise first

    def _written(self, write: _Writer, call: Call, known: dict[str, Any]) -> Exported:
        """Write into a folder of its own, compare, and move what holds to its place."""
        with tempfile.TemporaryDirectory(prefix=".export-", dir=self.path.parent) as folder:
            file = Path(folder) / self.path.name
            try:
                write(self.net, call, call.batch is not None, file)
            except SubnetError:
                raise
            except Exception as error:  # of the runtime's own classes
                msg = f"{self.path} could not be written: {brief(error, 200)}"
                raise ExportError(msg) from error
            parity = compared(file, self.form, self.net, call, self.tolerance)
            files = sorted(Path(folder).iterdir())
            size_mb = sum(f.stat().st_size for f in files) / 1e6
            taken = _ports(call.input_names, [x.shape for x in call.tensors], call)
            metadata = {
                "format": FORMAT,
                "runtime": self.form,
                **known,
                "network": type(self.net).__name__,
                "sliced": getattr(self.net, "sliced", None),
                "inputs": [
                    {**port, "dtype": str(x.dtype).removeprefix("torch.")}
                    for port, x in zip(taken, call.tensors, strict=True)
                ],
                "outputs": _ports(call.output_names, call.output_shapes, call),
                "returns": call.returns,
                "dynamic_batch": call.batch is not None,
                "parity": {
                    "absolute": parity.absolute,
                    "relative": parity.relative,
                    "tolerance": self.tolerance,
                    "batches": [rows(tensors) for tensors in call.batches],
                },
                "size_mb": size_mb,
                "sha256": fingerprint(file),
                "versions": _versions(self.form),
            }
            beside(file).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
            for made in [*files, beside(file)]:
                os.replace(made, self.path.with_name(made.name))
        return Exported(
            self.path, self.form, parity.absolute, call.batch is not None, size_mb,
            MappingProxyType(metadata),
        )  # fmt: skip


def _described(
    evaluation: Evaluation | Subnet | None, about: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return which subnet it is and what is known of it, as JSON-able data."""
    known: dict[str, Any] = {"subnet": None, **(about or {})}
    subnet = evaluation.subnet if isinstance(evaluation, Evaluation) else evaluation
    if subnet is not None:
        known |= {"subnet": subnet.to_json(), "choices": subnet._choices.to_json()}
    if isinstance(evaluation, Evaluation):
        units: Mapping[str, Any] = known.get("measures", {})
        known["evaluation"] = evaluation.number
        known["values"] = {
            name: {
                "value": value,
                "standard_error": evaluation.errors.get(name),
                "unit": units.get(name, {}).get("unit", ""),
            }
            for name, value in evaluation.values.items()
        }
    return known


def _ports(names: Any, shapes: Any, call: Call) -> list[dict[str, Any]]:
    """Return names and sizes, `"batch"` for an open one."""
    return [
        {"name": name, "shape": ["batch", *shape[1:]] if call.in_batch(shape) else [*shape]}
        for name, shape in zip(names, shapes, strict=True)
    ]


def _versions(form: str) -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in ("lightning-subnet", *NEEDS[form]):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a build under another name
            found[name] = str(getattr(library(name), "__version__", "unknown"))
    return found


def _check_path(path: Path, form: str) -> None:
    if path.is_dir():
        msg = f"{path} is a folder. Name a file in it: {path / ('net' + SUFFIXES[form])}."
        raise ExportError(msg)
    if path.suffix.lower() != SUFFIXES[form]:
        named = path.with_suffix(SUFFIXES[form])
        msg = f"{path.name!r} does not end in {SUFFIXES[form]!r}, as {form} files do. "
        raise ExportError(msg + f"Write path={str(named)!r}.")
    if not path.parent.is_dir():
        msg = f"The folder {path.parent} does not exist. Make it first, or name another."
        raise ExportError(msg)
    if not os.access(path.parent, os.W_OK):
        msg = f"The folder {path.parent} cannot be written to. Name another."
        raise ExportError(msg)


def _on_cpu(net: nn.Module) -> nn.Module:
    """Return a network itself, or a copy of it if it is on another device."""
    tensors = [*net.parameters(), *net.buffers()]
    if all(x.device.type == "cpu" for x in tensors):
        return net
    return copy.deepcopy(net).cpu()
