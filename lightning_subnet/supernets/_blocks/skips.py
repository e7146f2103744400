# SPDX-License-Identifier: Apache-2.0
"""Residual blocks that may be skipped: which they are, skipping them, and a copy without them."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._torch.contexts import evaluating, random_state, shadowed
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.outputs import default_tolerance, difference
from lightning_subnet._torch.structures import flatten, kind, unflatten
from lightning_subnet.elasticity.extraction import detached_copy
from lightning_subnet.elasticity.protocol import detach
from lightning_subnet.errors import ElasticityError, SearchError
from lightning_subnet.supernets._blocks.removal import Numbers, forget_nested, put_nested, take_out
from lightning_subnet.supernets._blocks.residual import (
    WEIGHT_HOOKS,
    Run,
    module_calls,
    residual_blocks,
)

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_BEFORE = "_forward_before_skip"  # what a skipped block had as a `forward` of its own instance


@dataclass(frozen=True)
class Source:
    """Where a block gets one of its inputs from.

    Args:
        position: The position of the argument; None if it is only given by name.
        name: The name of the argument; None if it is only given by position.
        path: The keys of the input in the argument; nothing if it is the argument.
    """

    position: int | None
    name: str | None
    path: tuple[Any, ...] = ()

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the input out of the arguments of a call."""
        if self.name is not None and self.name in kwargs:
            value = kwargs[self.name]
        elif self.position is not None and self.position < len(args):
            value = args[self.position]
        else:
            which = f"{self.name!r}" if self.name else f"number {self.position}"
            msg = f"The call of a skipped block is without its argument {which}."
            raise TypeError(msg)
        for key in self.path:
            value = value[key]
        return value


@dataclass(frozen=True)
class Passage:
    """What goes through a block that is skipped.

    Args:
        stream: The input that the block adds to.
        leaves: Where each leaf of its output comes from; None: it is None. Empty: the output is the
            stream.
        form: The structure of its output, with the numbers of the leaves in their places.
    """

    stream: Source
    leaves: tuple[Source | None, ...] = ()
    form: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the skipped block for the arguments of a call."""
        if self.form is None:
            return self.stream.of(args, kwargs)
        values = [None if leaf is None else leaf.of(args, kwargs) for leaf in self.leaves]
        if self.form == (*range(len(values)),):
            return tuple(values)  # what a compiler can follow
        order, spec = flatten(self.form)
        return unflatten((values[i] for i in order), spec)


class SkippedBlock(nn.Module):
    """What stands for a block that was left out, where an `nn.Identity` cannot.

    It has the numbers, words and flags of the block, and of the modules in it, as attributes: the
    network around may ask for them.

    Args:
        passage: What goes through.
        block: The block.
    """

    def __init__(self, passage: Passage, block: nn.Module) -> None:
        super().__init__()
        self._passage = passage
        for name, value in vars(_attributes(block)).items():
            if not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the stream, in the structure in which the block gave its output."""
        return self._passage(*args, **kwargs)


def _attributes(module: nn.Module) -> SimpleNamespace:
    """Return the numbers, words and flags of a module and of those in it."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (value is None or isinstance(value, bool | int | float | str))
    }
    return SimpleNamespace(**plain, **{n: _attributes(m) for n, m in module.named_children()})


@dataclass
class Skips:
    """The residual blocks of a network that may be skipped.

    It knows them by their names, and serves every copy of the network.

    Args:
        names: Those that may be skipped, in the order in which they run.
        refused: Why the other residual blocks cannot be skipped, by name.
        residual: All residual blocks, in the order in which they run.
        macs: The multiply-accumulates of each of those, as far as they are known.
        least_share: The share of the MACs that is left without all `names`; None if unknown.
        passages: What goes through each of `names` where it is skipped.
        inputs: The arguments of each of `names`, with tensors of no values.
        example_input: What `forward` of the network takes.
        numbers: By which blocks find their places in a cache.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 4)
        ...     def forward(self, x, mask=None):
        ...         return x + self.layer(x), None
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = nn.ModuleList(Block() for _ in range(3))
        ...     def forward(self, x):
        ...         for block in self.blocks:
        ...             x, _ = block(x, mask=None)
        ...         return x
        >>> net = Net()
        >>> skips = Skips.find(net, torch.zeros(1, 4))
        >>> skips.names, skips.refused
        (['blocks.0', 'blocks.1', 'blocks.2'], {})
        >>> skips.put(net, ["blocks.1"])
        >>> small = skips.extract(net, ["blocks.1"], remove=True)
        >>> len(small.blocks), torch.equal(small(torch.ones(1, 4)), net(torch.ones(1, 4)))
        (2, True)
    """

    names: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    residual: list[str] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    least_share: float | None = None
    passages: dict[str, Passage] = field(default_factory=dict, repr=False)
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=dict, repr=False
    )
    example_input: Any = field(default=None, repr=False)
    numbers: Numbers = field(default_factory=Numbers, repr=False)

    @classmethod
    def find(
        cls,
        net: nn.Module,
        example_input: Any,
        blocks: type[nn.Module] | Iterable[str] | None = None,
    ) -> Skips:
        """Return the residual blocks of a network.

        A block may be skipped if it runs once, gives the tensor that it adds to in the same size
        again, and besides it nothing but None and what it got.

        Args:
            net: The network; a copy of it is run.
            example_input: A tensor, a tuple of positional or a dict of keyword arguments.
            blocks: Which to look at, whether they add or not: a class, or names as in
                `named_modules()`. None: all residual blocks.

        Raises:
            SearchError: The network does not have a module of that name.
            ElasticityError: It has none of that class, or does not take the input.
        """
        candidates = _candidates(net, blocks)
        trial: nn.Module = detached_copy(net, {})  # a network may remember what it computes
        calls = module_calls(trial, example_input, candidates)
        chosen, streams = residual_blocks(net, calls)
        residual = chosen if blocks is None else [*calls.runs]
        numbers = Numbers.find(net, residual)
        refused, passages = {}, {}
        for name in dict.fromkeys([*residual, *(() if blocks is None else candidates)]):
            runs = calls.runs.get(name, [])
            passage: Passage | str = f"runs {len(runs)} times"
            if len(runs) == 1:
                passage = _passage(net.get_submodule(name), runs[0], streams.get(name))
            passage = numbers.why_needed(net, name) or passage
            if isinstance(passage, str):
                refused[name] = passage
            else:
                passages[name] = passage
        names = [name for name in residual if name in passages]
        return cls(
            names=names,
            refused=refused,
            residual=residual,
            macs={name: calls.macs[name] for name in residual if name in calls.macs},
            least_share=calls.share_without(trial, names),
            passages=passages,
            inputs={name: _sizes(calls.runs[name][0]) for name in names},
            example_input=example_input,
            numbers=numbers,
        )

    def put(self, net: nn.Module, skipped: Iterable[str]) -> None:
        """Skip some blocks of a network, and run all others.

        Args:
            net: The network, or a copy of it.
            skipped: Names of the blocks.

        Raises:
            SearchError: There is no such block.
            ElasticityError: Something else has replaced the `forward` of a block while it was
                skipped.
        """
        skipped = self._known(skipped)
        for name in self.names:
            _check_forward(net, name)
        for name in self.names:
            _skip(net.get_submodule(name), self.passages[name] if name in skipped else None)
        self._put_around(net, skipped)

    def extract(self, net: nn.Module, skipped: Iterable[str], *, remove: bool = False) -> nn.Module:
        """Return a copy of a network without some blocks, and with no trace of elasticity.

        Args:
            net: The network, or a copy of it; whatever is skipped in it.
            skipped: Names of the blocks.
            remove: Whether blocks are taken out of lists that the network runs through, where that
                gives the same output. Otherwise, and where it does not, an `nn.Identity` stands for
                a block of one tensor, and a `SkippedBlock` for any other.

        Raises:
            SearchError: There is no such block.
            ElasticityError: A forward hook of a skipped block needs the block itself.
        """
        return self.extracted(net, skipped, remove=remove)[0]

    def extracted(
        self, net: nn.Module, skipped: Iterable[str], *, remove: bool = False
    ) -> tuple[nn.Module, dict[str, set[str]]]:
        """Return what `extract` does, and by name of a list what was taken out of it."""
        skipped = self._known(skipped)
        stand_ins: dict[str, nn.Module] = {
            name: self._stand_in(net, name) for name in self.names if name in skipped
        }
        both = nn.Module()  # so that hooks and network are copied as one: a hook may know a layer
        both.net = net
        vars(both)["hooks"] = {name: _hooks(net.get_submodule(name)) for name in stand_ins}
        # What is skipped is not copied at all.
        memo = {id(net.get_submodule(name)): stand_in for name, stand_in in stand_ins.items()}
        copies = detached_copy(both, memo)
        plain: nn.Module = copies.net
        detach(plain)
        for module in plain.modules():
            _skip(module, None)
        for name, stand_in in stand_ins.items():
            if hooks := copies.hooks[name]:
                vars(stand_in).update(hooks)
                self._check_hooks(name, net.get_submodule(name), stand_in)
        self._put_around(plain, skipped)
        forget_nested(plain)
        lists: dict[str, set[str]] = {}
        if remove and stand_ins:
            lists = take_out(plain, stand_ins, self.numbers, self.example_input)
        return plain, lists

    def _put_around(self, net: nn.Module, skipped: set[str]) -> None:
        """Put in force what depends on which blocks are skipped, and is none of them."""
        self.numbers.put(net, skipped)
        put_nested(net, self.names, skipped)

    def _known(self, skipped: Iterable[str]) -> set[str]:
        skipped = list(skipped)
        for name in skipped:
            if name not in self.passages:
                hint = did_you_mean(name, self.names)
                msg = f"There is no block {name!r} that may be skipped.{hint}"
                raise SearchError(msg)
        return set(skipped)

    def _stand_in(self, net: nn.Module, name: str) -> nn.Module:
        passage = self.passage_needed(name)
        return nn.Identity() if passage is None else SkippedBlock(passage, net.get_submodule(name))

    def passage_needed(self, name: str) -> Passage | None:
        """Return what goes through a skipped block, or None if an `nn.Identity` can stand there."""
        args, kwargs = self.inputs[name]
        passage = self.passages[name]
        plain = len(args) == 1 and not kwargs
        return None if plain and passage == Passage(Source(0, passage.stream.name)) else passage

    def _check_hooks(self, name: str, block: nn.Module, stand_in: nn.Module) -> None:
        """Raise if hooks do something else around a stand-in than around the skipped block.

        Args:
            name: The name of the block.
            block: The block.
            stand_in: What stands for it, with copies of its hooks.
        """
        passage = self.passages[name]
        device = next((p.device for p in block.parameters()), torch.device("cpu"))
        with random_state(0), torch.no_grad():
            args, kwargs = _values(self.inputs[name], device)
            inputs = [x for x in flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
            with evaluating(block), shadowed(block, "forward", passage), random_state(0):
                try:
                    expected = block(*tree_map(_cloned, args), **tree_map(_cloned, kwargs))
                except Exception:  # it needs a pass of the whole network, which is not ours to make
                    return
            try:
                with random_state(0):
                    output = stand_in.eval()(*args, **kwargs)
                gap = difference(expected, output)
                if gap.relative <= default_tolerance(inputs):
                    return
                reason = f"gives another output there, {gap}"
            except Exception as error:
                reason = f"fails there: {type(error).__name__}: {error!s:.100}"
        msg = (
            f"A forward hook of block {name!r} ({class_name(block)}) cannot go along with the "
            f"{_kind(stand_in)} that stands for it where it is skipped: it {reason}. "
            "Let the hook use nothing of the block, or put it on the module around it."
        )
        raise ElasticityError(msg)


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


def _kind(stand_in: nn.Module) -> str:
    return "nn.Identity" if isinstance(stand_in, nn.Identity) else class_name(stand_in)


def _candidates(net: nn.Module, blocks: type[nn.Module] | Iterable[str] | None) -> list[str]:
    """Return the names of the modules that may be blocks."""
    names = {name: module for name, module in net.named_modules() if name}
    if blocks is None:
        return [n for n, m in names.items() if next(m.parameters(), None) is not None]
    if isinstance(blocks, type):
        of_class = [name for name, module in names.items() if isinstance(module, blocks)]
        if not of_class:
            kinds = {class_name(module) for module in names.values()}
            msg = f"{class_name(net)} has no {blocks.__name__}; it has {listed(sorted(kinds))}."
            raise ElasticityError(msg)
        return of_class
    candidates = [blocks] if isinstance(blocks, str) else list(blocks)
    for name in candidates:
        if name not in names:
            msg = f"{class_name(net)} has no module {name!r}.{did_you_mean(name, names)}"
            raise SearchError(msg)
    return candidates


def _passage(block: nn.Module, run: Run, stream: torch.Tensor | None) -> Passage | str:
    """Return what goes through a block where it is skipped, or why it cannot be.

    Args:
        block: The block.
        run: Its run.
        stream: The input that it adds to; None: the first tensor that it gets.
    """
    stream = next(iter(run.inputs), None) if stream is None else stream
    result = run.result
    if stream is None or result is None or (stream.shape, stream.dtype) != (
        result.shape, result.dtype,
    ):  # fmt: skip
        return _why_no_stream(run, stream)
    sources = _sources(block, run)
    through = Passage(_source(sources, stream))
    if run.output is result:
        return through
    leaves, spec = flatten(run.output)
    places: list[Source | None] = []
    at = next(i for i, leaf in enumerate(leaves) if leaf is result)
    for i, leaf in enumerate(leaves):
        if i == at or leaf is None:
            places.append(through.stream if i == at else None)
            continue
        place = _source(sources, leaf)
        if place is None:
            what = f"a tensor of {tuple(leaf.shape)}" if torch.is_tensor(leaf) else f"{leaf!r:.40}"
            return f"gives a {kind(spec)} in which element {i} is its own, {what}"
        places.append(place)
    return Passage(through.stream, tuple(places), unflatten(range(len(places)), spec))


def _why_no_stream(run: Run, stream: torch.Tensor | None) -> str:
    """Return why no tensor goes through a block."""
    result = run.result
    if stream is None:
        return "takes no tensor"
    if result is None:
        return f"gives {'nothing' if run.output is None else f'a {type(run.output).__name__}'}"
    if result.shape != stream.shape:
        return f"makes {tuple(result.shape)} of {tuple(stream.shape)}"
    return f"makes {result.dtype} of {stream.dtype}"


def _source(sources: list[tuple[Source, Any]], value: Any) -> Any:
    """Return where a value comes from; None if from nowhere, or a constant from several places."""
    places = [source for source, item in sources if item is value]
    if isinstance(value, bool | int | float | str) and len(places) > 1:
        return None
    return next(iter(places), None)


def _sources(block: nn.Module, run: Run) -> list[tuple[Source, Any]]:
    """Return all inputs of a run of a block, arguments and what lies in them."""
    try:
        # That of the instance may be a wrapper of any arguments.
        parameters = [*inspect.signature(type(block).forward).parameters.values()][1:]
    except (TypeError, ValueError):
        parameters = []
    both = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    names, positions = dict(enumerate(both)), {name: i for i, name in enumerate(both)}
    return [
        *(
            (Source(i, names.get(i), path), item)
            for i, value in enumerate(run.args)
            for path, item in _items(value)
        ),
        *(
            (Source(positions.get(name), name, path), item)
            for name, value in run.kwargs.items()
            for path, item in _items(value)
        ),
    ]


def _items(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Return a value and what lies in it, with the keys that lead there."""
    yield path, value
    if isinstance(value, tuple | list | Mapping):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in pairs:
            yield from _items(item, (*path, key))


def _sizes(run: Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a run: tensors without values, and None for objects like caches."""

    def size(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return torch.empty_like(x, device="meta")
        return x if isinstance(x, bool | int | float | str) else None

    return tree_map(size, (run.args, dict(run.kwargs)))  # type: ignore[no-any-return] # as they are


def _values(sizes: Any, device: torch.device) -> Any:
    """Return arguments with random values for tensors of no values."""

    def value(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if x.is_floating_point():
            return torch.rand(x.shape, device=device).to(x.dtype)
        return torch.zeros(x.shape, dtype=x.dtype, device=device)

    return tree_map(value, sizes)


def _cloned(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else x


def _skip(block: nn.Module, passage: Passage | None) -> None:
    """Let a block be skipped, or run as it did before."""
    attributes = vars(block)
    if passage is not None:
        if _BEFORE not in attributes:
            attributes[_BEFORE] = attributes.get("forward")
        attributes["forward"] = passage
    elif _BEFORE in attributes:
        del attributes["forward"]
        before = attributes.pop(_BEFORE)
        if before is not None:
            attributes["forward"] = before


def _check_forward(net: nn.Module, name: str) -> None:
    """Raise if something else has replaced the `forward` of a block while it was skipped."""
    attributes = vars(net.get_submodule(name))
    if _BEFORE in attributes and not isinstance(attributes.get("forward"), Passage):
        msg = (
            f"The forward() of block {name!r} of {class_name(net)} was replaced while the "
            "block was skipped, so that what it was cannot come back. Activate the largest "
            "subnet before you wrap blocks."
        )
        raise ElasticityError(msg)
