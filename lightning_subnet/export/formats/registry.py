# SPDX-License-Identifier: Apache-2.0
"""Formats by name and by suffix; a new one is a file beside this and a line in the table."""

from __future__ import annotations

from pathlib import Path

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._registry import Registry
from lightning_subnet.errors import ExportError, PluginError
from lightning_subnet.export.formats.base import Format

FORMATS = Registry(
    "format",
    "lightning_subnet.formats",
    {
        "onnx": "lightning_subnet.export.formats.onnx:Onnx",
        "torch": "lightning_subnet.export.formats.torch_export:TorchExport",
        "openvino": "lightning_subnet.export.formats.openvino:OpenVino",
    },
)


def names() -> list[str]:
    """Return the names that `make` takes."""
    return FORMATS.names()


def make(name: str) -> Format:
    """Return a format by name.

    Raises:
        ExportError: The name is unknown.
        PluginError: The name is of another package, which cannot be imported or offers something
            else.

    Example:
        >>> make("openvino").suffix
        '.xml'
    """
    if not isinstance(name, str) or name not in FORMATS:
        msg = f"{name!r} is not a format.{did_you_mean(name, names())} Known are {listed(names())}."
        raise ExportError(msg)
    form: Format = FORMATS.subclass(name, Format)()
    return form


def of_path(path: Path, name: object = None) -> Format:
    """Return the format of a file, by its suffix.

    Args:
        path: The file, which need not exist.
        name: The format that wrote it, if it is known: two formats may share a suffix. One that is
            not installed, or has another suffix, does not count.

    Raises:
        ExportError: No format has this suffix.

    Example:
        >>> of_path(Path("net.PT2")).name
        'torch'
        >>> of_path(Path("a.onx"))
        Traceback (most recent call last):
        lightning_subnet.errors.ExportError: 'a.onx' has the suffix '.onx'. Did you mean ...
    """
    first = [name] if isinstance(name, str) and name in FORMATS else []
    suffix, suffixes, broken = path.suffix.lower(), {}, None
    for other in [*first, *names()]:
        try:
            form = make(other)
        except PluginError as error:  # of a package that may have nothing to do with this file
            broken = error
            continue
        if form.suffix == suffix:
            return form
        suffixes[other] = form.suffix
    if broken is not None:
        raise broken
    start = f"the suffix {path.suffix!r}" if suffix else "no suffix"
    msg = f"{path.name!r} has {start}.{did_you_mean(suffix, suffixes.values())} Known are "
    raise ExportError(msg + ", ".join(f"{s} ({n})" for n, s in suffixes.items()) + ".")
