# SPDX-License-Identifier: Apache-2.0
"""A super-network out of any residual network: its blocks that keep their shape may be skipped."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._torch.contexts import evaluating
from lightning_subnet.elasticity.protocol import detach, elastic
from lightning_subnet.errors import ElasticityError, SearchError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

_Net = TypeVar("_Net", bound=nn.Module)


def skippable_blocks(
    net: _Net, example_input: Any, *, blocks: type[nn.Module] | Iterable[str] | None = None
) -> _Net:
    """Make a residual network searchable: each block that keeps its shape may be left out.

    Nothing has to be trained for it, and class and state dict stay as they are. The choices are
    `keep.<i>`, 0 or 1, in the order in which the blocks run. Extraction gives a copy in which an
    `nn.Identity` stands for each block that is left out; everything else keeps its name.

    Args:
        net: A network of torch, `timm` or your own, or a LightningModule.
        example_input: A tensor, or a tuple of arguments of `forward`; it is run once.
        blocks: Which may be skipped: a class, or names as in `named_modules()`. By default the
            innermost modules that run once on one tensor and add to it: with all their weights at
            zero they return their input, or its ReLU.

    Returns:
        The same object, with `search_space()`, `activate(subnet)`, `extract(subnet)` and
        `active_subnet`.

    Raises:
        SearchError: The network is not a module, or does not have a module of that name.
        ElasticityError: There are no such blocks, or one that was named changes its shape, does not
            run exactly once, or takes more than one tensor.

    References:
        Veit et al., Residual Networks Behave Like Ensembles of Relatively Shallow Networks, NeurIPS
        2016, section 4 (deleting single blocks).

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.layer(x).relu()
        >>> net = skippable_blocks(nn.Sequential(*(Block() for _ in range(3))), torch.zeros(1, 4))
        >>> net.search_space().size
        8
        >>> net.activate(net.search_space().subnet(keep=[1, 0, 0]))
        >>> sum(p.numel() for p in net.extract(net.active_subnet).parameters())
        20
    """
    if not isinstance(net, nn.Module):
        msg = f"skippable_blocks() got a {type(net).__name__}, which is not an nn.Module."
        raise SearchError(msg)
    candidates = _candidates(net, blocks)
    runs = _runs(net, example_input, candidates)
    if blocks is None:
        same_shape = [name for name, calls in runs.items() if not _why_not(calls)]
        residual = [n for n in same_shape if _adds(net.get_submodule(n), *runs[n][0])]
        names = [n for n in residual if not any(other.startswith(f"{n}.") for other in residual)]
    else:
        names = list(runs)
        for name in candidates:
            if reason := _why_not(runs.get(name, [])):
                msg = f"Block {name!r} of {type(net).__name__} cannot be skipped: it {reason}."
                raise ElasticityError(msg)
    if not names:
        msg = (
            f"{type(net).__name__} has no block that adds to its input and keeps its shape. "
            "Name the blocks, skippable_blocks(net, input, blocks=Block), or use elastic()."
        )
        raise ElasticityError(msg)
    space = SearchSpace({f"keep.{i}": [0, 1] for i in range(len(names))})

    def activate(net: nn.Module, subnet: Subnet) -> None:
        for name, keep in zip(names, subnet.values(), strict=True):
            attributes = vars(net.get_submodule(name))
            if not keep:
                attributes["forward"] = _through
            elif attributes.get("forward") is _through:
                del attributes["forward"]

    def extract(net: nn.Module, subnet: Subnet) -> nn.Module:
        return _without(
            net, [n for n, keep in zip(names, subnet.values(), strict=True) if not keep]
        )

    return elastic(net, space=space, activate=activate, extract=extract)


def _through(x: torch.Tensor) -> torch.Tensor:
    """Return the input, as a block that is skipped does."""
    return x


_Run = tuple[tuple[Any, ...], Mapping[str, Any], Any]


def _candidates(net: nn.Module, blocks: type[nn.Module] | Iterable[str] | None) -> list[str]:
    """Return the names of the modules that may be blocks."""
    names = {name: module for name, module in net.named_modules() if name}
    if blocks is None:
        return [n for n, m in names.items() if next(m.parameters(), None) is not None]
    if isinstance(blocks, type):
        of_class = [name for name, module in names.items() if isinstance(module, blocks)]
        if not of_class:
            kinds = {type(module).__name__ for module in names.values()}
            msg = f"{type(net).__name__} has no {blocks.__name__}; it has {listed(sorted(kinds))}."
            raise ElasticityError(msg)
        return of_class
    candidates = [blocks] if isinstance(blocks, str) else list(blocks)
    for name in candidates:
        if name not in names:
            msg = f"{type(net).__name__} has no module {name!r}.{did_you_mean(name, names)}"
            raise SearchError(msg)
    return candidates


def _runs(net: nn.Module, example_input: Any, names: list[str]) -> dict[str, list[_Run]]:
    """Return the inputs and outputs of each module in one forward pass, in the order of running."""
    runs: dict[str, list[_Run]] = {}
    handles = []

    def watch(name: str) -> None:
        def entered(_module: nn.Module, _args: Any) -> None:
            runs.setdefault(name, [])

        def left(_module: nn.Module, args: Any, named: Any, output: Any) -> None:
            runs[name].append((args, named, output))

        module = net.get_submodule(name)
        handles.append(module.register_forward_pre_hook(entered))
        handles.append(module.register_forward_hook(left, with_kwargs=True))

    for name in names:
        watch(name)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        with evaluating(net), torch.no_grad():
            net(*inputs)
    except Exception as error:
        msg = (
            f"{type(net).__name__} failed on the example input: {type(error).__name__}: "
            f"{error!s:.150}. Pass an input that forward() takes."
        )
        raise ElasticityError(msg) from error
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _why_not(calls: list[_Run]) -> str:
    """Return why a module cannot be skipped, or an empty string."""
    if len(calls) != 1:
        return f"runs {len(calls)} times"
    args, named, output = calls[0]
    if len(args) != 1 or named or not isinstance(args[0], torch.Tensor):
        return "takes something other than one tensor"
    if not isinstance(output, torch.Tensor):
        return f"gives a {type(output).__name__}"
    if output.shape != args[0].shape:
        return f"makes {tuple(output.shape)} of {tuple(args[0].shape)}"
    return ""


def _adds(block: nn.Module, args: tuple[Any, ...], _named: Any, _output: Any) -> bool:
    """Return whether a block gives its input, or the ReLU of it, when its weights are zero."""
    x = args[0]
    if not x.is_floating_point():
        return False
    x = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
    zeros = {name: torch.zeros_like(p) for name, p in block.named_parameters()}
    with evaluating(block), torch.no_grad():
        y = functional_call(block, zeros, (x,))
    return bool(torch.allclose(y, x) or torch.allclose(y, x.relu()))


def _without(net: nn.Module, names: list[str]) -> nn.Module:
    """Return a copy in which an identity stands for some blocks, with no trace of elasticity."""
    skipped = {id(net.get_submodule(name)): nn.Identity() for name in names}
    plain = copy.deepcopy(net, dict(skipped))  # what is skipped is not copied at all
    detach(plain)
    for module in plain.modules():
        if vars(module).get("forward") is _through:
            del vars(module)["forward"]
    return plain
