# SPDX-License-Identifier: Apache-2.0
"""Exported files in use: `load_exported` gives a file back as a function of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lightning_subnet import _json
from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.errors import ExportError
from lightning_subnet.export.call import brief, restored
from lightning_subnet.export.formats.base import Runner
from lightning_subnet.export.formats.registry import of_path
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

METADATA = "lightning-subnet export 1"
"""The form of the metadata."""


class Deployed:
    """An exported subnet, run by the runtime of its format on the CPU.

    Attributes:
        path: The file.
        format: `"onnx"`, `"torch"`, `"openvino"` or another by name.
        metadata: The data beside the file; empty if there are none.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_subnet.export import export_torch, load_exported
        >>> with TemporaryDirectory() as folder:
        ...     exported = export_torch(torch.nn.Linear(3, 2), f"{folder}/net.pt2",
        ...                             torch.zeros(1, 3))
        ...     net = load_exported(exported.path)
        >>> net(torch.zeros(5, 3)).shape, net.subnet
        (torch.Size([5, 2]), None)
    """

    def __init__(self, path: Path, form: str, metadata: Mapping[str, Any], runner: Runner) -> None:
        self.path = path
        self.format = form
        self.metadata = MappingProxyType(dict(metadata))
        self._runner = runner

    @property
    def subnet(self) -> Subnet | None:
        """The subnet in the file; None if the metadata do not tell."""
        if self.metadata.get("subnet") is None:
            return None
        space = SearchSpace.from_json({"choices": self.metadata["choices"]})
        return space.subnet(self.metadata["subnet"])

    @property
    def values(self) -> dict[str, float]:
        """The measured values by name; the metadata have their standard errors and units."""
        values: dict[str, Any] = self.metadata.get("values", {})
        return {name: float(entry["value"]) for name, entry in values.items()}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its arguments, in order."""
        names = self._names("inputs")
        return tuple(names) if len(names) == len(self._runner.inputs) else self._runner.inputs

    def __call__(self, *args: torch.Tensor, **named: torch.Tensor) -> Any:
        """Run the file.

        Args:
            *args: Tensors (batch, ...), in the order of `inputs`.
            **named: Further ones by name.

        Returns:
            Outputs on the CPU, as `forward` returns them: a tensor, a tuple or a dict of tensors.

        Raises:
            ExportError: Other inputs than the network takes.
        """
        tensors = {**dict(zip(self.inputs, args, strict=False)), **named}
        if len(args) + len(named) != len(self.inputs) or set(tensors) != set(self.inputs):
            msg = f"{self.path.name} takes {listed(self.inputs)}, and got {len(args)} tensors and "
            raise ExportError(f"{msg}{listed(named)} by name. Pass one tensor for each.")
        try:
            outputs = self._runner.run([tensors[name] for name in self.inputs])
        except Exception as error:  # of the runtime's own classes
            shapes = ", ".join(f"{tuple(getattr(x, 'shape', ()))}" for x in tensors.values())
            msg = f"{self.path.name} failed on inputs of {shapes}: {brief(error, 200)} "
            expected = [item["shape"] for item in self.metadata.get("inputs", ())]
            raise ExportError(msg + f"It was exported for {expected or 'others'}.") from error
        names = self._names("outputs")
        if len(names) != len(outputs):
            names = list(outputs)
        return restored(list(outputs.values()), names, self.metadata.get("returns"))

    def __repr__(self) -> str:
        return f"<Deployed {self.path.name}: {self.subnet or 'unknown subnet'}>"

    def _names(self, ports: str) -> list[str]:
        """Return the names of inputs or outputs that the metadata have; none without metadata."""
        return [port["name"] for port in self.metadata.get(ports, ())]


def load_exported(path: str | Path, *, threads: int | None = None) -> Deployed:
    """Load a file that `export` wrote.

    Args:
        path: An .onnx, .pt2 or .xml file. Without the metadata beside it (`<path>.json`) it is
            loaded too, and does not know its subnet.
        threads: Threads of one inference, for ONNX Runtime and OpenVINO; None: as they have it.

    Returns:
        A function of tensors, with `subnet`, `values` and `metadata`.

    Raises:
        ExportError: No such file, another suffix, a damaged file or metadata of another one, or the
            extra of the runtime is not installed.
    """
    path = Path(path)
    form = of_path(path)
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob(f"*{path.suffix}")))
        msg = f"There is no file {path}.{near} Write one with export(net, path, inputs)."
        raise ExportError(msg)
    file = metadata_path(path)
    metadata: dict[str, Any] = {}
    if file.exists():
        hint = "Export again; or delete it to load the file as it is."
        what = "metadata of an exported subnet"
        metadata = _json.read(file, METADATA, what, error=ExportError, hint=hint)
        form = of_path(path, metadata.get("runtime"))
    if "sha256" in metadata and metadata["sha256"] != fingerprint(form.files(path)):
        msg = f"{path} is damaged, or another file than was exported: its sha256 has changed. "
        raise ExportError(msg + f"Export it again; or delete {file.name} to load it as is.")
    return Deployed(path, form.name, metadata, form.open(path, threads))


def metadata_path(path: Path) -> Path:
    """Return the path of the metadata of a file, beside it."""
    return path.with_name(f"{path.name}.json")


def fingerprint(files: Iterable[Path]) -> str:
    """Return the sha256 of the files of a model, one after the other."""
    sha256 = hashlib.sha256()
    for file in files:
        sha256.update(file.read_bytes())
    return sha256.hexdigest()
