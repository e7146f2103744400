# SPDX-License-Identifier: Apache-2.0
"""Blocks taken out of the lists that a network runs through, and all that counts them in step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_subnet._torch.contexts import evaluating, random_state
from lightning_subnet._torch.inputs import arguments
from lightning_subnet._torch.outputs import default_tolerance, difference, named_outputs
from lightning_subnet.elasticity.extraction import detached_copy

LISTS = (nn.ModuleList, nn.Sequential)
"""Modules that may lose some of what they hold."""

_INDEX = "layer_idx"  # by which the layers of transformers find their place in a cache
_COUNTS = ("layer", "block", "depth")  # parts of names of attributes that count layers
_NESTED = "_use_nested_tensor_before_skip"


@dataclass
class Numbers:
    """The numbers of blocks in lists, by which they find their places in a cache.

    A cache knows its length by its first place, so numbers have no gaps where blocks are skipped.

    Args:
        lists: By name of a list: the names of the modules with a number, in each of its blocks.
        mixed: The kinds of the layers in lists that have several: those keep their numbers, as the
            places of their cache are of kinds too.
    """

    lists: dict[str, list[list[str]]] = field(default_factory=dict)
    mixed: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def find(cls, net: nn.Module, blocks: Iterable[str]) -> Numbers:
        """Return the numbers of the blocks in those lists that count from zero."""
        numbers = cls()
        for name in dict.fromkeys(block.rpartition(".")[0] for block in blocks):
            holder = net.get_submodule(name)
            if not isinstance(holder, LISTS):
                continue
            numbered = [
                [_join(name, key, n) for n, m in block.named_modules() if _is_numbered(m)]
                for key, block in holder.named_children()
            ]
            indices = [{getattr(net.get_submodule(n), _INDEX) for n in ns} for ns in numbered]
            if not any(indices) or any(of - {i} for i, of in enumerate(indices)):
                continue
            numbers.lists[name] = numbered
            kinds = getattr(getattr(_owner(net, name), "config", None), "layer_types", None)
            if kinds and len(kinds) >= len(numbered) and len(set(kinds[: len(numbered)])) > 1:
                numbers.mixed[name] = list(kinds[: len(numbered)])
        return numbers

    def why_needed(self, net: nn.Module, block: str) -> str:
        """Return why a block must keep its place in a cache, or an empty string."""
        name, _, key = block.rpartition(".")
        if name not in self.mixed:
            return ""
        kinds, place = self.mixed[name], _keys(net, name).index(key)
        if kinds.index(kinds[place]) < place:
            return ""
        return f"is the first of kind {kinds[place]!r}, by which a cache tells its length"

    def put(self, net: nn.Module, skipped: Iterable[str]) -> None:
        """Number the blocks of a network, without gaps where some are skipped."""
        skipped = set(skipped)
        for name, numbered in self.lists.items():
            if name in self.mixed:
                continue
            gaps = 0
            modules = dict(net.named_modules())
            for place, (key, names) in enumerate(zip(_keys(net, name), numbered, strict=True)):
                gone = _join(name, key) in skipped
                for n in names:
                    if n in modules:
                        setattr(modules[n], _INDEX, place - (0 if gone else gaps))
                gaps += gone


def put_nested(net: nn.Module, blocks: Iterable[str], skipped: Iterable[str]) -> None:
    """Keep encoders of torch, of which layers are skipped, off their path of nested tensors.

    It goes by the first layer, and gives zeros where the input is padded, which the others do not.

    Args:
        net: The network.
        blocks: All blocks that may be skipped.
        skipped: Those that are.
    """
    owners = {block: _owner(net, block.rpartition(".")[0]) for block in blocks}
    changed = {id(owners[name]) for name in skipped}
    for owner in owners.values():
        if not isinstance(owner, nn.TransformerEncoder):
            continue
        attributes: dict[str, Any] = vars(owner)
        if id(owner) in changed:
            attributes.setdefault(_NESTED, attributes.get("use_nested_tensor", False))
            attributes["use_nested_tensor"] = False
        elif _NESTED in attributes:
            attributes["use_nested_tensor"] = attributes.pop(_NESTED)


def forget_nested(net: nn.Module) -> None:
    """Leave encoders of torch as they are, with no trace of what they were."""
    for module in net.modules():
        vars(module).pop(_NESTED, None)


def take_out(
    net: nn.Module, blocks: Iterable[str], numbers: Numbers, example_input: Any
) -> dict[str, set[str]]:
    """Take blocks out of the lists of a network, where that gives the same output.

    A list is left as it is if the network gives another output without them, or if it is a model of
    transformers whose config cannot say how many there are.

    Args:
        net: The network, in which other modules stand for those blocks.
        blocks: Their names.
        numbers: The numbers of its blocks.
        example_input: What its `forward` takes.

    Returns:
        By name of a list that is shorter now, the keys of what was taken out.
    """
    lists: dict[str, set[str]] = {}
    for block in blocks:
        name, _, key = block.rpartition(".")
        if isinstance(net.get_submodule(name), LISTS):
            lists.setdefault(name, set()).add(key)
    if not lists:
        return {}
    expected = _output(detached_copy(net, {}), example_input)

    def is_same(some: Mapping[str, set[str]]) -> bool:
        trial: nn.Module = detached_copy(net, {})
        try:
            if not shorten(trial, some, numbers):
                return False
            output = _output(trial, example_input)
        except Exception:  # of any class: the network needs what was taken out
            return False
        tensors = [*named_outputs(expected).values()]
        return difference(expected, output).relative <= default_tolerance(tensors)

    if is_same(lists):
        good = lists
    else:
        good = {}
        for name in [*lists, *lists] if len(lists) > 1 else []:  # one may need another before it
            if name not in good and is_same({**good, name: lists[name]}):
                good[name] = lists[name]
    shorten(net, good, numbers)
    return good


def _output(net: nn.Module, example_input: Any) -> Any:
    args, kwargs = arguments(net, example_input)
    with evaluating(net), torch.no_grad(), random_state(0):
        return net(*tree_map(_copied, args), **tree_map(_copied, kwargs))


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else copy.deepcopy(x)


def shorten(net: nn.Module, lists: Mapping[str, set[str]], numbers: Numbers) -> bool:
    """Take modules out of lists, by their keys; return whether configs of models could follow."""
    before = {id(m): _Module(name, m) for name, m in net.named_modules()}
    roomy = [name for name in _models(net) if _has_places(net.get_submodule(name))]
    shorter: dict[str, list[int]] = {}
    for name, gone in lists.items():
        holder = net.get_submodule(name)
        rest = [(i, k, m) for i, (k, m) in enumerate(holder._modules.items()) if k not in gone]
        shorter[name] = [i for i, _, _ in rest]
        length, counted = len(holder._modules), all(key.isdigit() for key in holder._modules)
        holder._modules.clear()
        for place, (_, key, module) in enumerate(rest):
            holder._modules[str(place) if counted else key] = module
            for part in module.modules() if name in numbers.lists and module is not None else ():
                if _is_numbered(part):
                    setattr(part, _INDEX, place)
        attributes: dict[str, Any] = vars(_owner(net, name))
        for key, value in attributes.items():
            if type(value) is int and value == length and any(c in key for c in _COUNTS):
                attributes[key] = len(rest)
    return all(_put_in_step(net, name, shorter, before) for name in _models(net)) and all(
        _has_places(net.get_submodule(name)) for name in roomy
    )


def _models(net: nn.Module) -> Iterator[str]:
    """Return the outermost models of transformers in a network: they are made from a config."""
    names: list[str] = []
    for name, module in net.named_modules():
        known = callable(getattr(module, "save_pretrained", None)) and _is_config(module)
        if known and not any(_is_inside(name, other) for other in names):
            names.append(name)
            yield name


def _is_config(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "to_dict")


def _has_places(model: Any) -> bool:
    """Return whether a cache that is made from the config of a model has a place for each layer.

    For T5 transformers counts the layers of the encoder, where it needs those of the decoder.
    """
    try:
        places = model.config.get_text_config(decoder=True).num_hidden_layers
    except Exception:  # of any class: it has no such count
        return True
    numbers = [getattr(m, _INDEX) for m in model.modules() if _is_numbered(m)]
    return bool(max(numbers, default=-1) < places)


class _Module:
    """What a module says of itself: plain attributes, and the sizes of its own tensors.

    Args:
        name: Its name in the network.
        module: The module.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.facts: dict[str, Any] = {
            key: value
            for key, value in vars(module).items()
            if key != "training"
            and not key.startswith("_")
            and isinstance(value, bool | int | float | str)
        }
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            self.facts[f"shape of {key}"] = None if tensor is None else tuple(tensor.shape)


def _put_in_step(
    net: nn.Module, name: str, shorter: Mapping[str, list[int]], before: Mapping[int, _Module]
) -> bool:
    """Let the config of a model say how many layers it has; return whether it can.

    The model is made anew from it, without values, and what was as the old config has it must be as
    the new one has it.

    Args:
        net: The network.
        name: The model in it.
        shorter: By name of each list that lost some modules, the places of the others before.
        before: What all modules of the network said of themselves before.
    """
    model: Any = net.get_submodule(name)
    skip = len(name) + bool(name)
    lists = {n[skip:]: places for n, places in shorter.items() if _is_inside(n, name)}
    base = made_of(model, model.config)
    config, old = model.config, dict(base.named_modules()) if base is not None else {}
    for n, places in lists.items():
        if n not in old:
            return False
        config = next(
            (
                changed
                for changed in _configs(config, len(old[n]._modules), places)
                if _holds(model, changed, n, len(places))
            ),
            None,
        )
        if config is None:
            return False
    twin = made_of(model, config)
    new = {} if twin is None else dict(twin.named_modules())
    parts = dict(model.named_modules())
    same = new.keys() == parts.keys() and all(
        _follows(before[id(part)], old.get(before[id(part)].name[skip:]), part, new[n])
        for n, part in parts.items()
    )
    for n, part in parts.items() if same else ():
        if _is_config(part):
            part.config = new[n].config
    return same or not lists


def _follows(was: _Module, origin: nn.Module | None, part: nn.Module, new: nn.Module) -> bool:
    """Return whether a module is as a new config has it, in what was as the old one had it.

    Args:
        was: What it said of itself before.
        origin: What the old config makes of it.
        part: The module.
        new: What the new config makes of it.
    """
    first = {} if origin is None else _Module("", origin).facts
    now, wanted = _Module("", part).facts, _Module("", new).facts
    missing = object()
    return all(
        first.get(key, missing) != value or wanted.get(key, missing) == now.get(key)
        for key, value in was.facts.items()
    )


def made_of(model: nn.Module, config: Any) -> nn.Module | None:
    """Return a model without values, made from a copy of a config; None if that fails."""
    try:
        with torch.device("meta"), random_state():
            return type(model)(copy.deepcopy(config))
    except Exception:  # of any class: it is not made from a config alone, or refuses this one
        return None


def _holds(model: nn.Module, config: Any, name: str, length: int) -> bool:
    """Return whether a model of a config has a list of some length."""
    made = made_of(model, config)
    try:
        return made is not None and len(made.get_submodule(name)._modules) == length
    except AttributeError:
        return False


def _configs(config: Any, length: int, places: list[int]) -> Iterator[Any]:
    """Return configs that may say that a list of modules is shorter.

    Args:
        config: The config.
        length: How long the list was.
        places: The places of the modules that are left.
    """
    paths: list[tuple[str, ...]] = [()]
    for path in paths:  # which grows: configs lie in configs
        item = _at(config, path)
        paths += [(*path, key) for key, value in vars(item).items() if hasattr(value, "to_dict")]
    numbers = [
        (path, key, index)
        for path in paths
        for key, value in vars(_at(config, path)).items()
        for index, number in enumerate(value if isinstance(value, list | tuple) else [value])
        if not key.startswith("_") and type(number) is int and number == length
    ]
    numbers.sort(key=lambda item: not any(c in item[1] for c in _COUNTS))
    for path, key, index in numbers:
        for by_layer in (True, False):  # whether lists of this length have a value for each layer
            changed = copy.deepcopy(config)
            item = _at(changed, path)
            values = vars(item)
            try:
                if isinstance(values[key], list | tuple):
                    counts = [*values[key][:index], len(places), *values[key][index + 1 :]]
                    setattr(item, key, counts)
                else:
                    setattr(item, key, len(places))
                for other, value in [*values.items()] if by_layer else []:
                    if isinstance(value, list) and len(value) == length and other != key:
                        setattr(item, other, [value[i] for i in places])
            except Exception:  # of any class: the config refuses
                continue
            yield changed


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = getattr(config, key)
    return config


def _is_numbered(module: nn.Module) -> bool:
    return type(vars(module).get(_INDEX)) is int


def _is_inside(name: str, other: str) -> bool:
    return not other or name == other or name.startswith(f"{other}.")


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _keys(net: nn.Module, name: str) -> list[str]:
    return [key for key, _ in net.get_submodule(name).named_children()]


def _owner(net: nn.Module, name: str) -> nn.Module:
    """Return the module that holds one of a name; the network holds itself."""
    return net.get_submodule(name.rpartition(".")[0])
