# SPDX-License-Identifier: Apache-2.0
"""Recipes: what was cut out of a network, as plain data, and the same cuts in another like it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.channels.operators import Axis
from lightning_subnet.elasticity.channels.slices import Index, cut
from lightning_subnet.errors import ElasticityError
from lightning_subnet.supernets._blocks.removal import (
    Numbers,
    forget_nested,
    put_nested,
    shorten,
)
from lightning_subnet.supernets._blocks.skips import Passage, SkippedBlock, Skips, Source

Recipe = dict[str, Any]
"""What JSON can hold: the slices that were kept, and the blocks that were left out."""

_ATTRIBUTE = "_subnet_recipes"


def recipe_of(
    indices: Mapping[Axis, Index],
    counted: Iterable[tuple[str, str, int]] = (),
    skips: Skips | None = None,
    skipped: Iterable[str] = (),
    lists: Mapping[str, set[str]] | None = None,
) -> Recipe:
    """Return the recipe of a subnet.

    Args:
        indices: By tensor and dimension, what is kept of it.
        counted: Attributes that count channels: (module, name, value).
        skips: The blocks that may be skipped.
        skipped: The names of those that are left out.
        lists: By name of a list, the keys of the blocks that were taken out of it.

    Example:
        >>> recipe_of({("0.weight", 0): 3, ("1.weight", 1): torch.tensor([0, 1, 4])})["slices"]
        [['0.weight', 0, [[0, 3]]], ['1.weight', 1, [[0, 2], [4, 5]]]]
    """
    recipe: Recipe = {
        "slices": [[name, dim, _ranges(index)] for (name, dim), index in indices.items()],
        "counted": [[*item] for item in counted],
    }
    skipped = list(skipped)
    if skips is not None and skipped:
        recipe["skipped"] = {name: _written(skips.passage_needed(name)) for name in skipped}
        recipe["lists"] = {name: sorted(keys) for name, keys in (lists or {}).items()}
        recipe["numbers"] = {"lists": skips.numbers.lists, "mixed": skips.numbers.mixed}
    return recipe


def rebuild(net: nn.Module, recipe: Recipe) -> None:
    """Make the cuts of a recipe in a network: its structure is then that of the subnet.

    Args:
        net: The whole network, which is changed. Its weights are cut, too.
        recipe: What `recipe_of` returned of another network like it.

    Raises:
        ElasticityError: The network does not have what the recipe cuts.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
        >>> rebuild(net, recipe_of({("0.weight", 0): 3, ("0.bias", 0): 3, ("1.weight", 1): 3}))
        >>> net[0]
        Linear(in_features=2, out_features=3, bias=True)
    """
    _check(net, recipe)
    indices = {(name, dim): _index(ranges) for name, dim, ranges in recipe["slices"]}
    cut(net, indices, [(m, name, value) for m, name, value in recipe["counted"]])
    skipped = recipe.get("skipped", {})
    if not skipped:
        return
    for name, written in skipped.items():
        owner, _, key = name.rpartition(".")
        passage = _read(written)
        block = net.get_submodule(name)
        stand_in = nn.Identity() if passage is None else SkippedBlock(passage, block)
        net.get_submodule(owner)._modules[key] = stand_in
    numbers = Numbers(**recipe["numbers"])
    numbers.put(net, skipped)
    put_nested(net, skipped, skipped)
    forget_nested(net)
    shorten(net, {name: set(keys) for name, keys in recipe["lists"].items()}, numbers)


def recipes_of(net: nn.Module) -> list[Recipe]:
    """Return the recipes by which a network was cut out of another, the first cut first."""
    return list(vars(net).get(_ATTRIBUTE, []))


def note_recipe(plain: nn.Module, recipe: Recipe) -> None:
    """Let a network that was cut out of another know how."""
    vars(plain)[_ATTRIBUTE] = [*recipes_of(plain), recipe]


def _check(net: nn.Module, recipe: Recipe) -> None:
    """Raise if a network does not have what a recipe cuts."""
    tensors = {n: t.shape for n, t in (*net.named_parameters(), *net.named_buffers())}
    for name, dim, ranges in recipe["slices"]:
        shape = tensors.get(name)
        if shape is None or dim >= len(shape) or ranges[-1][1] > shape[dim]:
            has = "does not have it" if shape is None else f"has it of {tuple(shape)}"
            msg = (
                f"The subnet keeps up to {ranges[-1][1]} entries of dimension {dim} of {name!r}, "
                f"and {class_name(net)} {has}. Give the network that it was cut out of."
            )
            raise ElasticityError(msg)
    modules = dict(net.named_modules())
    for name in (*(m for m, _, _ in recipe["counted"]), *recipe.get("skipped", {})):
        if name not in modules:
            msg = (
                f"The subnet was cut out of a network with a module {name!r}, and "
                f"{class_name(net)} has none. Give the network that it was cut out of."
            )
            raise ElasticityError(msg)


def _ranges(index: Index) -> list[list[int]]:
    """Return what is kept as ranges from an index to the one after the last."""
    if isinstance(index, int):
        return [[0, index]]
    ends = (index.diff() != 1).nonzero().flatten() + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in index.tensor_split(ends) if len(part)]


def _index(ranges: Sequence[Sequence[int]]) -> Index:
    if len(ranges) == 1 and ranges[0][0] == 0:
        return int(ranges[0][1])
    return torch.cat([torch.arange(start, stop) for start, stop in ranges])


def _written(passage: Passage | None) -> Any:
    """Return what goes through a block as plain data."""
    if passage is None:
        return None
    leaves = [None if leaf is None else _written_source(leaf) for leaf in passage.leaves]
    return [_written_source(passage.stream), leaves, _written_form(passage.form)]


def _written_source(source: Source) -> list[Any]:
    return [source.position, source.name, list(source.path)]


def _written_form(form: Any) -> Any:
    if form is None or type(form) is int:
        return form
    kinds: dict[type, str] = {tuple: "tuple", list: "list"}
    if type(form) in kinds:
        return [kinds[type(form)], [_written_form(x) for x in form]]
    if type(form) is dict:
        return ["dict", [[key, _written_form(x)] for key, x in form.items()]]
    return ["unknown", class_name(form)]


def _read(written: Any) -> Passage | None:
    if written is None:
        return None
    stream, leaves, form = written
    sources = (None if leaf is None else _read_source(leaf) for leaf in leaves)
    return Passage(_read_source(stream), tuple(sources), _read_form(form))


def _read_source(written: Sequence[Any]) -> Source:
    position, name, path = written
    return Source(position, name, tuple(path))


def _read_form(written: Any) -> Any:
    if written is None or isinstance(written, int):
        return written
    kind, items = written
    if kind == "dict":
        return {key: _read_form(x) for key, x in items}
    if kind == "unknown":
        msg = (
            f"A block that was left out of this subnet gave its output as a {items}, which a "
            "recipe cannot hold. Keep the whole network with torch.save()."
        )
        raise ElasticityError(msg)
    values = [_read_form(x) for x in items]
    return tuple(values) if kind == "tuple" else values
