# SPDX-License-Identifier: Apache-2.0
"""Format: a kind of file for networks, and what the formats share: silence, libraries, refusals."""

from __future__ import annotations

import io
import logging
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from lightning_subnet._torch.contexts import plain_attention
from lightning_subnet._torch.names import class_name
from lightning_subnet.errors import ExportError, FixedBatchError, SubnetError
from lightning_subnet.export.call import Call, brief

Writer = Callable[[nn.Module, Call, Path], None]
"""Writes a network, as it is called, into a file."""

_UNSUPPORTED = re.compile(
    r"Exporting the operator '([^']+)'|No ONNX function found for <OpOverload\(op='([^']+)'"
    r"|No conversion rule found for operations: ([\w:.]+)|Unsupported operator[: ]+'?([\w:.]+)"
)


class Runner(Protocol):
    """A file in its runtime, on the CPU."""

    inputs: tuple[str, ...]

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs by name, of tensors in the order of `inputs`."""


class Format(ABC):
    """A kind of file for networks: how one is written, and run where it is shipped.

    Each is a class in a file beside this one, with a line in the table of `registry.py`. Another
    package offers one by an entry point of the group `lightning_subnet.formats`.

    Attributes:
        name: What users call it; the metadata of its files name it.
        title: What messages call it.
        suffix: The last suffix of its files: lower case, with the dot.
        libraries: The optional libraries that it needs, by the names under which they are
            installed, and functions that import them (see `optional`).
        weights: The suffix of the second file of a model, `""` if there is none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffix: ClassVar[str]
    libraries: ClassVar[Mapping[str, Callable[[], Any]]] = MappingProxyType({})
    weights: ClassVar[str] = ""

    @abstractmethod
    def writers(self) -> Sequence[Writer]:
        """Return the ways to write a file, of which the first is taken whose file holds.

        A writer leaves the batch size open where `call.batch` is not None: the outputs of the file
        then grow with its inputs, which is tried before the file is kept, and a file that cannot
        is a `FixedBatchError`. It raises an `ExportError` for a network that it cannot write; see
        `refusal`.
        """

    @abstractmethod
    def load(self, path: Path, threads: int | None) -> Runner:
        """Return a file in its runtime, with this number of threads; None: as the runtime has it.

        The runner names outputs as `call.output_names` did, and refuses inputs of another size
        than a file of fixed size takes. Errors of the runtime's own classes may pass.
        """

    @abstractmethod
    def snippet(self, file: str, inputs: Sequence[str]) -> str:
        """Return Python code that runs a file without this package.

        Args:
            file: The name of the file.
            inputs: The names of its inputs, which are variables of the code too.
        """

    def open(self, path: Path, threads: int | None = None) -> Runner:
        """Return a file in its runtime.

        Raises:
            ExportError: The runtime is not installed, or cannot read the file.
        """
        try:
            return self.load(path, threads)
        except SubnetError:
            raise
        except Exception as error:  # of the runtime's own classes
            msg = f"{path} cannot be read as {self.name}: {brief(error)}"
            raise ExportError(f"{msg}\nThe file is damaged, or of another format.") from error

    def check(self) -> None:
        """Raise an `ExportError` if a library is not installed."""
        for import_library in self.libraries.values():
            import_library()

    def files(self, path: Path) -> list[Path]:
        """Return the files of the model at a path: `path`, and its weights if they are there."""
        weights = path.with_suffix(self.weights) if self.weights else path
        return [path, weights] if weights != path and weights.is_file() else [path]


@contextmanager
def optional(library: str, requirement: str) -> Iterator[None]:
    """Import an optional library inside, in silence; say how to install it if it is missing.

    Args:
        library: Its name.
        requirement: What pip installs it by: `"lightning-subnet[onnx]"`.

    Raises:
        ExportError: It is not installed.

    Example:
        >>> with optional("tflite", "lightning-subnet[tflite]"):
        ...     import tflite
        Traceback (most recent call last):
        lightning_subnet.errors.ExportError: This needs tflite: pip install \
'lightning-subnet[tflite]'. (No module named 'tflite')
    """
    try:
        with quiet():
            yield
    except ImportError as error:
        msg = f"This needs {library}: pip install '{requirement}'. ({brief(error, 80)})"
        raise ExportError(msg) from error


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep away the warnings and log lines of exporters, and give attention its plain form.

    Args:
        *loggers: Loggers with levels of their own, beside the root and that of torch.
    """
    levels = {name: logging.getLogger(name).level for name in ("root", "torch", *loggers)}
    native: Any = torch._C
    printing = getattr(native, "_jit_onnx_log", None)
    silent = logging.NullHandler()  # without one, the root logger would get a lasting one
    logging.getLogger().addHandler(silent)
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if printing is not None:  # the graph, on stdout; its switch is turned on by each export
            native._jit_onnx_log = lambda *_: None
        # No exporter knows the operators of attention's fast path.
        with plain_attention(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # torch.export prints the graph of what it refuses
            yield
    finally:
        if printing is not None:
            native._jit_onnx_log = printing
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger().removeHandler(silent)


def refusal(net: nn.Module, title: str, call: Call, reasons: Sequence[Exception]) -> ExportError:
    """Return the error of a network that cannot be converted.

    Args:
        net: The network.
        title: Of the format.
        call: How the network is called.
        reasons: What each way of converting it raised; a `FixedBatchError` where the result does
            not take another batch size.

    Returns:
        An error that names an operator without a form; a `FixedBatchError` if the last way failed
        by the batch size alone.
    """
    texts = [str(reason) for reason in reasons]
    unknown = [next(filter(None, m.groups())) for t in texts if (m := _UNSUPPORTED.search(t))]
    if unknown:
        msg = f"{class_name(net)} uses the operator {unknown[0]!r}, which has no {title} form. "
        return ExportError(msg + "Replace it in the network, or export to another format.")
    fixed = isinstance(reasons[-1], FixedBatchError) or "Constraints violated" in texts[-1]
    if call.batch is not None and fixed:
        msg = (
            f"{class_name(net)} cannot be converted to {title}, as it fixes the size of its "
            "batch. Pass dynamic_batch=False, or change its use of that size."
        )
        return FixedBatchError(msg)
    lines = texts[-1].splitlines() or [type(reasons[-1]).__name__]
    msg = f"{class_name(net)} cannot be converted to {title}: {lines[0]:.200}"
    return ExportError(f"{msg.rstrip('.')}. Change that part, or export to another format.")


def check_types(net: nn.Module, title: str, call: Call) -> None:
    """Raise if a network computes in bfloat16, which NumPy does not have, nor a runtime by it.

    Args:
        net: The network.
        title: Of a format whose runtime takes and gives arrays of NumPy.
        call: How the network is called.

    Raises:
        ExportError: It has weights, or gets inputs, of bfloat16.
    """
    tensors = (*net.parameters(), *net.buffers(), *call.tensors)
    if any(x.dtype == torch.bfloat16 for x in tensors):
        msg = f"{class_name(net)} is of bfloat16, which {title} files do not take here. Pass "
        raise ExportError(f"{msg}net.half() or net.float(), or write a .pt2 file.")


def dict_code(names: Iterable[str]) -> str:
    """Return the code of a dict of variables by their names.

    Example:
        >>> dict_code(["x", "mask"])
        '{"x": x, "mask": mask}'
    """
    items = ", ".join(f'"{name}": {name}' for name in names)
    return f"{{{items}}}"
