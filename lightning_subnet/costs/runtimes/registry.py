# SPDX-License-Identifier: Apache-2.0
"""Runtimes by name; a new one is a file beside this and a line in the table."""

from __future__ import annotations

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._registry import Registry
from lightning_subnet.costs.runtimes.base import Runtime
from lightning_subnet.errors import ObjectiveError

RUNTIMES = Registry(
    "runtime",
    "lightning_subnet.runtimes",
    {
        "eager": "lightning_subnet.costs.runtimes.torch:Eager",
        "compile": "lightning_subnet.costs.runtimes.torch:Compile",
        "onnxruntime": "lightning_subnet.costs.runtimes.onnxruntime:OnnxRuntime",
        "openvino": "lightning_subnet.costs.runtimes.openvino:OpenVino",
    },
)


def names() -> list[str]:
    """Return the names that `make` takes."""
    return RUNTIMES.names()


def make(name: str) -> Runtime:
    """Return a runtime by name.

    Raises:
        ObjectiveError: The name is unknown.
        PluginError: The name is of another package, which cannot be imported or offers something
            else.

    Example:
        >>> make("eager").accept("bf16")
        'bf16-mixed'
    """
    if not isinstance(name, str) or name not in RUNTIMES:
        msg = f"runtime={name!r} is unknown.{did_you_mean(name, names())} "
        raise ObjectiveError(f"{msg}It is one of: {listed(names())}.")
    runtime: Runtime = RUNTIMES.subclass(name, Runtime)()
    return runtime
