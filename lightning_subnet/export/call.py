# SPDX-License-Identifier: Apache-2.0
"""One call of a network: which tensors go in and come out, under which names, and which batch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_subnet._torch.contexts import evaluating, ordinary_tensors
from lightning_subnet._torch.inputs import arguments
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.outputs import named_outputs
from lightning_subnet.errors import ExportError

Returns = Literal["tensor", "tuple", "dict"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """One call of a network: its arguments, and what goes in and comes out by name.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        batch: Rows of the batch; None if all sizes are fixed.
        input_names: One for each tensor among the arguments, in their order.
        output_names: One for each tensor that comes out.
        output_shapes: Their sizes for these inputs.
        returns: The kind of output of `forward`: one tensor, a tuple of them, or a dict by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int | None
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    returns: Returns

    @classmethod
    def of(cls, net: nn.Module, inputs: Any, *, dynamic_batch: bool = True) -> Call:
        """Return the call of a network, which is run once.

        Raises:
            ExportError: The network does not take the inputs, they hold no batch, or no tensor
                comes out.
        """
        args, kwargs = _copies(*arguments(net, inputs))
        named = {**dict(zip(_parameters(net, len(args)), args, strict=True)), **kwargs}
        tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
        if not tensors or any(x.ndim and not len(x) for x in tensors.values()):
            msg = f"{_shapes(named)} is not a batch. Give the inputs as a tensor or a tuple of "
            raise ExportError(f"{msg}tensors (batch, ...), or a dict of them by argument.")
        for name, x in named.items():
            if isinstance(x, (list, tuple, dict)) or (name not in tensors and named_outputs(x)):
                msg = f"Input {name!r} is a {type(x).__name__}; only tensors have a place in a file"
                raise ExportError(f"{msg}. Wrap the network so that each is an argument.")
        rows = len(next(iter(tensors.values()))) if next(iter(tensors.values())).ndim else 0
        batch = rows if dynamic_batch and rows else None
        if batch == 1:  # which would be taken for a constant
            args = tuple(_repeated(x, 2) for x in args)
            kwargs = {name: _repeated(x, 2) for name, x in kwargs.items()}
            batch = 2
        try:
            with ordinary_tensors(), evaluating(net), torch.no_grad():
                copied = _copies(args, kwargs)
                output = net(*copied[0], **copied[1])
        except Exception as error:
            reason = brief(error).rstrip(".")
            msg = f"{class_name(net)} failed on inputs {_shapes(named)}: {reason}. "
            raise ExportError(msg + "Give an example input that forward() takes.") from error
        outputs = named_outputs(output)
        if not outputs:
            msg = f"{class_name(net)} returns no tensor, but {type(output).__name__}. "
            raise ExportError(msg + "Wrap it so that forward() returns tensors.")
        return cls(
            args, kwargs, batch, tuple(tensors),
            tuple(f"{name}_output" if name in tensors else name for name in outputs),
            tuple(tuple(x.shape) for x in outputs.values()),
            _kind(output),
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Copies of the tensors among the arguments, as a network may work on them in place."""
        args, kwargs = _copies(self.args, self.kwargs)
        return tuple(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))

    def in_batch(self, shape: torch.Size | tuple[int, ...]) -> bool:
        """Return whether dimension 0 of a tensor counts the samples of a dynamic batch."""
        return self.batch is not None and len(shape) > 0 and shape[0] == self.batch

    @property
    def batches(self) -> list[tuple[torch.Tensor, ...]]:
        """The tensors, then those of other batch sizes, to compare a file and the network on."""
        if self.batch is None:
            return [self.tensors]
        first = tuple(x[:1] if self.in_batch(x.shape) else x for x in self.tensors)
        return [self.tensors, self.longer(), first]

    def longer(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors with a batch of one row more, a row like the others."""
        return tuple(
            torch.cat([x, x[:1].flatten().roll(1).reshape(x[:1].shape)])
            if self.in_batch(x.shape)
            else x
            for x in self.tensors
        )

    def dynamic_shapes(self, net: nn.Module) -> Any:
        """Return the sizes of a network's arguments in the words of `torch.export`."""
        if self.batch is None:
            return None
        spec = self._spec()
        parameters = inspect.signature(net.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in _POSITIONAL]
        shapes: dict[str, Any] = dict(zip(names, map(spec, self.args), strict=False))
        for p in parameters:
            if p.kind is p.VAR_POSITIONAL and len(self.args) > len(names):
                shapes[p.name] = tuple(map(spec, self.args[len(names) :]))
        return {**shapes, **{name: spec(x) for name, x in self.kwargs.items()}}

    def flat_shapes(self) -> Any:
        """Return the sizes of the tensors of `Flat` in the words of `torch.export`."""
        return None if self.batch is None else {"tensors": tuple(map(self._spec(), self.tensors))}

    def _spec(self) -> Callable[[Any], dict[int, Any] | None]:
        rows = torch.export.Dim("batch")

        def spec(x: Any) -> dict[int, Any] | None:
            if not isinstance(x, torch.Tensor):
                return None
            return {0: rows} if self.in_batch(x.shape) else {}

        return spec


def restored(
    tensors: Sequence[torch.Tensor], names: Sequence[str], returns: Returns | None = None
) -> Any:
    """Return the tensors of a file in the form in which the network returns them.

    Args:
        tensors: The outputs of the file.
        names: Their names.
        returns: The kind of output of `forward`; None: as the names look.
    """
    if returns is None:
        several: Returns = "tuple" if all(n.startswith("output_") for n in names) else "dict"
        returns = "tensor" if len(names) == 1 and several == "dict" else several
    if returns == "tensor":
        return tensors[0]
    return tuple(tensors) if returns == "tuple" else dict(zip(names, tensors, strict=True))


def _kind(output: Any) -> Returns:
    if isinstance(output, torch.Tensor):
        return "tensor"
    flat = isinstance(output, (tuple, list)) and all(isinstance(x, torch.Tensor) for x in output)
    return "tuple" if flat else "dict"


class Flat(nn.Module):
    """A network as a function of tensors that returns a tuple of tensors."""

    def __init__(self, net: nn.Module, call: Call) -> None:
        super().__init__()
        self.net, self._call = net, call

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the network."""
        rest = iter(tensors)
        args = [next(rest) if isinstance(x, torch.Tensor) else x for x in self._call.args]
        kwargs = {
            name: next(rest) if isinstance(x, torch.Tensor) else x
            for name, x in self._call.kwargs.items()
        }
        return tuple(named_outputs(self.net(*args, **kwargs)).values())


def _parameters(net: nn.Module, n: int) -> list[str]:
    """Return the names of the first n positional arguments of `forward`."""
    names = [
        p.name for p in inspect.signature(net.forward).parameters.values() if p.kind in _POSITIONAL
    ]
    return [*names[:n], *(f"input_{i}" for i in range(len(names), n))]


def _copies(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with copies of their tensors."""
    copied = [x.clone() if isinstance(x, torch.Tensor) else x for x in (*args, *kwargs.values())]
    return tuple(copied[: len(args)]), dict(zip(kwargs, copied[len(args) :], strict=True))


def ordinary(net: nn.Module) -> nn.Module:
    """Return a network itself, or a copy of it if its tensors were made in an inference mode.

    Exporters do not take those.

    Example:
        >>> with torch.inference_mode():
        ...     net = nn.Linear(2, 2)
        >>> ordinary(net).weight.is_inference()
        False
    """
    if not any(x.is_inference() for x in (*net.parameters(), *net.buffers())):
        return net
    with ordinary_tensors():
        return copy.deepcopy(net)


def _repeated(x: Any, rows: int) -> Any:
    """Return an argument, repeated to this number of rows if it is a tensor of one row."""
    one = isinstance(x, torch.Tensor) and x.ndim and len(x) == 1
    return x.repeat_interleave(rows, 0) if one else x


def _shapes(named: Mapping[str, Any]) -> str:
    parts = (
        f"{n} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"{n}={x!r:.30}"
        for n, x in named.items()
    )
    return ", ".join(parts)


def brief(error: BaseException, length: int = 150) -> str:
    """Return the text of an error as the start of one line."""
    return " ".join(str(error).split())[:length]
