# SPDX-License-Identifier: Apache-2.0
"""Slicing: any network, as one of its subnets runs it, with only the weights that it reads.

`torch.export` gives the operators of a forward pass. What they take of a weight by slicing, in
`activate` or on the way, becomes a weight of its own; what is computed of weights stays computed,
so that the result trains as the network does.
"""

from __future__ import annotations

import inspect
import io
import logging
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import TreeSpec

from lightning_subnet._torch.contexts import (
    evaluating,
    plain_attention,
    random_state,
)
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.outputs import default_tolerance, difference, named_outputs
from lightning_subnet._torch.structures import flatten
from lightning_subnet.elasticity.slicing.graph import Graph
from lightning_subnet.elasticity.slicing.network import (
    DEVICE,
    Recipe,
    Sizes,
    SlicedNetwork,
    Template,
    signature_of,
)
from lightning_subnet.elasticity.slicing.reasons import brief, foreign, reason
from lightning_subnet.elasticity.slicing.regions import Memory, Part, Source, WeightReader
from lightning_subnet.elasticity.slicing.weights import Weights
from lightning_subnet.space.subnet import Subnet

Only = Literal["inference", "example"]
"""What a slicing is for, if not for all that the network can do."""

_RULED_OUT = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\] != (\d+)")
_LONGEST = 4096  # of the sizes that are tried


class NotSliceable(Exception):
    """A network cannot be sliced; the text says why."""


def slice_network(
    net: Any,
    subnet: Subnet,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    only: Only | None = None,
) -> SlicedNetwork:
    """Return a subnet with only the weights that it reads.

    Args:
        net: A super-network in eval mode, which is changed: a copy.
        subnet: The subnet.
        args: Positional arguments of its forward pass, on the device of the weights.
        kwargs: Keyword arguments.
        only: `"inference"`: for eval mode alone, in half the time; `"example"`: and for inputs of
            these sizes alone, in a fifth of it.

    Raises:
        NotSliceable: The network decides by values, uses an operator without a graph, draws from
            Python's random numbers, or the result differs.
    """
    with _quiet():
        return _Slicing(net, subnet, args, kwargs).run(only)


class _Slicing:
    """One slicing of a copy of a network."""

    def __init__(
        self, net: Any, subnet: Subnet, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        try:
            self.signature, self.defaults = signature_of(net.forward)
            bound = inspect.signature(net.forward).bind(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise NotSliceable(f"its forward() does not take the example input: {error}") from error
        self.net, self.subnet = net, subnet
        self.templates = {name: Template.of(x) for name, x in bound.arguments.items()}
        leaves = flatten(list(bound.arguments.values()))[0]
        self.tensors = [x.detach() for x in leaves if isinstance(x, torch.Tensor)]
        if not self.tensors:
            raise NotSliceable("no tensor is in its example input")
        try:
            self.reader = WeightReader(net)
        except Exception as error:  # of weights that have no shape yet, for one
            raise NotSliceable(f"its weights cannot be looked at: {brief(error)}") from error
        with self.reader.activating():
            net.activate(subnet)
        _adopt_kept(net, self.reader.memory)
        self.parameters = inspect.signature(net.forward).parameters
        self.training = {child: child.training for child in net.modules()}

    def run(self, only: Only | None) -> SlicedNetwork:
        """Return the network, with sizes as open as `torch.export` and the outputs allow."""
        if only == "example":
            return self._sliced([None] * len(self.tensors), training=False)
        tensors = self.tensors
        self.tensors = _two_rows(tensors)
        if self.tensors is not tensors and not self._runs():
            self.tensors = tensors
        first: NotSliceable | None = None
        for sizes in self._sizings():
            try:
                plain = self._sliced(sizes, training=only is None)
            except NotSliceable as error:
                first = first or error
                continue
            if plain.dynamic_batch or self.tensors is tensors:
                return plain
            self.tensors = tensors  # it fixes its batch: to that of the example
        assert first is not None
        raise first

    def _runs(self) -> bool:
        try:
            self._outputs(self.net, self.tensors)
        except Exception:  # it takes one row only
            return False
        return True

    def _sizings(self) -> Iterator[list[Any]]:
        """Yield which sizes are open: all, the rows of the batch, none."""
        auto = getattr(torch.export.Dim, "AUTO", None)
        if auto is not None:
            yield [{d: auto for d, n in enumerate(x.shape) if n > 1} for x in self.tensors]
        rows = next((len(x) for x in self.tensors if x.ndim), 0)
        if rows > 1:
            size = torch.export.Dim("batch") if auto is None else auto
            yield [{0: size} if x.ndim and len(x) == rows else {} for x in self.tensors]
        yield [None] * len(self.tensors)

    def _sliced(self, sizes: list[Any], *, training: bool) -> SlicedNetwork:
        try:
            return self._built(sizes, training=training)
        except NotSliceable:
            raise
        except Exception as error:  # of code that cannot be written anew
            raise NotSliceable(f"its operators cannot be written anew: {brief(error)}") from error

    def _built(self, sizes: list[Any], *, training: bool) -> SlicedNetwork:
        graphs = {False: self._graph(sizes, training=False)}
        parts = graphs[False].parts()
        refusal: str | None = "it was extracted for eval mode alone"
        if training:
            try:
                graphs[True] = self._graph(sizes, training=True)
                refusal = _lacking(parts, graphs[True].parts())
            except NotSliceable as error:
                refusal = str(error)
            if refusal is not None:
                graphs.pop(True, None)
        weights = Weights(parts, [graph.parts() for graph in graphs.values()])
        moving = self._moving({mode: graph.statistics() for mode, graph in graphs.items()})
        programs = {mode: graph.program(weights, moving) for mode, graph in graphs.items()}
        recipe = Recipe(
            class_name(self.net), self.signature, self.defaults, self.templates,
            {mode: graph.sizes for mode, graph in graphs.items()}, programs, refusal,
        )  # fmt: skip
        plain = _built(recipe, weights, graphs[False].device)
        expected = self._outputs(self.net, self.tensors)
        self._compare(plain, self.tensors, expected)
        if True in programs and (refusal := self._gap_in_training(plain)) is not None:
            recipe = replace(recipe, programs={False: programs[False]}, refusal=refusal)
            plain = _built(recipe, weights, graphs[False].device)
        conditions = self._compare_others(plain, graphs[False].sizes)
        recipe.sizes[False] = replace(graphs[False].sizes, conditions=conditions)
        return plain

    def _moving(self, statistics: Mapping[bool, Mapping[str, bool]]) -> set[str]:
        """Return the running means that move in training and rest in eval mode."""
        resting = {name for name, moves in statistics[False].items() if not moves}
        if True in statistics:
            return {name for name in resting if statistics[True].get(name)}
        layers = {name: self.net.get_submodule(name.rpartition(".")[0]) for name in resting}
        return {name for name, layer in layers.items() if isinstance(layer, _NormBase)}

    def _compare_others(self, plain: SlicedNetwork, sizes: Sizes) -> tuple[str, ...]:
        """Compare outputs on inputs of other sizes; return the conditions that are needed.

        Some are mere assumptions of `torch.export`: that no size is 1, for one.
        """
        needed = set(sizes.conditions)
        open_ = replace(sizes, conditions=())
        for tensors in self._others(open_, sizes.conditions):
            violated = sizes.violated(tensors)
            try:
                expected = self._outputs(self.net, tensors)
            except Exception:
                continue
            recipe = plain._recipe
            before = recipe.sizes[False]
            recipe.sizes[False] = open_
            try:
                self._compare(plain, tensors, expected)
            except NotSliceable:
                if not violated:
                    raise
            else:
                needed -= set(violated)
            finally:
                recipe.sizes[False] = before
        return tuple(c for c in sizes.conditions if c in needed)

    def _others(self, sizes: Sizes, conditions: Sequence[str]) -> Iterator[list[torch.Tensor]]:
        """Yield inputs of other sizes, where these are open, and of those that are ruled out."""
        shapes = sizes.shapes
        lengths: dict[int, set[int]] = {}  # what is of one length goes together, as rows of inputs
        for x, shape in zip(self.tensors, shapes, strict=True):
            for n, name in zip(x.shape, shape, strict=True):
                if _open(name):
                    lengths.setdefault(n, set()).update({n - 1, n + 1})
        for condition in conditions:
            if (ruled := _RULED_OUT.fullmatch(condition)) is not None:
                i, d, n = map(int, ruled.groups())
                if n <= _LONGEST and isinstance(shapes[i][d], str):
                    lengths.setdefault(self.tensors[i].shape[d], set()).add(n)
        for length, others in sorted(lengths.items()):
            for other in sorted(others - {0}):
                tensors = []
                for x, shape in zip(self.tensors, shapes, strict=True):
                    dims = [d for d, n in enumerate(x.shape) if n == length and _open(shape[d])]
                    tensors.append(_resized(x, dims, other))
                if sizes.refusal(tensors) is None:
                    yield tensors

    def _outputs(self, net: nn.Module, tensors: Sequence[torch.Tensor]) -> Any:
        args, kwargs = self._arguments(tensors)
        with evaluating(net), torch.no_grad(), random_state(0):
            return net(*args, **kwargs)

    def _compare(self, plain: SlicedNetwork, tensors: Any, expected: Any) -> None:
        try:
            output = self._outputs(plain, tensors)
        except Exception as error:
            raise NotSliceable(
                f"its operators fail when they run by themselves: {brief(error)}"
            ) from error
        gap = difference(expected, output)
        weights = (*plain.parameters(), *named_outputs(expected).values())
        if not gap.relative <= default_tolerance(weights):
            msg = f"its operators give other outputs when they run by themselves: {gap}. Let its "
            raise NotSliceable(f"{msg}forward() depend on inputs, weights and attributes alone")

    def _gap_in_training(self, plain: SlicedNetwork) -> str | None:
        """Return how outputs differ in training mode, or None."""
        args, kwargs = self._arguments(self.tensors)
        outputs = []
        for net in (self.net, plain):
            try:
                with _as_before(net), torch.no_grad(), random_state(0):
                    if net is plain:
                        net.train()
                    else:
                        self._set_mode(training=True)
                    outputs.append(net(*args, **kwargs))
            except Exception as error:
                return f"training mode fails: {brief(error)}"
        gap = difference(*outputs)
        tensors = (*plain.parameters(), *named_outputs(outputs[0]).values())
        close = gap.relative <= default_tolerance(tensors)
        return None if close else f"its operators give other outputs in training: {gap}"

    def _set_mode(self, *, training: bool) -> None:
        """Put the network in eval mode, or in training mode as it was, or all of it."""
        self.net.train(training)
        if training and any(self.training.values()):
            for child, flag in self.training.items():
                child.training = flag

    def _arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        rest = iter(tensors)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, template in self.templates.items():
            value = template.fill([next(rest) for t in template.tensors if t])
            parameter = self.parameters[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += value
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs |= value
            elif parameter.kind is parameter.KEYWORD_ONLY or len(args) < _before(
                self.parameters, name
            ):
                kwargs[name] = value
            else:
                args.append(value)
        return args, kwargs

    def _graph(self, sizes: list[Any], *, training: bool) -> Graph:
        output = _Output()
        flat = _Flat(self.net, self._arguments, output)
        drawn = _drawn()
        try:
            with _as_before(flat):
                self._set_mode(training=training)
                with torch.inference_mode(False), torch.enable_grad():
                    program = _exported(flat, self.tensors, sizes)
                if drawn != _drawn():
                    raise NotSliceable(
                        "it draws from the random numbers of Python or NumPy. Draw with torch"
                    )
                with torch.no_grad(), random_state():
                    return Graph(program, self.tensors, self.reader.memory, output.spec)
        except NotSliceable:
            raise
        except Exception as error:  # of many classes, by what fails
            raise NotSliceable(foreign(output.leaves) or reason(error)) from error


@contextmanager
def _as_before(net: nn.Module) -> Iterator[None]:
    """Put modes, weights, buffers and attributes back as they were.

    A pass in training mode may move a running mean that is no buffer.
    """
    training = {child: child.training for child in net.modules()}
    attributes = [(child, _attributes(child)) for child in training]
    kept = {id(x): x for _, values in attributes for x in flatten([*values.values()])[0]}
    tensors = [*net.parameters(), *net.buffers(), *kept.values()]
    values = [(x, x.detach().clone()) for x in tensors if _is_plain(x)]
    try:
        yield
    finally:
        for child, before in attributes:
            for name in _attributes(child).keys() - before.keys():
                del vars(child)[name]
            vars(child).update(before)
            child.training = training[child]
        with torch.no_grad():
            for x, value in values:
                if not torch.equal(x, value):
                    x.detach().copy_(value)


def _is_plain(x: Any) -> bool:
    """Return whether something is a tensor whose values can be compared and put back."""
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type != "meta"


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module has besides weights, buffers and children; its mode too."""
    return {k: v for k, v in vars(module).items() if k not in _HELD}


_HELD = ("_parameters", "_buffers", "_modules")


def _drawn() -> tuple[Any, ...]:
    """Return the states of the random numbers that no graph can hold."""
    state: Any = np.random.get_state()  # noqa: NPY002 - networks use it
    return random.getstate(), state[1].tolist()


def _built(recipe: Recipe, weights: Weights, device: torch.device) -> SlicedNetwork:
    plain = recipe.build()
    weights.register(plain)
    setattr(plain, DEVICE, device)
    plain.eval()
    return plain


class _Flat(nn.Module):
    """A network as a function of tensors that returns the leaves of its output."""

    def __init__(self, net: nn.Module, arguments: Callable[[Any], Any], output: _Output) -> None:
        super().__init__()
        self.net = net
        self._arguments, self._output = arguments, output

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Run the network."""
        args, kwargs = self._arguments(tensors)
        self._output.leaves, self._output.spec = flatten(self.net(*args, **kwargs))
        return tuple(self._output.leaves)


class _Output:
    """The structure of an output; an object of its own, as torch.export puts attributes back."""

    spec: TreeSpec
    leaves: Sequence[Any] = ()


def _adopt_kept(net: nn.Module, memory: Memory) -> None:
    """Add what modules keep of weights, and was made before anyone could see it."""
    for path, child in net.named_modules():
        for name, value in vars(child).items():
            if name in _HELD:
                continue
            for i, tensor in enumerate(flatten(value)[0]):
                learns = isinstance(tensor, torch.Tensor) and tensor.requires_grad
                if learns and tensor not in memory:
                    full = f"{path}.{name}_{i}".removeprefix(".")
                    memory.add(Source(full, tensor.detach(), "computed"))


def _lacking(parts: Mapping[str, Part], training: Mapping[str, Part]) -> str | None:
    """Return why what is read in training is not there in eval mode; None if it is."""
    for name, part in training.items():
        if part.source.kind == "buffer":
            continue
        if name not in parts:
            return f"it reads {name} in training alone"
        both = Part(part.source, [*part.regions, *parts[name].regions])
        if both.numel != parts[name].numel:
            return f"it reads another part of {name} in training"
    return None


def _two_rows(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of two rows in the place of one, which would be taken for a constant."""
    if not all(x.ndim and len(x) == 1 for x in tensors if x.ndim):
        return tensors
    return [x.repeat_interleave(2, 0) if x.ndim else x for x in tensors]


def _open(size: int | str) -> bool:
    return isinstance(size, str) and size.isidentifier()


def _resized(x: torch.Tensor, dims: Sequence[int], length: int) -> torch.Tensor:
    for d in dims:
        rows = torch.arange(length, device=x.device) % x.shape[d]
        x = x.index_select(d, rows)
    return x


def _before(parameters: Mapping[str, inspect.Parameter], name: str) -> int:
    """Return how many positional arguments come before one of this name."""
    names = [p.name for p in parameters.values() if p.kind is not p.VAR_POSITIONAL]
    return names.index(name)


def _exported(flat: _Flat, tensors: Sequence[torch.Tensor], sizes: list[Any]) -> Any:
    shapes = {"tensors": tuple(sizes)} if any(s is not None for s in sizes) else None
    export: Any = getattr(torch.export, "export_for_training", torch.export.export)
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 7):
        export = torch.export.export
    return export(flat, tuple(tensors), dynamic_shapes=shapes, strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep away what torch.export says on the way, and give attention its plain form."""
    log = logging.getLogger("torch")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)
        with plain_attention(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # torch.export prints the graph of what it refuses
            yield
    finally:
        log.setLevel(level)
