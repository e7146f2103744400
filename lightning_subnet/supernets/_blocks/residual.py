# SPDX-License-Identifier: Apache-2.0
"""Residual blocks of a network that nobody prepared: which of its modules add to their input.

Modules are tried without weights, so it does not matter what the network has learnt.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_subnet._torch.contexts import (
    evaluating,
    plain_attention,
    random_state,
    shadowed,
)
from lightning_subnet._torch.formulas import formulas
from lightning_subnet._torch.inputs import arguments
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.structures import flatten
from lightning_subnet.elasticity.extraction import detached_copy
from lightning_subnet.errors import ElasticityError

WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks of torch that only make a weight out of others before their module runs."""

_OWN = 0.9  # of the MACs of a block that adds by itself must be in smaller ones to prefer those
_COMPOSED = 0.5  # the same for a module that adds nothing by itself, but what it holds does
_VARIANCE = 7.3  # with one near 1, a batch normalisation of fresh statistics is the identity
_NORM = 2e-3  # of a value is what two layer normalisations change, with an eps of up to 1e-3
_ROUNDING = 8  # steps of the type, where those are larger
_TRIALS = 4  # of inputs that may be what a module adds to
_DIMS = (-1, 1)  # over which layers may normalise
_ANGLE = 12.9898  # radians between values of a probe, so that none repeat
_LISTS = (nn.ModuleList, nn.Sequential)
_PLAIN = (str, int, float, torch.dtype, torch.device, type, nn.Module, type(None))


@dataclass
class Calls:
    """What modules did in one forward pass of their network.

    Args:
        runs: The runs of each module by name, in the order in which the modules start.
        macs: Multiply-accumulates of each module, as far as they are known.
        total: Those of the network.
    """

    runs: dict[str, list[Run]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    total: int = 0

    def share_without(self, net: nn.Module, names: Iterable[str]) -> float | None:
        """Return the share of the MACs that is left without some modules; None if unknown."""
        names = set(names)
        inside = {part for name in names for part in names if part in _parts(net, name)}
        if not self.total:
            return None
        return 1 - sum(self.macs.get(name, 0) for name in names - inside) / self.total


@dataclass(frozen=True)
class Run:
    """One forward pass of a module.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
        before: Both kinds of arguments as they were before it ran, as it may fill a cache.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    before: tuple[tuple[Any, ...], Mapping[str, Any]]

    @property
    def is_of_one_tensor(self) -> bool:
        """Whether it takes one tensor, by position, and gives one."""
        return (
            len(self.args) == 1
            and not self.kwargs
            and isinstance(self.args[0], torch.Tensor)
            and isinstance(self.output, torch.Tensor)
        )

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors that it gets, the positional ones first."""
        return [x for x in tree_leaves((self.args, dict(self.kwargs))) if torch.is_tensor(x)]

    @property
    def result(self) -> torch.Tensor | None:
        """The first tensor that it gives."""
        return _first_tensor(self.output)


def module_calls(net: nn.Module, example_input: Any, names: Iterable[str]) -> Calls:
    """Return what modules of a network do in a forward pass.

    Args:
        net: A copy of the network, which is run in eval mode and may remember what it computed.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.
        names: The modules, as in `named_modules()`; those that do not run are not in the result.

    Raises:
        ElasticityError: The network does not take the input.
    """
    calls, names = Calls(), list(names)
    args, kwargs = arguments(net, example_input)

    arrived: dict[str, list[Any]] = {}

    def entered(name: str, *inputs: Any) -> None:
        calls.runs.setdefault(name, [])
        arrived.setdefault(name, []).append(tree_map(_kept, inputs))

    def left(name: str, args: Any, kwargs: Any, output: Any) -> None:
        calls.runs[name].append(Run(args, kwargs, output, before=arrived[name].pop()))

    try:
        with (
            _watched(net, names, entered, left, first=False),
            evaluating(net),
            plain_attention(),
            random_state(),
            torch.no_grad(),
        ):
            net(*tree_map(_copied, args), **tree_map(_copied, kwargs))
    except Exception as error:
        msg = (
            f"{class_name(net)} failed on the example input: {type(error).__name__}: "
            f"{error!s:.150}. Pass an input that forward() takes."
        )
        raise ElasticityError(msg) from error
    counter = FlopCounterMode(display=False, custom_mapping=formulas())

    def count(sign: int, name: str, *_: Any) -> None:
        calls.macs[name] = calls.macs.get(name, 0) + sign * counter.get_total_flops() // 2

    net.requires_grad_(False)  # the counter does not take parameters as inputs without it
    try:
        with (
            _watched(net, calls.runs, partial(count, -1), partial(count, 1)),
            evaluating(net),
            plain_attention(),
            random_state(),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            counter,
        ):
            net(*tree_map(_copied, args), **tree_map(_copied, kwargs))
        calls.total = counter.get_total_flops() // 2
    except Exception:  # of an operator that cannot be counted
        calls.macs.clear()
    return calls


@contextmanager
def _watched(
    net: nn.Module, names: Iterable[str], entered: Any, left: Any, *, first: bool = True
) -> Iterator[None]:
    """Call functions when modules start, and when they end.

    Args:
        net: The network.
        names: Its modules.
        entered: Gets the name, the positional and the keyword arguments.
        left: Gets the same, and the output.
        first: Whether a module starts before its own hooks, which may change the arguments.
    """
    handles = []

    def watch(name: str) -> None:
        module = net.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(
                lambda _module, args, kwargs: entered(name, args, kwargs),
                with_kwargs=True,
                prepend=first,
            )
        )
        handles.append(
            module.register_forward_hook(
                lambda _module, args, kwargs, output: left(name, args, kwargs, output),
                with_kwargs=True,
            )
        )

    try:
        for name in names:
            watch(name)
        yield
    finally:
        for handle in handles:
            handle.remove()


def residual_blocks(net: nn.Module, calls: Calls) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Return the residual blocks of a network, and what each of its residual modules adds to.

    A residual module returns one of its inputs, the ReLU or the layer normalisation of it, when its
    weights are zero, or zero but for vectors that scale. Such modules lie in one another: a
    response normalisation in a block, a block in a stage. A stage is what the blocks in it make of
    it, and they hold nearly all of its multiplications; a block adds by itself, or holds many of
    them outside of its residual parts. What takes more than one tensor, such as a layer of a
    transformer, is a block as long as its parts do not repeat.

    Args:
        net: The network.
        calls: What those of its modules do that may be blocks.

    Returns:
        The names of the blocks, in the order in which they run; and by name of each residual
        module, blocks and parts of them, the input that it adds to.
    """
    bare = _bare(net)
    first = {
        name: runs[0]
        for name, runs in calls.runs.items()
        if runs and (calls.macs.get(name) or not calls.total)  # what multiplies nothing is a part
    }
    adding: dict[str, torch.Tensor] = {}
    for scale in (0.0, 1.0):
        _fill(bare, scale)
        for name in first.keys() - adding.keys():
            stream = _stream(bare, name, first[name], normed=bool(scale))
            if stream is not None:
                adding[name] = stream
    parts = {name: adding.keys() & _parts(net, name) for name in adding}

    def blocks_of(name: str) -> set[str]:
        inner = blocks_in(parts[name])
        share = sum(calls.macs.get(n, 0) for n in inner)
        whole = calls.macs.get(name, 0)
        if not inner or share < _COMPOSED * whole:
            return {name}
        if not first[name].is_of_one_tensor and not _repeats(net, inner):
            return {name} if len(inner) > 1 or share < _OWN * whole else inner
        if share >= _OWN * whole:
            return inner
        adds = _stream(bare, name, first[name], normed=True, without=inner) is not None
        return {name} if adds else inner

    def blocks_in(names: set[str]) -> set[str]:
        inside = {part for name in names for part in parts[name]}
        return {block for name in names - inside for block in blocks_of(name)}

    chosen = blocks_in(set(adding))
    return [name for name in calls.runs if name in chosen], adding


def _parts(net: nn.Module, name: str) -> set[str]:
    """Return the names in a network of what one of its modules holds, by whatever name."""
    module = net.get_submodule(name)
    held = {id(part) for part in module.modules() if part is not module}
    return {n for n, part in net.named_modules() if id(part) in held}


def _repeats(net: nn.Module, names: set[str]) -> bool:
    """Return whether modules are those of a stage: all of one kind, or a list has two of one."""
    if len({type(net.get_submodule(name)) for name in names}) == 1:
        return len(names) > 1
    kinds = [
        (parent, type(net.get_submodule(name)))
        for name in names
        if isinstance(net.get_submodule(parent := name.rpartition(".")[0]), _LISTS)
    ]
    return len(set(kinds)) < len(kinds)


def _stream(
    net: nn.Module, name: str, run: Run, *, normed: bool, without: Iterable[str] = ()
) -> torch.Tensor | None:
    """Return the first input that a module gives back, or the ReLU or layer normalisation of it.

    Args:
        net: The network, whose weights say nothing.
        name: The module.
        run: A run of it.
        normed: Whether vectors of weights are ones, so that layers normalise.
        without: Modules in it that give zeros.

    Returns:
        That input, as it is in the run; None if there is none.
    """
    result = run.result
    if result is None:
        return None
    likes = {id(x): x for x in run.inputs if x.shape == result.shape and x.is_floating_point()}
    for like in [*likes.values()][:_TRIALS]:
        # Normalised over the last dimension, or over the channels of an image.
        twice = normed and like.ndim > len(_DIMS) and _has_norm(net.get_submodule(name))
        for dim in _DIMS if twice else _DIMS[:1]:
            if _gives_back(net, name, run, like, dim, normed=normed, without=without):
                return like
    return None


def _gives_back(
    net: nn.Module,
    name: str,
    run: Run,
    like: torch.Tensor,
    dim: int,
    *,
    normed: bool,
    without: Iterable[str],
) -> bool:
    """Return whether a module gives an input, its ReLU, or its normalisation over a dimension."""
    x = _probe(like, dim)
    args, kwargs = tree_map(
        # It may work in place.
        lambda y: x.clone() if y is like else _copied(y),
        (run.before[0], dict(run.before[1])),
    )
    module = net.get_submodule(name)
    with ExitStack() as stack:
        for part in without:
            stack.enter_context(shadowed(net.get_submodule(part), "forward", _zeros))
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            stack.enter_context(shadowed(module, hooks, OrderedDict()))
        for context in (evaluating(module), torch.no_grad(), random_state(), plain_attention()):
            stack.enter_context(context)
        try:
            y = _first_tensor(module(*args, **kwargs))
        except Exception:  # of any class: it does not work without weights
            return False
    if y is None or y.shape != x.shape or y.dtype != x.dtype:
        return False
    # Leaky ReLUs, one after the other, come near a ReLU.
    if any(torch.allclose(y, z, atol=0) for z in (x, x.relu())):
        return True
    near = max(_NORM, _ROUNDING * torch.finfo(x.dtype).eps)
    return normed and torch.allclose(y, x, rtol=near, atol=near)


def _has_norm(module: nn.Module) -> bool:
    """Return whether a module holds a normalisation of each sample by itself."""
    return any(
        "norm" in type(part).__name__.lower() and not hasattr(part, "running_var")
        for part in module.modules()
    )


def _probe(like: torch.Tensor, dim: int) -> torch.Tensor:
    """Return values of the size of a tensor, with mean 0 and variance 1 over a dimension."""
    x = torch.arange(like.numel(), dtype=torch.float64).mul(_ANGLE).sin().view(like.shape)
    if like.ndim and like.shape[dim] > 1:
        x = (x - x.mean(dim, keepdim=True)) / x.std(dim, correction=0, keepdim=True)
    return x.to(like)


def _first_tensor(value: Any) -> torch.Tensor | None:
    return next((x for x in flatten(value)[0] if isinstance(x, torch.Tensor)), None)


def _zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return zeros of the first tensor that a module gets."""
    x = next(x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x))
    return torch.zeros_like(x)


def _kept(x: Any) -> Any:
    """Return an argument as it is now: a cache is copied, a tensor stays the same object."""
    if isinstance(x, (torch.Tensor, *_PLAIN)):
        return x
    try:
        return copy.deepcopy(x)
    except Exception:  # of any class: there are things that cannot be copied
        return x


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else _kept(x)


def _bare(net: nn.Module) -> nn.Module:
    """Return a copy whose weights are its parameters, and whose statistics say nothing."""
    bare: nn.Module = detached_copy(net, {}).requires_grad_(False)
    for module in bare.modules():
        if parametrize.is_parametrized(module):
            # Its class, where the weights are properties, is that of the original too.
            kind, weights = type(module), list(getattr(module, "parametrizations", ()))
            with torch.no_grad():
                zeros = {name: torch.zeros_like(getattr(module, name)) for name in weights}
            module.__class__ = type(kind.__name__, (kind,), zeros)
        for key, hook in [*module._forward_pre_hooks.items()]:
            if isinstance(hook, WEIGHT_HOOKS):
                hook.remove(module)
                del module._forward_pre_hooks[key]
        if isinstance(variance := getattr(module, "running_var", None), torch.Tensor):
            variance.fill_(_VARIANCE)
    return bare


def _fill(net: nn.Module, scale: float) -> None:
    """Give all weights the value 0, but for vectors that are no biases."""
    for name, p in net.named_parameters():
        p.data.fill_(scale if p.ndim <= 1 and not name.endswith("bias") else 0.0)
