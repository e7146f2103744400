# SPDX-License-Identifier: Apache-2.0
"""The order of values against cost: the largest subnet of a space must not be a cheaper one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_subnet._messages import listed
from lightning_subnet._torch.contexts import random_state, same_buffers, shadowed
from lightning_subnet._torch.inputs import arguments, cloned
from lightning_subnet._torch.macs import count_macs
from lightning_subnet._torch.names import class_name
from lightning_subnet._types import Indices
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.elasticity.slicing.counting import used_weights
from lightning_subnet.errors import ElasticityError, MeasurementError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

_MOST = 100  # choices that are compared one at a time before an error names them


def check_ends(
    module: nn.Module,
    example_input: Any,
    named: Mapping[str, Any] | None = None,
    *,
    space: SearchSpace | None = None,
) -> None:
    """Refuse a super-network whose largest subnet costs less than its smallest.

    Teachers, warm-ups, the sandwich rule and relative bounds take the last value of each ordered
    choice for the largest. MACs are compared; where none are counted, the parameters that are used.
    A network with an `extract` method costs what its extraction costs. It takes two forward passes
    in eval mode, more only before an error. Nothing is said of a pool that lacks the ends of its
    space, nor of subnets that do not run in eval mode. The subnet in force, buffers and random
    states come back.

    Args:
        module: A super-network, or a module with one elastic descendant.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of `forward`.
        named: Keyword arguments beside positional ones.
        space: The part of the super-network's space that counts; None: all of it.

    Raises:
        ElasticityError: The smallest subnet costs more than the largest. Both numbers are told, and
            the choices whose last value is cheaper than their first.

    Example:
        >>> from lightning_subnet import Choice
        >>> class Net(nn.Linear):
        ...     width = 8
        ...     def search_space(self):
        ...         return SearchSpace(width=Choice([8, 4, 2], ordered=True))
        ...     def activate(self, subnet):
        ...         self.width = subnet["width"]
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, self.weight[:self.width])
        >>> check_ends(Net(3, 8), torch.zeros(1, 3))
        Traceback (most recent call last):
        lightning_subnet.errors.ElasticityError: The largest subnet of Net costs less than the
        smallest: 6 MACs, and 24. The last value of 'width', 2, is cheaper than its first, 8. ...
    """
    part: Any = elastic_part(module)
    space = part.search_space() if space is None else space
    with random_state(), same_buffers(module), activated(module, space.largest):
        if message := ends_message(space, Costs(module, part, example_input, named)):
            raise ElasticityError(message)


def ends_message(space: SearchSpace, costs: Costs) -> str | None:
    """Return what is wrong with the ends of a space, None if the largest subnet is no cheaper.

    Args:
        space: The space.
        costs: Costs of its subnets.
    """
    largest, smallest = space.largest, space.smallest
    if smallest == largest or space.from_indices(end_row(space))[0] != largest:
        return None  # no order, or a pool without its ends, in which no choice is to blame
    excess = costs.excess(smallest, largest)
    if excess is None:
        return None
    wrong, row = {}, space.indices([largest])
    for j, name in list(enumerate(space.names))[:_MOST]:
        ends = ends_of(space, (j,), row)
        if ends is not None and (gap := costs.excess(*ends)) is not None:
            wrong[name] = gap.last - gap.first
    names = sorted(wrong, key=wrong.__getitem__)  # the one that matters most comes first
    text = (
        f"The largest subnet of {costs.network} costs less than the smallest: "
        f"{excess.last:,} {excess.unit}, and {excess.first:,}. "
    )
    if names:
        values = space.values[names[0]]
        text += f"The last value of {names[0]!r}, {values[-1]!r}, is cheaper than its first, "
        text += f"{values[0]!r}"
        text += f"; so it is with {listed(names[1:], 3)}. " if len(names) > 1 else ". "
    else:
        unequal = [name for name in space.names if largest[name] != smallest[name]]
        text += f"They differ in {listed(unequal, 3)}. "
    return (
        f"{text}Order the values of a choice from the smallest network to the largest, whatever "
        "the numbers: Choice([...], ordered=True); or write ordered=False where there is no order."
    )


class Excess(NamedTuple):
    """The costs of two subnets of which the first is not the cheaper one."""

    unit: str
    first: int
    last: int


class Costs:
    """Costs of subnets on one input, each counted once; they leave some subnet in force.

    Args:
        module: The module that is run, in eval mode.
        part: The super-network in it.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.
        named: Keyword arguments beside positional ones.

    Attributes:
        network: The class of the super-network.
    """

    def __init__(
        self,
        module: nn.Module,
        part: Any,
        example_input: Any,
        named: Mapping[str, Any] | None = None,
    ) -> None:
        self._part, self._module = part, module
        self.network = class_name(part)
        args, kwargs = arguments(module, example_input)
        self._call = (
            args,
            {**kwargs, **arguments(module, dict(named or {}))[1]} if named else kwargs,
        )
        self._macs: dict[Subnet, int | None] = {}
        self._parameters: dict[Subnet, int | None] = {}
        self._shipped: dict[Subnet, tuple[int | None, int] | None] = {}

    def excess(self, first: Subnet, last: Subnet) -> Excess | None:
        """Return both costs if the first subnet costs more than the last, else None."""
        unit = "MACs"
        one, other = self._extracted(first), self._extracted(last)
        if one is not None and other is not None:
            # A super-network may do work that its subnets do not, or do all of it for each.
            (a, n_first), (b, n_last) = one, other
            if a is None or b is None:
                a, b, unit = n_first, n_last, "parameters"
        else:
            a, b = self.macs(first), self.macs(last)
            if a is None or b is None:
                a, b, unit = self._in_use(first), self._in_use(last), "parameters"
        return Excess(unit, a, b) if a is not None and b is not None and a > b else None

    def __len__(self) -> int:
        """The number of forward passes that were counted."""
        return len(self._macs) + len(self._shipped)

    def macs(self, subnet: Subnet) -> int | None:
        """Return the multiply-accumulates of a subnet, None if none can be counted."""
        if subnet not in self._macs:
            self._part.activate(subnet)
            self._macs[subnet] = self._counted()
        return self._macs[subnet]

    def _inputs(self) -> Any:
        with torch.no_grad():  # a copy needs no graph
            return cloned(self._call)

    def _counted(self) -> int | None:
        args, kwargs = self._inputs()
        try:
            return count_macs(_Named(self._module, kwargs) if kwargs else self._module, args)
        except MeasurementError:
            return None

    def _extracted(self, subnet: Subnet) -> tuple[int | None, int] | None:
        """Return the MACs and the parameters of an extraction; None if there is none."""
        if not callable(getattr(self._part, "extract", None)):
            return None
        if subnet not in self._shipped:
            self._part.activate(subnet)
            try:
                plain = extract(self._part, subnet)
            except Exception:  # what is wrong with it is for others to say
                self._shipped[subnet] = None
            else:
                n = sum(p.numel() for p in plain.parameters())
                with shadowed(self._part, "forward", plain.forward):
                    self._shipped[subnet] = self._counted(), n
        return self._shipped[subnet]

    def _in_use(self, subnet: Subnet) -> int | None:
        """Return the parameters that a forward pass reads, None if it fails."""
        if subnet not in self._parameters:
            args, kwargs = self._inputs()
            try:
                used = used_weights(_Named(self._module, kwargs), subnet, args)
                self._parameters[subnet] = sum(u.numel for u in used.values() if u.parameter)
            except Exception:  # as above
                self._parameters[subnet] = None
        return self._parameters[subnet]


class _Named(nn.Module):
    """A module that gets some arguments by name."""

    def __init__(self, module: nn.Module, named: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self._named = module, named

    def forward(self, *args: Any) -> Any:
        return self.module(*args, **self._named)


def end_row(space: SearchSpace, *, largest: bool = True) -> Indices:
    """Return value indices (1, n_choices): the last of ordered choices, else the first.

    They are not canonical: choices that do not exist in the largest subnet have a last value too.

    Args:
        space: The space.
        largest: Whether the last is meant, and not the first of all choices.
    """
    choices = space.choices
    ends = [
        choices[name].values.index(values[-1 if largest and choices[name].ordered else 0])
        for name, values in space.values.items()
    ]
    return np.array([ends], dtype=np.int64)


def groups_of(space: SearchSpace) -> list[tuple[int, ...]]:
    """Return the positions of choices that form a list (`ks.0`, `ks.1`), and of others alone."""
    groups: dict[str, list[int]] = {}
    for j, name in enumerate(space.names):
        stem, _, number = name.rpartition(".")
        groups.setdefault(stem if stem and number.isdigit() else name, []).append(j)
    return [tuple(at) for at in groups.values()]


def ends_of(
    space: SearchSpace, places: Sequence[int], row: Indices
) -> tuple[Subnet, Subnet] | None:
    """Return the subnets around a row in which choices have their first and their last values.

    Choices that come to exist have their first values.

    Args:
        space: The space.
        places: The positions of the choices; those without an order stay as they are.
        row: Canonical value indices (1, n_choices).

    Returns:
        Both subnets; None if no choice has an order, one does not exist in them, they are equal, or
        one of them is not in the space.
    """
    at = [j for j in places if space.choices[space.names[j]].ordered]
    rows = np.repeat(row, 2, axis=0)
    for k, largest in enumerate((False, True)):
        rows[k, at] = end_row(space, largest=largest)[0, at]
    if not at or not space.active(rows)[:, at].all():
        return None
    first, last = space.from_indices(rows)
    return (first, last) if first != last and first in space and last in space else None


@contextmanager
def calls_of(part: Any) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Give the arguments of the last forward pass of a module inside a `with` block, if any.

    Positional and keyword arguments, without the graph that they come from. (Under DDP a pass of a
    LightningModule may be its training step, in which its own follows.)
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def remember(_module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[:] = [tree_map(_detached, (args, kwargs))]

    with part.register_forward_pre_hook(remember, with_kwargs=True):
        yield calls


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
