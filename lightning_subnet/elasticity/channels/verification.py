# SPDX-License-Identifier: Apache-2.0
"""Proof that units may be dropped: slices give what the whole network gives if nothing reads them.

The whole network computes with all its channels; those weights that read a dropped one are zero.
The same network with slices must give the same outputs. Both run on a copy in double precision,
with weights shaken, so that zeros of a fresh network hide nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_subnet._torch.contexts import (
    plain_attention,
    random_state,
    same_buffers,
    shadowed,
)
from lightning_subnet._torch.inputs import arguments, cloned
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.outputs import Difference, difference
from lightning_subnet.elasticity.channels.discovery import ChannelGroup
from lightning_subnet.elasticity.channels.operators import Axis
from lightning_subnet.elasticity.channels.results import results
from lightning_subnet.elasticity.channels.slices import Count, Slices
from lightning_subnet.elasticity.extraction import detached_copy
from lightning_subnet.errors import ElasticityError

_SHAKES = 4  # weights with which a group may act on the outputs
_TRIES = 24  # sets of attributes that are tried for a group
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}
_COUNTS = re.compile(
    r"head|dim|size|channel|feature|width|hidden|inner|embed|planes|^n_|^num_|^n[a-z]?$|^d_"
)
_COUNTS_OTHERS = re.compile(  # what has the same number by chance, and is not of the channels
    r"class|label|vocab|layer|block|step|epoch|batch|iter|sample|token|position|patch|image|level|"
    r"stage|target|worker|device|length|max_|min_"
)
_OF_STREAMS = re.compile(r"d_model|model_dim|embed_dim|hidden_size|^dim$|hidden_dim|group")
_OF_A_HEAD = re.compile(
    r"head_?dim|dim_?head|(?<!all_)head_?size|d_head|per_head|^d_[kqv]$|key_dim"
)


class Trial:
    """A copy of a network on which units are dropped.

    Args:
        net: The network.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        ElasticityError: The network does not give the same outputs twice.
    """

    def __init__(self, net: nn.Module, example_input: Any) -> None:
        self.net: Any = detached_copy(net, {}).eval()
        self.name = class_name(net)
        self._n_shakes = 0
        with random_state(0):
            _shake(self.net)
            self.args, self.kwargs = tree_map(_varied, arguments(net, example_input))
        self.dtype = torch.float32
        self.whole: Any = None
        for dtype in (torch.float64, torch.float32):
            self.net.to(dtype)
            self.args, self.kwargs = tree_map(partial(_cast, dtype=dtype), (self.args, self.kwargs))
            try:
                self.whole = self.run()
            except Exception:
                if dtype == torch.float32:
                    raise
            else:
                self.dtype = dtype
                break
        if self.whole and not any(x.isfinite().any() for x in self.whole.values()):
            msg = (
                f"{self.name} gives NaN or infinity alone for the example input. Look at its "
                "weights, or pass an example like the data it was trained on."
            )
            raise ElasticityError(msg)
        self.learns = self._learns()
        self.draws = not self.close(self.whole, self.run(seed=1))
        gap = difference(self.whole, self.run())
        if not gap.relative <= _CLOSE[self.dtype]:
            msg = (
                f"{self.name} gives other outputs on the same input in two passes in eval mode "
                f"({gap}), so it cannot be proved which channels may be dropped. Its forward() "
                "must not depend on what it saw before, nor draw at random in eval mode."
            )
            raise ElasticityError(msg)

    def _learns(self) -> bool:
        """Return whether it also runs in training mode, on this example."""
        try:
            self.run_in_training()
        except Exception:  # of any class: a BatchNorm of one value per channel, and the like
            return False
        return True

    def shake_again(self) -> None:
        """Change all weights at random once more."""
        self._n_shakes += 1
        with random_state(self._n_shakes):
            _shake(self.net)
        self.whole = self.run()

    def run_in_training(self) -> None:
        """Run the network in training mode, where it may have other branches."""
        with same_buffers(self.net):
            self.net.train()
            try:
                self.run()
            finally:
                self.net.eval()

    def run(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return the outputs of the network.

        Args:
            seed: What it draws with, if it does.
        """
        with ExitStack() as stack:
            for context in (torch.no_grad(), random_state(seed), plain_attention()):
                stack.enter_context(context)
            output = self.net(*cloned(self.args), **cloned(self.kwargs))
        return results(output)

    def masked(
        self, groups: Sequence[ChannelGroup], dropped: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the outputs of the whole network in which nothing reads some units.

        Args:
            groups: Groups of channels.
            dropped: Of each, the units that are dropped.
        """
        tensors = dict(self.net.named_parameters())
        before: dict[str, torch.Tensor] = {}
        norms: dict[Axis, torch.Tensor] = {}
        for group, units in zip(groups, dropped, strict=True):
            for axis in group.norms:
                norms[axis] = torch.cat(
                    [norms.get(axis, units[:0]), group.axes[axis][units].flatten()]
                )
            for name, dim in group.readers:
                tensor = tensors[name]
                before.setdefault(name, tensor.detach().clone())
                tensor.data.index_fill_(dim, group.axes[name, dim][units].flatten(), 0.0)
        try:
            with _normalising_what_is_left(self.net, norms):
                return self.run()
        finally:
            for name, value in before.items():
                tensors[name].data.copy_(value)

    def sliced(self, slices: Slices, kept: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs of the network with slices in force.

        Args:
            slices: What may be dropped.
            kept: By group, the units that are kept.

        Raises:
            Exception: The network does not run like this, in eval or in training mode.
        """
        slices.attach(self.net)
        try:
            slices.put(self.net, kept)
            output = self.run()
            if self.learns:
                self.run_in_training()
            return output
        finally:
            slices.put(self.net, [group.units for group in slices.groups])

    def close(self, expected: Any, output: Any) -> bool:
        """Return whether outputs are the same but for rounding."""
        return difference(expected, output).relative <= _CLOSE[self.dtype]


def prove(trial: Trial, group: ChannelGroup, values: Sequence[int] = ()) -> tuple[list[Count], str]:
    """Return attributes that must be kept in step with a group, and why it cannot be sliced.

    Args:
        trial: A copy of the network.
        group: The group; in the attributes it has the number 0.
        values: How many first units may be kept. Some code works for some numbers alone: what
            shuffles the channels of one unit per group leaves them in order.

    Returns:
        The attributes, and an empty string if every second unit may be dropped, and all but the
        first few.
    """
    n = group.units
    firsts = [v for v in values if v < n] or [max(1, n // 4)]
    keeps = [torch.arange(0, n, 2), *(torch.arange(v) for v in firsts)]
    for _ in range(_SHAKES):
        expected = []
        for keep in keeps:
            away = torch.ones(n, dtype=torch.bool)
            away[keep] = False
            expected.append(trial.masked([group], [away.nonzero().flatten()]))
        if not trial.close(trial.whole, expected[0]):
            break
        trial.shake_again()  # with other weights, a ReLU may let some of it through
    else:
        return [], "nothing of it acts on the outputs for this example"

    def gaps(counts: Sequence[Count]) -> list[Difference]:
        slices = Slices([group], counts)
        pairs = zip(expected, keeps, strict=True)
        return [difference(e, trial.sliced(slices, [keep])) for e, keep in pairs]

    def works(counts: Sequence[Count]) -> bool:
        try:
            return all(gap.relative <= _CLOSE[trial.dtype] for gap in gaps(counts))
        except Exception:  # of any class: the network does not run like this
            return False

    reason = ""
    for counts in islice(_sets_of_counts(trial.net, group), _TRIES):
        try:
            all_gaps = gaps(counts)
        except Exception as error:  # of any class, as above
            reason = reason or f"a network without some of it fails: {_line(error)}"
            continue
        if all(gap.relative <= _CLOSE[trial.dtype] for gap in all_gaps):
            return _with_needs(counts, works), ""
        worst = max(all_gaps, key=lambda gap: gap.relative)
        reason = f"a network without some of it gives other outputs: {worst}"
    if trial.draws:
        reason += "; its forward() draws at random in eval mode"
    return [], reason


def _with_needs(counts: Sequence[Count], works: Callable[[Sequence[Count]], bool]) -> list[Count]:
    """Return attributes with whether the network needs each of them."""
    needed = [] if not counts or works([]) else list(counts)
    for count in list(needed):
        rest = [c for c in needed if c is not count]
        if works(rest):
            needed = rest
    return [replace(c, needed=c in needed) for c in counts]


def likely_counts(net: nn.Module, group: ChannelGroup) -> tuple[Count, ...]:
    """Return the attributes that most likely count units of a group, which has the number 0."""
    return next(_sets_of_counts(net, group))


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def _sets_of_counts(net: nn.Module, group: ChannelGroup) -> Iterator[tuple[Count, ...]]:
    """Return sets of attributes that may count units of a group, the likeliest first."""
    n = group.units
    most = {places.shape[1] for places in group.axes.values()}
    # Queries that share a key-value head are several of one unit, and fewer than its channels.
    sizes = {n * m: m for k in most for m in range(1, k + 1) if k % m == 0}
    parents: dict[str, None] = {}
    for name, _ in group.axes:
        owner = name.rpartition(".")[0]
        for _ in range(2):  # the layer itself and what holds it
            parents.setdefault(owner)
            owner = owner.rpartition(".")[0]
    candidates = []
    for name in parents:
        module = net.get_submodule(name)
        if _is_layer(module):
            continue
        for attribute, value in vars(module).items():
            if (
                type(value) is int
                and value in sizes
                and _COUNTS.search(attribute)
                and not _COUNTS_OTHERS.search(attribute)
            ):
                candidates.append(Count(name, attribute, 0, sizes[value]))
    unlikely = {
        c.name
        for c in candidates
        if (not group.norms and _OF_STREAMS.search(c.name)) or _OF_A_HEAD.search(c.name)
    }
    likely = [c for c in candidates if c.name not in unlikely]
    by_name: dict[str, list[Count]] = {}
    for count in candidates:
        by_name.setdefault(count.name, []).append(count)
    sets = [likely, [], candidates]
    sets += [[c for c in candidates if c.name != name] for name in by_name]
    sets += by_name.values()
    sets += [[c for c in candidates if c.name not in pair] for pair in combinations(by_name, 2)]
    yield from dict.fromkeys(map(tuple, sets))


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer, whose own attributes are known from its weights."""
    if {"nf", "nx"} <= vars(module).keys():  # Conv1D of transformers
        return True
    return any(
        cls.__module__.startswith("torch.nn.modules")
        and cls is not nn.Module
        and not cls.__module__.endswith("container")
        for cls in type(module).__mro__
    )


@contextmanager
def _normalising_what_is_left(net: nn.Module, norms: dict[Axis, torch.Tensor]) -> Iterator[None]:
    """Let normalisations over channels work on those alone that are not dropped.

    Args:
        net: The network.
        norms: By the axis of a weight of theirs, the channels that are dropped.
    """
    if not norms:
        yield
        return
    tensors = dict(net.named_parameters())
    by_id = {id(tensors[name]): away for (name, _), away in norms.items() if name in tensors}
    with ExitStack() as stack:
        for module in net.modules():
            own = [p for p in module.parameters(recurse=False) if id(p) in by_id]
            if (
                own
                and not type(module).__module__.startswith("torch.nn.")
                and len(own) == len(list(module.parameters(recurse=False)))
                and all(p.ndim == 1 for p in own)
            ):
                away = by_id[id(own[0])]
                forward = partial(_on_what_is_left, module, away)
                stack.enter_context(shadowed(module, "forward", forward))
        stack.enter_context(_Norms(by_id))
        yield


def _on_what_is_left(module: Any, away: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Run a module of somebody's own on the channels that are left; the others give zeros."""
    size = next(module.parameters(recurse=False)).numel()
    dim = x.ndim - 1 if x.shape[-1] == size else list(x.shape).index(size, 1)
    left = _left(size, away)
    own = {
        name: nn.Parameter(p.detach()[left], requires_grad=False)
        for name, p in module.named_parameters(recurse=False)
    }
    part = x.index_select(dim, left)
    plain = type(module).forward
    with ExitStack() as stack:
        stack.enter_context(shadowed(module, "_parameters", {**module._parameters, **own}))
        for name, value in list(vars(module).items()):
            if value == (size,) or (type(value) is int and value == size):
                stack.enter_context(
                    shadowed(module, name, (len(left),) if value == (size,) else len(left))
                )
        y = plain(module, part)
    return torch.zeros_like(x).index_copy(dim, left, y)


def _left(size: int, away: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[away] = False
    return mask.nonzero().flatten()


class _Norms(TorchFunctionMode):
    """Lets torch's normalisations over channels work on those alone that are not dropped.

    Args:
        away: By the id of a weight, the channels that are dropped.
    """

    def __init__(self, away: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self._away = away

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        if func in (F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm):
            names = ("input", "normalized_shape", "weight", "bias_or_eps", "eps")
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            weights = [
                w for w in call.values() if isinstance(w, torch.Tensor) and id(w) in self._away
            ]
            if weights:
                x = call["input"]
                left = _left(x.shape[-1], self._away[id(weights[0])])

                def part(value: Any) -> Any:
                    if isinstance(value, torch.Tensor):
                        return value.index_select(value.ndim - 1, left)
                    return (len(left),) if isinstance(value, (tuple, list, torch.Size)) else value

                y = func(*map(part, args), **{k: part(v) for k, v in kwargs.items()})
                return torch.zeros_like(x).index_copy(x.ndim - 1, left, y)
        return func(*args, **kwargs)


def _shake(net: nn.Module) -> None:
    """Change all weights at random, so that none is zero and no two layers are alike."""
    for p in net.parameters():
        if not p.is_floating_point():
            continue
        size = p.detach().double().square().mean().sqrt().item()
        least = 1 / math.sqrt(max(p[0].numel(), 1)) if p.ndim > 1 else 1.0
        scale = max(size, least) if math.isfinite(size) else least
        p.data.add_((0.3 * scale * torch.randn(p.shape, dtype=torch.float32)).to(p.dtype))
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1 * torch.randn_like(buffer))
        elif name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand_like(buffer))


def _varied(x: Any) -> Any:
    """Return an input that tells channels apart, where one is all the same number."""
    if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() > 1:
        return x if (x != x.flatten()[0]).any() else torch.randn(x.shape, dtype=torch.float32).to(x)
    return x


def _cast(x: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.to(dtype) if floating else x
