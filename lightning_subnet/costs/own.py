# SPDX-License-Identifier: Apache-2.0
"""Tables of costs that a network has itself, held against what is counted on its subnets."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from lightning_subnet._messages import warn
from lightning_subnet._types import Floats, Indices
from lightning_subnet.errors import CostWarning
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.measures import Measure

_SAME = 1e-9  # relative difference: sums of integers and bytes, in another order
_TOLD: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class OwnTables:
    """The exact measures that a network has itself (`exact_measures()`), by name.

    Args:
        net: The network.

    Example:
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> own = OwnTables(ElasticMobileNetV3.tiny())
        >>> [*own.tables]
        ['macs', 'params', 'size_mb']
    """

    def __init__(self, net: Any) -> None:
        self.net = net

    @cached_property
    def tables(self) -> dict[str, Measure]:
        """Them, as the network gives them without an input."""
        tables = getattr(self.net, "exact_measures", None)
        return {measure.name: measure for measure in tables()} if callable(tables) else {}

    @property
    def takes_input(self) -> bool:
        """Whether `exact_measures` has a parameter `example_input`."""
        return "example_input" in inspect.signature(self.net.exact_measures).parameters

    def for_input(self, name: str, example_input: Any) -> Measure | None:
        """Return one for an input; None if `exact_measures` does not take `example_input`."""
        if example_input is None or not self.takes_input:
            return None
        tables = self.net.exact_measures(example_input=example_input)
        return next((measure for measure in tables if measure.name == name), None)


def agreeing(
    own: OwnTables, counted: Measure, sample_of_part: Any = None, *, around: bool = False
) -> Measure:
    """Return the table of a network for a cost, if it says what is counted; else what is counted.

    The largest and the smallest subnet are counted. The first of these that agrees with both is
    taken: the table as it is; the table for the input; with a module around the network, that and
    a constant, which is what the module adds, if it is the same for a random subnet too. Any but
    the first have a fingerprint, so that a study does not mix them with what the table alone said.

    Args:
        own: The tables of the network.
        counted: The measure of the same name that counts subnets one by one.
        sample_of_part: The input that the network gets; None: it does not matter.
        around: Whether it counts in a module around the network.

    Raises:
        MeasurementError: The subnets cannot be counted.

    Warns:
        CostWarning: None agrees; once for each network and name.
    """
    space, name = own.net.search_space(), counted.name
    X = space.indices([*dict.fromkeys([space.largest, space.smallest])])
    truth = counted.evaluate(space, X)[0]
    table = own.tables[name]
    if _same(_values(table, space, X), truth):
        return table
    result = _of_input(own, counted, sample_of_part, X, around=around)
    if result is None:
        said = float(_values(table, space, X)[0])
        _tell(own, name, said, float(truth[0]))
        result = counted
    return replace(result, fingerprint=f"of the input: {float(truth[0])!r} at the largest")


def _of_input(
    own: OwnTables, counted: Measure, sample: Any, X: Indices, *, around: bool
) -> Measure | None:
    """Return the table for an input, plus what a module around the network adds; None: neither."""
    space, name = own.net.search_space(), counted.name
    table = own.for_input(name, sample) or own.tables[name]
    truth = _values(counted, space, X)
    if _same(_values(table, space, X), truth):
        return table
    if not around:
        return None
    X = np.concatenate([X, space.sample_indices(1, np.random.default_rng(0))])
    truth = _values(counted, space, X)
    constant = float((truth - _values(table, space, X))[0])
    if not _same(_values(table, space, X) + constant, truth):
        return None

    def total(items: Any) -> Floats:
        return np.asarray(table.fn(items), dtype=float) + constant

    return replace(table, fn=total)


def _values(measure: Measure, space: SearchSpace, X: Indices) -> Floats:
    values: Floats = measure.evaluate(space, X)[0]
    return values


def _same(values: Floats, truth: Floats) -> bool:
    return bool((np.abs(values - truth) <= _SAME * np.abs(truth)).all())


def _tell(own: OwnTables, name: str, said: float, counted: float) -> None:
    told = _TOLD.setdefault(own.net, set())
    if name in told:
        return
    told.add(name)
    remedy = "Let exact_measures(example_input=None) return the table for that input, or pass"
    if own.takes_input:
        remedy = "If that is too slow, pass"
    warn(
        f"exact_measures() of {type(own.net).__name__} says {said:.9g} {name} for the largest "
        f"subnet, and {counted:.9g} are counted for the input, so each subnet is counted instead. "
        f"{remedy} a measure of your own in measures=[...].",
        CostWarning,
    )
