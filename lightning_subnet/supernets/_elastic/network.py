# SPDX-License-Identifier: Apache-2.0
"""A network that `elasticize` made: its subnets are put in force, and cut out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_subnet._torch.fingerprints import hashed
from lightning_subnet.elasticity.channels.importance import SortableUnits, sortable_units
from lightning_subnet.elasticity.channels.slices import Slices, bake, release
from lightning_subnet.elasticity.extraction import detached_copy
from lightning_subnet.elasticity.protocol import detach
from lightning_subnet.elasticity.sorting import Values
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.supernets._blocks.skips import Skips
from lightning_subnet.supernets.recipes import note_recipe, recipe_of


@dataclass(frozen=True)
class Varies:
    """A choice of the space.

    Attributes:
        name: Its name.
        units: By value, the number of units of each of its groups.
        groups: The numbers of its groups.
    """

    name: str
    units: Mapping[Any, tuple[int, ...]]
    groups: tuple[int, ...]


@dataclass
class Elasticized:
    """Puts subnets of an elasticized network in force, and cuts them out.

    Attributes:
        slices: What may be dropped.
        skips: The residual blocks.
        choices: The choices of numbers of units.
        blocks: The blocks that may be left out, in the order of `keep.<i>`.
    """

    slices: Slices
    skips: Skips
    choices: list[Varies]
    blocks: list[str]

    def activate(self, net: nn.Module, subnet: Subnet) -> None:
        """Put a subnet in force."""
        if self.blocks:
            self.skips.put(net, self._skipped(subnet))
        self.slices.put(net, self._kept(subnet))

    def _kept(self, subnet: Subnet) -> list[int]:
        kept = [group.units for group in self.slices.groups]
        for choice in self.choices:
            for i, units in zip(choice.groups, choice.units[subnet[choice.name]], strict=True):
                kept[i] = units
        return kept

    def extract(self, net: nn.Module, subnet: Subnet) -> nn.Module:
        """Return a subnet as a network of its own, of the classes that the network had."""
        before = getattr(net, "active_subnet", None)
        self.activate(net, subnet)
        try:
            lists: dict[str, set[str]] = {}
            if self.blocks:
                plain, lists = self.skips.extracted(net, self._skipped(subnet), remove=True)
            else:
                plain = detached_copy(net, {})
                detach(plain)
        finally:
            self.activate(net, net.search_space().largest if before is None else before)  # type: ignore[operator] # it is elastic
        bake(plain)
        forget(plain)
        kept, skipped = self._kept(subnet), self._skipped(subnet)
        indices, counted = self.slices.indices(kept), self.slices.counted(kept)
        note_recipe(plain, recipe_of(indices, counted, self.skips, skipped, lists))
        return plain

    def structure(self) -> str:
        """Return a hash of what varies: equal ones have the same groups, of the same entries."""
        groups = [
            [[name, dim, group.axes[name, dim]] for name, dim in sorted(group.axes)]
            for group in self.slices.groups
        ]
        choices = [[c.name, [*c.units.items()], c.groups] for c in self.choices]
        return hashed([groups, choices, self.blocks])

    def sortable_channels(self, net: nn.Module, keep: Values) -> list[SortableUnits]:
        """Return the groups, for `sort_channels`; see `Sortable`."""
        bounds: dict[int, tuple[int, ...]] = {}
        for choice in self.choices:
            values = keep.get(choice.name, ())
            for place, i in enumerate(choice.groups):
                bounds[i] = tuple(choice.units[v][place] for v in values)
        return sortable_units(net, self.slices.groups, "l1", bounds=bounds)

    def _skipped(self, subnet: Subnet) -> list[str]:
        return [name for i, name in enumerate(self.blocks) if not subnet[f"keep.{i}"]]


def elasticized(model: nn.Module) -> Elasticized | None:
    """Return what puts subnets of a network in force, if `elasticize` made it elastic."""
    attached: Any = getattr(vars(model).get("extract"), "__self__", None)
    owner = getattr(getattr(attached, "_extract", None), "__self__", None)
    return owner if isinstance(owner, Elasticized) else None


def put_back(model: nn.Module) -> None:
    """Undo an earlier call of `elasticize`; a network without one is left as it is."""
    extract = vars(model).get("extract")
    if "elastic_report" in vars(model) and extract is not None:
        model.activate(model.search_space().largest)  # type: ignore[operator] # it is elastic
        detach(model)
        release(model)
        forget(model)


def forget(model: nn.Module) -> None:
    for name in ("elastic_report", "sortable_channels"):
        vars(model).pop(name, None)
