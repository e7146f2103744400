# SPDX-License-Identifier: Apache-2.0
"""A super-network out of any residual network: its blocks that keep their shape may be skipped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_subnet._messages import did_you_mean, listed, warn
from lightning_subnet._torch.contexts import evaluating, random_state, shadowed
from lightning_subnet._torch.outputs import default_tolerance, difference
from lightning_subnet.elasticity.extraction import detached_copy
from lightning_subnet.elasticity.protocol import detach, elastic
from lightning_subnet.errors import ElasticityError, ElasticityWarning, SearchError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.supernets._blocks.residual import (
    WEIGHT_HOOKS,
    module_calls,
    residual_blocks,
    why_not_skippable,
)

_Net = TypeVar("_Net", bound=nn.Module)

_MOST = 0.95  # of the MACs in the smallest subnet: skipping saves nearly nothing
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def skippable_blocks(
    net: _Net, example_input: Any, *, blocks: type[nn.Module] | Iterable[str] | None = None
) -> _Net:
    """Make a residual network searchable: each block that keeps its shape may be left out.

    Nothing has to be trained for it, and class and state dict stay as they are. The choices are
    `keep.<i>`, 0 or 1, in the order in which the blocks run. Extraction gives a copy in which an
    `nn.Identity` stands for each block that is left out; everything else keeps its name. Forward
    hooks of a block run where it is skipped too, and go along with the identity.

    Args:
        net: A network of torch, `timm` or your own, or a LightningModule.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of `forward`;
            a copy of the network is run on it.
        blocks: Which may be skipped: a class, or names as in `named_modules()`. By default the
            residual modules that run once on one tensor: with all their weights at zero, or all but
            those that scale, they return their input, or its ReLU. Of those that lie in one
            another the smaller are taken, unless much of the computing is outside of them: the
            blocks of a stage, and no normalisation in a block.

    Returns:
        The same object, with `search_space()`, `activate(subnet)`, `extract(subnet)` and
        `active_subnet`.

    Raises:
        SearchError: The network is not a module, or does not have a module of that name.
        ElasticityError: There are no such blocks, or one that was named changes its shape, does not
            run exactly once, or takes more than one tensor. Also raised in extraction, where a hook
            of a skipped block needs the block itself.

    Warns:
        ElasticityWarning: The smallest subnet has nearly all MACs of the network.

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
    trial: nn.Module = detached_copy(net, {})  # a network may remember what it computes
    calls = module_calls(trial, example_input, candidates)
    reasons = {name: why_not_skippable(calls.runs.get(name, [])) for name in candidates}
    if blocks is None:
        residual = residual_blocks(net, calls)
        names = [name for name in residual if not reasons[name]]
    else:
        residual = names = list(calls.runs)
        if reason := next(filter(None, reasons.values()), ""):
            name = next(name for name in candidates if reasons[name])
            msg = f"Block {name!r} of {type(net).__name__} cannot be skipped: it {reason}."
            raise ElasticityError(msg)
    if not names:
        but = "".join(f" ({name!r} adds, but {reasons[name]})" for name in residual[:1])
        msg = (
            f"{type(net).__name__} has no block that adds to its input and keeps its shape{but}. "
            "Name the blocks, skippable_blocks(net, input, blocks=Block), or use elastic()."
        )
        raise ElasticityError(msg)
    share = calls.share_without(trial, names)
    if share is not None and share > _MOST:
        kind = type(net.get_submodule(names[0])).__name__
        msg = (
            f"Without all {len(names)} blocks that may be skipped, {type(net).__name__} still has "
            f"{share:.1%} of its MACs; the first of them is {names[0]!r}, a {kind}. "
            "Name larger ones with blocks=."
        )
        warn(msg, ElasticityWarning)
    space = SearchSpace({f"keep.{i}": [0, 1] for i in range(len(names))})
    likes = {name: torch.empty_like(calls.runs[name][0].args[0], device="meta") for name in names}

    def activate(net: nn.Module, subnet: Subnet) -> None:
        previous = getattr(net, "active_subnet", None)
        if previous is not None:
            _check_forwards(net, _skipped(names, previous))
        skipped = _skipped(names, subnet)
        for name in names:
            _skip(net.get_submodule(name), skip=name in skipped)

    def extract(net: nn.Module, subnet: Subnet) -> nn.Module:
        return _without(net, {name: likes[name] for name in _skipped(names, subnet)})

    return elastic(net, space=space, activate=activate, extract=extract)


class _Through:
    """The forward of a block that is skipped: its input.

    Args:
        before: What the block had as a `forward` of its own instance, if anything.
    """

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _skip(block: nn.Module, *, skip: bool) -> None:
    """Let a block be skipped, or run as it did before."""
    attributes = vars(block)
    forward = attributes.get("forward")
    if skip and not isinstance(forward, _Through):
        attributes["forward"] = _Through(forward)
    elif not skip and isinstance(forward, _Through):
        del attributes["forward"]
        if forward.before is not None:
            attributes["forward"] = forward.before


def _check_forwards(net: nn.Module, names: list[str]) -> None:
    """Raise if something else has replaced the `forward` of a block while it was skipped."""
    for name in names:
        forward = vars(net.get_submodule(name)).get("forward")
        if forward is not None and not isinstance(forward, _Through):
            msg = (
                f"The forward() of block {name!r} of {type(net).__name__} was replaced while the "
                "block was skipped, so that what it was cannot come back. Activate the largest "
                "subnet before you wrap blocks."
            )
            raise ElasticityError(msg)


def _skipped(names: list[str], subnet: Subnet) -> list[str]:
    return [name for name, keep in zip(names, subnet.values(), strict=True) if not keep]


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


def _without(net: nn.Module, skipped: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy in which an identity stands for some blocks, with no trace of elasticity.

    Args:
        net: The network.
        skipped: The blocks by name, with tensors of the size and type of their inputs.
    """
    identities = {name: nn.Identity() for name in skipped}
    both = nn.Module()  # so that hooks and network are copied as one: a hook may know a layer
    both.net = net
    vars(both)["hooks"] = {name: _hooks(net.get_submodule(name)) for name in skipped}
    # What is skipped is not copied at all.
    memo = {id(net.get_submodule(name)): identity for name, identity in identities.items()}
    copies = detached_copy(both, memo)
    plain: nn.Module = copies.net
    detach(plain)
    for module in plain.modules():
        _skip(module, skip=False)
    for name, like in skipped.items():
        if hooks := copies.hooks[name]:
            vars(identities[name]).update(hooks)
            _check_hooks(name, net.get_submodule(name), identities[name], like)
    return plain


def _hooks(block: nn.Module) -> dict[str, Any]:
    """Return the forward hooks of a block by attribute; nothing if it has none.

    Hooks that make weights have nothing to do where the block does not run.
    """
    hooks = {name: OrderedDict(vars(block)[name]) for name in _HOOKS}
    for key, hook in [*hooks["_forward_pre_hooks"].items()]:
        if isinstance(hook, WEIGHT_HOOKS):
            for of_kind in hooks.values():
                of_kind.pop(key, None)
    return hooks if hooks["_forward_pre_hooks"] or hooks["_forward_hooks"] else {}


def _check_hooks(name: str, block: nn.Module, identity: nn.Module, like: torch.Tensor) -> None:
    """Raise if hooks do something else around an identity than around the block that is skipped.

    Args:
        name: The name of the block.
        block: The block.
        identity: What stands for it, with copies of its hooks.
        like: A tensor of the size and type of its input.
    """
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    with random_state(0), torch.no_grad():
        x = torch.rand(like.shape, device=device).to(like.dtype)
        with evaluating(block), shadowed(block, "forward", _Through(None)), random_state(0):
            try:
                expected = block(x.clone())
            except Exception:  # it needs a pass of the whole network, which is not ours to make
                return
        try:
            with random_state(0):
                output = identity.eval()(x.clone())
            gap = difference(expected, output)
            if gap.relative <= default_tolerance([x]):
                return
            reason = f"gives another output there, {gap}"
        except Exception as error:
            reason = f"fails there: {type(error).__name__}: {error!s:.100}"
    msg = (
        f"A forward hook of block {name!r} ({type(block).__name__}) cannot go along with the "
        f"nn.Identity that stands for it where it is skipped: it {reason}. "
        "Let the hook use nothing of the block, or put it on the module around it."
    )
    raise ElasticityError(msg)
