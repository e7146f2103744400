# SPDX-License-Identifier: Apache-2.0
"""Subnets as files for other runtimes: written, run there, compared, and only then put in place."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lightning_subnet import _json
from lightning_subnet._torch.names import class_name
from lightning_subnet.errors import ExportError, FixedBatchError, SubnetError
from lightning_subnet.export.call import Call, brief, ordinary
from lightning_subnet.export.formats import registry
from lightning_subnet.export.formats.base import Format, Writer
from lightning_subnet.export.loading import METADATA, fingerprint, metadata_path
from lightning_subnet.export.parity import (
    check_extraction,
    checked_tolerance,
    compared,
    rows,
    tolerance_of,
)
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.history import Evaluation


@dataclass(frozen=True)
class Exported:
    """One exported file.

    Args:
        path: The file; its metadata are beside it, in `<path>.json`.
        format: `"onnx"`, `"torch"`, `"openvino"` or another by name.
        parity: The largest absolute difference of its outputs to those of the network; the
            metadata have it, and that of the network to the super-network where it is known.
        dynamic_batch: Whether it takes batches of any size.
        size_mb: Its size on disk, in 10^6 bytes, without the metadata.
        metadata: The data in `<path>.json`.
    """

    path: Path
    format: str
    parity: float
    dynamic_batch: bool
    size_mb: float
    metadata: Mapping[str, Any]


def export(  # noqa: PLR0913 - one call per file: what, where, on which input, and what is known
    net: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    format: str | None = None,
    evaluation: Evaluation | Subnet | None = None,
    about: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
) -> Exported:
    """Write a network as a file that gives the same outputs, or write nothing.

    The file is run by the runtime of its format on the example and, if its batch is dynamic, on
    batches of one row and of one row more. Beside it goes `<path>.json`: subnet, measured values,
    inputs, outputs, differences and versions. `load_exported` reads both.

    Args:
        net: A network: the result of `extract`, or any other. It is exported as in eval mode, from
            a copy on the CPU if it is elsewhere.
        path: A file in a folder that exists. Its suffix decides the format: .onnx, .pt2 for
            `torch.export`, .xml for OpenVINO, whose weights go into a .bin file of the same name.
        example_input: A tensor (batch, ...), a tuple of positional or a dict of keyword arguments.
            Take real data: the outputs are compared on it.
        format: `"onnx"`, `"torch"`, `"openvino"`, or a format of another package, which may share
            its suffix with one of these; None: by the suffix.
        evaluation: The subnet, for the metadata, with its measured values if it is an evaluation.
        about: More for the metadata, JSON-able, by name.
        dynamic_batch: Leave the batch size open. A network that fixes it gets that of the example,
            and the returned record and the metadata say so.
        tolerance: Largest allowed difference of outputs, as a share of the largest absolute output;
            None: what rounding explains, by the coarsest type of weights, inputs and outputs (1e-4
            for float32, 0.008 for float16, 0.06 for bfloat16).

    Returns:
        The file, its size, and how far its outputs are from those of the network.

    Raises:
        FileParityError: An `ExportError` and a `ParityError`: the outputs of the file differ from
            those of the network by more than the tolerance, or those of the network did from the
            super-network's when it was extracted (its attribute `parity`).
        ExportError: The format is unknown or its extra is not installed, the path cannot be
            written, or an operator has no form in the format. Nothing is written then either, and a
            file that was there stays.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export(nn.Linear(3, 2), f"{folder}/net.onnx", torch.randn(4, 3))
        >>> exported.format, exported.parity < 1e-5, exported.dynamic_batch
        ('onnx', True, True)
    """
    path = Path(path)
    form = _format(path, format)
    _check_path(path, form)
    if not isinstance(net, nn.Module):
        msg = f"net={net!r:.60} is not a network. Pass what result.extract(best) returns."
        raise ExportError(msg)
    tolerance = checked_tolerance(tolerance)
    form.check()
    job = _Job(form, _on_cpu(ordinary(net)), path, tolerance, _described(evaluation, about))
    return job.run(example_input, dynamic_batch=dynamic_batch)


def export_onnx(
    net: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    evaluation: Evaluation | Subnet | None = None,
    about: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
) -> Exported:
    """Write a network as an ONNX file (.onnx), or write nothing: `export` with `format="onnx"`."""
    return export(
        net, path, example_input, format="onnx", evaluation=evaluation, about=about,
        dynamic_batch=dynamic_batch, tolerance=tolerance,
    )  # fmt: skip


def export_torch(
    net: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    evaluation: Evaluation | Subnet | None = None,
    about: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
) -> Exported:
    """Write a network as a `torch.export` file (.pt2), or write nothing: `export` with `"torch"`.

    It needs torch alone, and `torch.export.load(path).module()` has the signature of the network.
    """
    return export(
        net, path, example_input, format="torch", evaluation=evaluation, about=about,
        dynamic_batch=dynamic_batch, tolerance=tolerance,
    )  # fmt: skip


def export_openvino(
    net: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    evaluation: Evaluation | Subnet | None = None,
    about: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
) -> Exported:
    """Write a network as an OpenVINO model (.xml), or write nothing: `export` with `"openvino"`.

    The weights keep their precision; they go into a .bin file of the same name.
    """
    return export(
        net, path, example_input, format="openvino", evaluation=evaluation, about=about,
        dynamic_batch=dynamic_batch, tolerance=tolerance,
    )  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """One export, whose request has been checked.

    Args:
        form: The format.
        net: The network on the CPU.
        path: Where the file goes.
        tolerance: Largest allowed difference of outputs, as a share of the largest; None: what
            rounding explains.
        facts: What is known of the subnet, for the metadata.
    """

    form: Format
    net: nn.Module
    path: Path
    tolerance: float | None
    facts: Mapping[str, Any]

    def run(self, example_input: Any, *, dynamic_batch: bool) -> Exported:
        """Write with the first writer whose file holds; with a fixed batch size if none does."""
        for dynamic in (True, False) if dynamic_batch else (False,):
            call = Call.of(self.net, example_input, dynamic_batch=dynamic)
            if dynamic and call.batch is None:
                continue  # no input has rows
            tolerance = self.tolerance or tolerance_of(self.net, call)
            extraction = check_extraction(self.net, call, tolerance)
            first: ExportError | None = None
            fixed = False
            for write in self.form.writers():
                try:
                    return self._file_of(write, call, tolerance, extraction)
                except ExportError as error:
                    first = first or error
                    fixed = fixed or isinstance(error, FixedBatchError)
            if not fixed:
                break
        assert first is not None
        raise first

    def _file_of(
        self, write: Writer, call: Call, tolerance: float, extraction: float | None
    ) -> Exported:
        """Write into a new folder, compare, and move what holds to its place."""
        with tempfile.TemporaryDirectory(prefix=".export-", dir=self.path.parent) as folder:
            file = Path(folder) / self.path.name
            try:
                write(self.net, call, file)
            except SubnetError:
                raise
            except Exception as error:  # of the runtime's own classes
                msg = f"{self.path} could not be written: {brief(error, 200)}"
                raise ExportError(msg) from error
            parity = compared(file, self.form, self.net, call, tolerance)
            files = sorted(Path(folder).iterdir())
            size_mb = sum(f.stat().st_size for f in files) / 1e6
            inputs = _ports(call.input_names, [x.shape for x in call.tensors], call)
            metadata = {
                "format": METADATA,
                "runtime": self.form.name,
                **self.facts,
                "network": class_name(self.net),
                "sliced": getattr(self.net, "sliced", None),
                "inputs": [
                    {**port, "dtype": str(x.dtype).removeprefix("torch.")}
                    for port, x in zip(inputs, call.tensors, strict=True)
                ],
                "outputs": _ports(call.output_names, call.output_shapes, call),
                "returns": call.returns,
                "dynamic_batch": call.batch is not None,
                "parity": {
                    "absolute": parity.absolute,
                    "relative": parity.relative,
                    "tolerance": tolerance,
                    "batches": [rows(tensors) for tensors in call.batches],
                    "extraction": extraction,
                },
                "size_mb": size_mb,
                "sha256": fingerprint(self.form.files(file)),
                "versions": _versions(self.form),
            }
            _json.write(metadata_path(file), metadata)
            for each in [*files, metadata_path(file)]:
                os.replace(each, self.path.with_name(each.name))
        return Exported(
            self.path, self.form.name, parity.absolute, call.batch is not None, size_mb,
            MappingProxyType(metadata),
        )  # fmt: skip


def _described(
    evaluation: Evaluation | Subnet | None, about: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the subnet and its measured values, as JSON-able data."""
    facts: dict[str, Any] = {"subnet": None, **(about or {})}
    subnet = evaluation.subnet if isinstance(evaluation, Evaluation) else evaluation
    if subnet is not None:
        choices = {name: choice.to_json() for name, choice in subnet.choices.items()}
        facts |= {"subnet": subnet.to_json(), "choices": choices}
    if isinstance(evaluation, Evaluation):
        units: Mapping[str, Any] = facts.get("measures", {})
        facts["evaluation"] = evaluation.number
        facts["values"] = {
            name: {
                "value": value,
                "standard_error": evaluation.errors.get(name),
                "unit": units.get(name, {}).get("unit", ""),
            }
            for name, value in evaluation.values.items()
        }
    return facts


def _ports(names: Any, shapes: Any, call: Call) -> list[dict[str, Any]]:
    """Return names and sizes, `"batch"` for an open one."""
    return [
        {"name": name, "shape": ["batch", *shape[1:]] if call.in_batch(shape) else [*shape]}
        for name, shape in zip(names, shapes, strict=True)
    ]


def _versions(form: Format) -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for name in ("lightning-subnet", *form.libraries):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a build under another name
            module = form.libraries[name]() if name in form.libraries else None
            versions[name] = str(getattr(module, "__version__", "unknown"))
    return versions


def _format(path: Path, name: str | None) -> Format:
    """Return the format of a name or, without one, of a suffix; refuse a folder."""
    if path.is_dir():
        file = path / f"net{registry.make(name or 'onnx').suffix}"
        raise ExportError(f"{path} is a folder. Name a file in it: {file}.")
    return registry.of_path(path) if name is None else registry.make(name)


def _check_path(path: Path, form: Format) -> None:
    if path.suffix.lower() != form.suffix:
        msg = f"{path.name!r} does not end in {form.suffix!r}, as {form.name} files do. "
        raise ExportError(msg + f"Write path={str(path.with_suffix(form.suffix))!r}.")
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
