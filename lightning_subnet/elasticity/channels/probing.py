# SPDX-License-Identifier: Apache-2.0
"""Passes of a network with taint: several probes at once, as rows of a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from lightning_subnet._torch.contexts import (
    evaluating,
    plain_attention,
    random_state,
    same_buffers,
    shadowed,
)
from lightning_subnet._torch.inputs import arguments, cloned
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.channels.operators import (
    DecisionError,
    Operator,
    OtherOperatorsError,
    Pass,
    Taint,
    is_channelwise,
)
from lightning_subnet.elasticity.channels.readers import Scale
from lightning_subnet.elasticity.channels.results import results
from lightning_subnet.errors import ElasticityError

_ROWS = 128  # of a batch of probes, where they fit
_MEMORY = 2**28  # bytes of the largest output in such a batch

Probe = tuple[int, torch.Tensor]
"""An operator and those of its output channels that are NaN."""


@dataclass(frozen=True)
class Nature:
    """How a module whose weights are vectors works on its input.

    Attributes:
        dim: The dimension that channels are, from the end.
        over_channels: Whether it normalises over the channels.
    """

    dim: int
    over_channels: bool


class Prober:
    """Runs a network with taint.

    Args:
        net: The network, which is run in eval mode and is left as it was.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.
        computed: Parameters of normalisations that work inside of units: they are computed.

    Attributes:
        operators: The operators of a pass, in order.
        names: By id, the names of parameters and of buffers of floating point.
        tensors: These by name.
        free: Those that went into operators that mix and scale no channels.
        passes: Number of passes so far.

    Raises:
        ElasticityError: The network does not take the input, or does not run alike twice.
    """

    def __init__(
        self, net: nn.Module, example_input: Any, computed: frozenset[str] = frozenset()
    ) -> None:
        self.net, self.computed = net, computed
        self.args, self.kwargs = arguments(net, example_input)
        if any(torch.is_tensor(x) and x.ndim and not len(x) for x in tree_leaves(self.args)):
            msg = "The example input has no rows. Pass one with at least one sample."
            raise ElasticityError(msg)
        self.tensors: dict[str, torch.Tensor] = dict(net.named_parameters())
        self.tensors |= {n: b for n, b in net.named_buffers() if b.is_floating_point()}
        self.names = {id(t): n for n, t in self.tensors.items()}
        self.passes, self.rows = 0, 1
        self._layouts: dict[int, tuple[int | None, int | None]] = {}
        self._natures = self._look_at_modules()
        self.operators: list[Operator] = []
        first = self._forward(self.args, self.kwargs, {}, 1)
        self.operators, self.free = first.operators, first.free
        if any(x.any() for x in first.taint.inputs.values()) or first.taint.outputs.any():
            msg = (
                f"{class_name(net)} gives NaN where its layers give ones, so its channels "
                "cannot be told apart."
            )
            raise ElasticityError(msg)
        self._look_for_the_batch()

    def probe(self, rows: list[list[Probe]]) -> list[Taint]:
        """Return where the taint of each row arrives.

        Args:
            rows: What is probed in each.
        """
        taints: dict[int, Taint] = {}
        batched = [r for r, row in enumerate(rows) if self._has_batch(row)]
        for start in range(0, len(batched), self.rows):
            part = batched[start : start + self.rows]
            probes: dict[int, list[tuple[int | None, torch.Tensor]]] = defaultdict(list)
            for place, r in enumerate(part):
                for i, channels in rows[r]:
                    probes[i].append((place, channels))
            n = max(len(part), 2)
            taint = self._run(*self._batch(n), probes, n)
            for place, r in enumerate(part):
                taints[r] = taint.row(place)
        for r in set(range(len(rows))) - set(batched):
            taints[r] = self._run(
                self.args, self.kwargs, {i: [(None, channels)] for i, channels in rows[r]}, 1
            ).row(0)
        return [taints[r] for r in range(len(rows))]

    def probe_tensor(self, name: str, dim: int, indices: torch.Tensor) -> Taint:
        """Return where the taint of entries of a parameter or buffer arrives.

        Args:
            name: The tensor.
            dim: One of its dimensions.
            indices: Its indices that are NaN.
        """
        tensor = self.tensors[name]
        with torch.no_grad():
            before = tensor.detach().clone()
            try:
                tensor.data.index_fill_(dim, indices.to(tensor.device), float("nan"))
                return self._run(self.args, self.kwargs, {}, 1).row(0)
            finally:
                tensor.data.copy_(before)

    def stop_batching(self) -> None:
        """Probe one row at a time from now on."""
        self.rows = 1

    # Passes

    def _run(self, args: Any, kwargs: Any, probes: Any, rows: int) -> Taint:
        run = self._forward(args, kwargs, probes, rows)
        if len(run.operators) != len(self.operators):
            raise self._other_operators()
        return run.taint

    def _other_operators(self) -> ElasticityError:
        msg = (
            f"{class_name(self.net)} runs other operators from one pass to the next on the "
            "same input, so what belongs together cannot be told. Its forward() must not depend "
            "on the values of the data, nor draw at random."
        )
        return ElasticityError(msg)

    def _forward(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        probes: Mapping[int, list[tuple[int | None, torch.Tensor]]],
        rows: int,
    ) -> Pass:
        self.passes += 1
        run = Pass(self.names, probes, rows, self._layouts, self.computed, self.operators)
        try:
            with ExitStack() as stack:
                for context in (*self._contexts(), self._channelwise(run), run):
                    stack.enter_context(context)
                output = self.net(*cloned(args), **cloned(kwargs))
        except OtherOperatorsError:
            raise self._other_operators() from None
        except DecisionError as error:
            msg = (
                f"The forward() of {class_name(self.net)} decides by values that its layers "
                "give (an `if`, bool(), int() or .item() of them), so that what belongs together "
                "is not the same for all inputs. Write it with torch.where, or elasticize a part "
                "that does not decide."
            )
            raise ElasticityError(msg) from error
        except Exception as error:
            raise self._failure(error) from error
        run.taint.outputs = _tainted(output, rows)
        return run

    def _failure(self, error: Exception) -> ElasticityError:
        if isinstance(error, ElasticityError):
            return error
        msg = (
            f"{class_name(self.net)} failed on the example input: {type(error).__name__}: "
            f"{error!s:.200}. Pass an input that forward() takes."
        )
        return ElasticityError(msg)

    def _contexts(self) -> list[Any]:
        return [
            _as_it_was(self.net), evaluating(self.net), torch.no_grad(), random_state(0),
            plain_attention(), sdpa_kernel(SDPBackend.MATH),
        ]  # fmt: skip

    # The batch

    def _batch(self, rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments in which the first row stands so many times."""
        tensors = [x for x in tree_leaves((self.args, self.kwargs)) if torch.is_tensor(x)]
        first = next((len(x) for x in tensors if x.ndim), 0)

        def repeated(x: Any) -> Any:
            if isinstance(x, torch.Tensor) and x.ndim and len(x) == first:
                return x[:1].expand(rows, *x.shape[1:]).clone()
            return x

        return tree_map(repeated, self.args), tree_map(repeated, self.kwargs)

    def _look_for_the_batch(self) -> None:
        """Note which dimensions hold the batch, and how many rows a pass may have."""
        try:
            two, three = (self._forward(*self._batch(n), {}, 1).operators for n in (2, 3))
        except ElasticityError:  # its inputs do not stand for a batch of any size
            return
        if not len(two) == len(three) == len(self.operators):
            return
        for i, (a, b) in enumerate(zip(two, three, strict=True)):
            self._layouts[i] = (
                _batch_dim(a.in_shape, b.in_shape), _batch_dim(a.out_shape, b.out_shape)
            )  # fmt: skip
        largest = max((prod(op.out_shape) for op in two), default=2) / 2
        self.rows = max(1, min(_ROWS, int(_MEMORY / 4 / largest)))
        if self.rows > 1 and not self._is_isolated():
            self.rows = 1

    def _is_isolated(self) -> bool:
        """Return whether what is in one row of the batch stays there."""
        sources = [i for i, layout in self._layouts.items() if layout[1] is not None]
        rows: list[list[Probe]] = []
        for i in sources:
            rows += [[(i, torch.arange(0))], [(i, torch.arange(self.operators[i].n_out))]]
        return all(
            not any(x.any() for x in taint.inputs.values()) and not taint.outputs.any()
            for taint in self.probe(rows)[::2]
        )

    def _has_batch(self, row: list[Probe]) -> bool:
        return self.rows > 1 and all(self._layouts[i][1] is not None for i, _ in row)

    # Modules of somebody's own whose weights are vectors

    def _look_at_modules(self) -> dict[str, tuple[nn.Module, Nature]]:
        """Return modules whose weights are vectors, with how they work on their input."""
        natures: dict[str, Nature | None] = {}
        leaves = {n: m for n, m in self.net.named_modules() if n and is_channelwise(m)}

        def look(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
            nature = None if kwargs or len(args) != 1 else _nature(module, args[0], output)
            natures[name] = nature if natures.setdefault(name, nature) == nature else None

        hooks = [
            module.register_forward_hook(
                lambda module, args, kwargs, output, name=name: look(
                    name, module, args, kwargs, output
                ),
                with_kwargs=True,
            )
            for name, module in leaves.items()
        ]
        try:
            with ExitStack() as stack:
                for context in self._contexts():
                    stack.enter_context(context)
                self.net(*cloned(self.args), **cloned(self.kwargs))
        except Exception as error:
            raise self._failure(error) from error
        finally:
            for hook in hooks:
                hook.remove()
        return {name: (leaves[name], n) for name, n in natures.items() if n is not None}

    @contextmanager
    def _channelwise(self, run: Pass) -> Iterator[None]:
        """Let such modules pass taint on, channel by channel."""
        with ExitStack() as stack:
            for module, nature in self._natures.values():
                weights = tuple(module.parameters(recurse=False))
                if not run.is_computed(weights):
                    forward = partial(_pass_on, run, weights, nature)
                    stack.enter_context(shadowed(module, "forward", forward))
            yield


@contextmanager
def _as_it_was(net: nn.Module) -> Iterator[None]:
    """Give modules back what they have, as a forward pass may remember or count something."""
    before = []
    for module in net.modules():
        attributes = dict(vars(module))
        containers = {n: copy(v) for n, v in attributes.items() if type(v) in (list, dict, set)}
        before.append((vars(module), attributes, containers))
    try:
        with same_buffers(net):
            yield
    finally:
        for state, attributes, containers in before:
            state.clear()
            state.update(attributes)
            for name, value in containers.items():
                own = attributes[name]
                if isinstance(own, list):
                    own[:] = value
                else:
                    own.clear()
                    own.update(value)


def _pass_on(run: Pass, weights: tuple[Any, ...], nature: Nature, x: torch.Tensor) -> Any:
    with torch._C.DisableTorchFunction():  # what runs here is not the network's code
        return run.scale(Scale(x, weights, nature.dim, nature.over_channels))


def _nature(module: Any, x: Any, output: Any) -> Nature | None:
    """Return how a module works on its input; None if channels do not stay where they are."""
    size = next(module.parameters(recurse=False)).numel()
    if not (torch.is_tensor(x) and torch.is_tensor(output) and x.shape == output.shape):
        return None
    dims = [dim for dim in range(-1, -x.ndim, -1) if x.shape[dim] == size]
    if not x.is_floating_point() or not dims:
        return None
    for dim in dims:
        probe = torch.rand_like(x) + 0.5
        probe.select(dim, 0).fill_(float("nan"))
        reached = type(module).forward(module, probe).isnan().movedim(dim, 0).flatten(1).any(1)
        if reached[0] and not reached[1:].any():
            return Nature(dim, over_channels=False)
        if reached.all():
            return Nature(dim, over_channels=True)
    return None


def _batch_dim(two: tuple[int, ...], three: tuple[int, ...]) -> int | None:
    """Return the only dimension that grows with the batch."""
    if len(two) != len(three):
        return None
    dims = [d for d, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    return dims[0] if len(dims) == 1 and 3 * two[dims[0]] == 2 * three[dims[0]] else None


def _tainted(output: Any, rows: int) -> torch.Tensor:
    """Return in which rows the outputs of a network are NaN."""
    tensors = [x for x in results(output).values() if x.is_floating_point()]
    if rows == 1:
        return torch.tensor([any(bool(x.isnan().any()) for x in tensors)])
    of_rows = [x for x in tensors if x.ndim and len(x) % rows == 0 and len(x)]
    tainted = torch.zeros(rows, dtype=torch.bool)
    for x in of_rows:
        tainted |= x.isnan().reshape(rows, -1).any(1).cpu()
    if not of_rows and any(bool(x.isnan().any()) for x in tensors):
        tainted[:] = True
    return tainted
