# SPDX-License-Identifier: Apache-2.0
"""Exported files in use: `load_exported` gives a file back as a function of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.errors import ExportError, SubnetError
from lightning_subnet.export.call import brief, named_outputs, restored
from lightning_subnet.export.formats.base import quiet
from lightning_subnet.export.formats.onnx import onnx_session
from lightning_subnet.export.formats.openvino import openvino_compiled
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

FORMAT = "lightning-subnet export 1"
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}


class Deployed:
    """An exported subnet, run by the runtime of its format on the CPU.

    Attributes:
        path: The file.
        format: `"onnx"`, `"torch"` or `"openvino"`.
        metadata: What stands beside the file; empty if there is nothing.

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
        """Which subnet it is; None if the metadata does not tell."""
        if self.metadata.get("subnet") is None:
            return None
        space = SearchSpace.from_json({"choices": self.metadata["choices"]})
        return space.subnet(self.metadata["subnet"])

    @property
    def values(self) -> dict[str, float]:
        """What the search measured of it, by name; the metadata has standard errors and units."""
        measured: dict[str, Any] = self.metadata.get("values", {})
        return {name: float(told["value"]) for name, told in measured.items()}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its arguments, in order."""
        told = [item["name"] for item in self.metadata.get("inputs", ())]
        return tuple(told) if len(told) == len(self._runner.inputs) else self._runner.inputs

    def __call__(self, *args: torch.Tensor, **named: torch.Tensor) -> Any:
        """Run the file.

        Args:
            *args: Tensors (batch, ...), in the order of `inputs`.
            **named: Further ones by name.

        Returns:
            What the network's `forward` returned: a tensor, a tuple or a dict of them, on the CPU.

        Raises:
            ExportError: Other inputs than the network takes.
        """
        given = {**dict(zip(self.inputs, args, strict=False)), **named}
        if len(args) + len(named) != len(self.inputs) or set(given) != set(self.inputs):
            msg = (
                f"{self.path.name} takes {listed(self.inputs)}; given were {len(args)} tensors and "
            )
            raise ExportError(f"{msg}{listed(named)} by name. Pass one tensor for each.")
        try:
            outputs = self._runner.run([given[name] for name in self.inputs])
        except Exception as error:  # of the runtime's own classes
            shapes = ", ".join(f"{tuple(getattr(x, 'shape', ()))}" for x in given.values())
            msg = f"{self.path.name} failed on inputs of {shapes}: {brief(error, 200)} "
            expected = [item["shape"] for item in self.metadata.get("inputs", ())]
            raise ExportError(msg + f"It was exported for {expected or 'others'}.") from error
        told = [item["name"] for item in self.metadata.get("outputs", ())]
        names = told if len(told) == len(outputs) else list(outputs)
        return restored(list(outputs.values()), names, self.metadata.get("returns"))

    def __repr__(self) -> str:
        return f"<Deployed {self.path.name}: {self.subnet or 'no subnet is told'}>"


class Runner(Protocol):
    """A file in its runtime."""

    inputs: tuple[str, ...]

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs by name, of tensors in the order of `inputs`."""


class _Onnx:
    def __init__(self, path: Path, threads: int | None) -> None:
        self._session = onnx_session(str(path), threads=threads)
        self.inputs = tuple(port.name for port in self._session.get_inputs())
        self._outputs = [port.name for port in self._session.get_outputs()]

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        arrays = [x.detach().cpu().numpy() for x in tensors]
        found = self._session.run(self._outputs, dict(zip(self.inputs, arrays, strict=True)))
        return {n: torch.as_tensor(y) for n, y in zip(self._outputs, found, strict=True)}


class _Torch:
    def __init__(self, path: Path, threads: int | None) -> None:
        del threads  # those of torch
        with quiet():
            program = torch.export.load(str(path))
            self._module = program.module()
        self._given: Any = program.example_inputs or ((), {})  # with what is no tensor in its place
        told = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
        flat = [*self._given[0], *self._given[1].values()]
        self.inputs = tuple(told[: sum(isinstance(x, torch.Tensor) for x in flat)])

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        left = iter(tensors)

        def filled(x: Any) -> Any:
            return next(left).detach().cpu() if isinstance(x, torch.Tensor) else x

        args, kwargs = self._given
        with torch.no_grad():
            found = self._module(
                *map(filled, args), **{name: filled(x) for name, x in kwargs.items()}
            )
        return named_outputs(found)


class _OpenVino:
    def __init__(self, path: Path, threads: int | None) -> None:
        self._compiled = openvino_compiled(str(path), threads=threads)
        self.inputs = tuple(port.any_name for port in self._compiled.inputs)
        self._outputs = [port.any_name for port in self._compiled.outputs]

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        arrays = [x.detach().cpu().contiguous().numpy() for x in tensors]
        found = self._compiled(dict(zip(self.inputs, arrays, strict=True)))
        return {
            name: torch.tensor(found[i]) for i, name in enumerate(self._outputs)
        }  # copies: the runtime reuses its memory


_RUNNERS: dict[str, Callable[[Path, int | None], Runner]] = {
    "onnx": _Onnx,
    "torch": _Torch,
    "openvino": _OpenVino,
}


def load_exported(path: str | Path, *, threads: int | None = None) -> Deployed:
    """Load what `export_onnx`, `export_torch` or `export_openvino` wrote.

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
    form = format_of(path)
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob(f"*{path.suffix}")))
        msg = f"There is no file {path}.{near} Write one with export_{form}(net, path, inputs)."
        raise ExportError(msg)
    metadata = _metadata(path)
    if "sha256" in metadata and metadata["sha256"] != fingerprint(path):
        msg = f"{path} is damaged, or another file than was exported: its sha256 has changed. "
        raise ExportError(msg + f"Export it again; or delete {beside(path).name} to load it as is.")
    return Deployed(path, form, metadata, open_runner(path, form, threads))


def format_of(path: Path) -> str:
    """Return the format that a suffix stands for.

    Raises:
        ExportError: Another suffix.
    """
    for form, suffix in SUFFIXES.items():
        if path.suffix.lower() == suffix:
            return form
    msg = f"{path.name!r} has the suffix {path.suffix!r}. Known are "
    raise ExportError(msg + ", ".join(f"{s} ({f})" for f, s in SUFFIXES.items()) + ".")


def open_runner(path: Path, form: str, threads: int | None = None) -> Runner:
    """Return a file in its runtime.

    Raises:
        ExportError: The runtime is not installed or cannot read the file.
    """
    try:
        return _RUNNERS[form](path, threads)
    except SubnetError:
        raise
    except Exception as error:  # of the runtime's own classes
        msg = f"{path} cannot be read as {form}: {brief(error)}"
        raise ExportError(f"{msg}\nThe file is damaged, or of another format.") from error


def beside(path: Path) -> Path:
    """Return where the metadata of a file are."""
    return path.with_name(f"{path.name}.json")


def fingerprint(path: Path) -> str:
    """Return the sha256 of a file, and of the weights beside an OpenVINO model."""
    found = hashlib.sha256(path.read_bytes())
    weights = path.with_suffix(".bin")
    if path.suffix.lower() == SUFFIXES["openvino"] and weights.is_file():
        found.update(weights.read_bytes())
    return found.hexdigest()


def _metadata(path: Path) -> dict[str, Any]:
    file = beside(path)
    if not file.exists():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise KeyError(data["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{file} holds no metadata of an exported subnet ({error!r:.80}). "
        raise ExportError(msg + "Export again; or delete it to load the file as it is.") from error
    return dict(data)
