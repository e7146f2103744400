# SPDX-License-Identifier: Apache-2.0
"""Residual blocks of a network that nobody prepared: which of its modules add to their input.

Modules are tried without weights, so it does not matter what the network has learnt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
from lightning_subnet.elasticity.extraction import detached_copy
from lightning_subnet.errors import ElasticityError

WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks of torch that only make a weight out of others before their module runs."""

_OWN = 0.9  # of the MACs of a block that adds by itself must be in smaller ones to prefer those
_COMPOSED = 0.5  # the same for a module that adds nothing by itself, but what it holds does
_VARIANCE = 7.3  # with one near 1, a batch normalisation of fresh statistics is the identity


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
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def why_not_one_tensor(self) -> str:
        """Why an identity cannot stand in its place, or an empty string."""
        if len(self.args) != 1 or self.kwargs or not isinstance(self.args[0], torch.Tensor):
            return "takes something other than one tensor"
        if not isinstance(self.output, torch.Tensor):
            return f"gives a {type(self.output).__name__}"
        if self.output.shape != self.args[0].shape:
            return f"makes {tuple(self.output.shape)} of {tuple(self.args[0].shape)}"
        return ""


def why_not_skippable(runs: list[Run]) -> str:
    """Return why an identity cannot stand for a module, or an empty string.

    Args:
        runs: The runs of the module in one forward pass of the network.
    """
    return runs[0].why_not_one_tensor if len(runs) == 1 else f"runs {len(runs)} times"


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

    def entered(name: str) -> None:
        calls.runs.setdefault(name, [])

    def left(name: str, run: Run) -> None:
        calls.runs[name].append(run)

    try:
        with _watched(net, names, entered, left), evaluating(net), torch.no_grad(), random_state():
            net(*tree_map(_cloned, args), **tree_map(_cloned, kwargs))
    except Exception as error:
        msg = (
            f"{type(net).__name__} failed on the example input: {type(error).__name__}: "
            f"{error!s:.150}. Pass an input that forward() takes."
        )
        raise ElasticityError(msg) from error
    counter = FlopCounterMode(display=False, custom_mapping=formulas())

    def count(name: str, *run: Run) -> None:
        sign = 1 if run else -1
        calls.macs[name] = calls.macs.get(name, 0) + sign * counter.get_total_flops() // 2

    net.requires_grad_(False)  # the counter does not take parameters as inputs without it
    try:
        with ExitStack() as stack:
            for context in (
                _watched(net, calls.runs, count, count), evaluating(net), plain_attention(),
                random_state(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter,
            ):  # fmt: skip
                stack.enter_context(context)
            net(*args, **kwargs)
        calls.total = counter.get_total_flops() // 2
    except Exception:  # of an operator that cannot be counted
        calls.macs.clear()
    return calls


@contextmanager
def _watched(net: nn.Module, names: Iterable[str], entered: Any, left: Any) -> Iterator[None]:
    """Call functions when modules start, with their name, and when they end, with the run too."""
    handles = []

    def watch(name: str) -> None:
        module = net.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_: entered(name), prepend=True))
        handles.append(
            module.register_forward_hook(
                lambda _module, args, kwargs, output: left(name, Run(args, kwargs, output)),
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


def residual_blocks(net: nn.Module, calls: Calls) -> list[str]:
    """Return the names of the residual blocks of a network, in the order in which they run.

    A residual module returns its input, or the ReLU of it, when its weights are zero, or zero but
    for vectors that scale. Such modules lie in one another: a response normalisation in a block, a
    block in a stage. A stage is what the blocks in it make of it, and they hold nearly all of its
    multiplications; a block adds by itself, or holds many of them outside of its residual parts.

    Args:
        net: The network.
        calls: What those of its modules do that may be blocks.
    """
    bare = _bare(net)
    first = {
        name: runs[0]
        for name, runs in calls.runs.items()
        if runs and (calls.macs.get(name) or not calls.total)  # what multiplies nothing is a part
    }
    adding: set[str] = set()
    for scale in (0.0, 1.0):
        _fill(bare, scale)
        for name in first.keys() - adding:
            if _adds(bare, name, first[name]):
                adding.add(name)
    parts = {name: adding & _parts(net, name) for name in adding}

    def blocks_of(name: str) -> set[str]:
        inner = blocks_in(parts[name])
        share = sum(calls.macs.get(n, 0) for n in inner)
        whole = calls.macs.get(name, 0)
        if not inner or share < _COMPOSED * whole:
            return {name}
        if share >= _OWN * whole:
            return inner
        return {name} if _adds(bare, name, first[name], without=inner) else inner

    def blocks_in(names: set[str]) -> set[str]:
        inside = {part for name in names for part in parts[name]}
        return {block for name in names - inside for block in blocks_of(name)}

    chosen = blocks_in(adding)
    return [name for name in calls.runs if name in chosen]


def _parts(net: nn.Module, name: str) -> set[str]:
    """Return the names in a network of what one of its modules holds, by whatever name."""
    module = net.get_submodule(name)
    held = {id(part) for part in module.modules() if part is not module}
    return {n for n, part in net.named_modules() if id(part) in held}


def _adds(net: nn.Module, name: str, run: Run, *, without: Iterable[str] = ()) -> bool:
    """Return whether a module gives its input, or the ReLU of it.

    Args:
        net: The network, whose weights say nothing.
        name: The module.
        run: A run of it; what it adds to is the first tensor that it gets.
        without: Modules in it that give zeros.
    """
    like = next((x for x in tree_leaves((run.args, run.kwargs)) if torch.is_tensor(x)), None)
    result = next((x for x in tree_leaves(run.output) if torch.is_tensor(x)), None)
    if like is None or result is None or like.shape != result.shape:
        return False
    if not like.is_floating_point():
        return False
    x = torch.linspace(-1, 1, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)
    args, kwargs = tree_map(
        # It may work in place.
        lambda y: x.clone() if y is like else _cloned(y),
        (run.args, dict(run.kwargs)),
    )
    module = net.get_submodule(name)
    with ExitStack() as stack:
        for part in without:
            stack.enter_context(shadowed(net.get_submodule(part), "forward", _zeros))
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            stack.enter_context(shadowed(module, hooks, OrderedDict()))
        for context in (evaluating(module), torch.no_grad(), random_state()):
            stack.enter_context(context)
        try:
            outputs = tree_leaves(module(*args, **kwargs))
        except Exception:  # of any class: it does not work without weights
            return False
    y = next((y for y in outputs if torch.is_tensor(y)), None)
    if y is None or y.shape != x.shape:
        return False
    # Leaky ReLUs, one after the other, come near a ReLU.
    return any(torch.allclose(y, z, atol=0) for z in (x, x.relu()))


def _zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return zeros of the first tensor that a module gets."""
    x = next(x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x))
    return torch.zeros_like(x)


def _cloned(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else x


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
