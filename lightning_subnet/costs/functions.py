# SPDX-License-Identifier: Apache-2.0
"""Measures of networks from decorated functions: `network_measure`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_subnet._torch.contexts import random_state
from lightning_subnet.costs.counts import remembered
from lightning_subnet.elasticity.extraction import own_or_frozen
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure

_PAIR = 2


@dataclass(frozen=True, eq=False)
class OfNetworks:
    """A measure of extracted subnets that waits for its super-network; see `network_measure`."""

    name: str
    fn: Callable[[nn.Module, Any], Any]
    unit: str = ""
    exact: bool = False
    input: Any = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            msg = (
                f"network_measure({self.name!r}) decorates {self.fn!r:.60}, which cannot be called."
                " Write a function of (net, example_input)."
            )
            raise ObjectiveError(msg)
        Measure(self.name, bool)  # which checks the name

    def __call__(self, net: nn.Module, example_input: Any = None) -> Any:
        """Call the function itself, unchecked."""
        return self.fn(net, example_input)

    def bind(self, elastic: nn.Module, example_input: Any) -> Measure:
        """Return the measure of one super-network."""
        sample = example_input if self.input is None else self.input

        def value(subnet: Subnet) -> Any:
            try:
                with random_state():  # extraction draws, and the function may
                    return _number(
                        self.fn(own_or_frozen(elastic, subnet), sample), pair=not self.exact
                    )
            except Exception as error:
                msg = f"{self.name} of {subnet!r:.120} failed: {type(error).__name__}: {error}"
                raise MeasurementError(msg) from error

        if self.exact:
            return remembered(self.name, value, self.unit)
        first = True

        def values(subnets: list[Subnet]) -> list[Any]:
            nonlocal first
            try:
                numbers = [value(subnet) for subnet in subnets]
            except MeasurementError as error:
                if first:
                    raise  # no subnet can be measured
                raise RuntimeError(str(error)) from error  # this one cannot
            first = False
            return numbers

        return Measure(self.name, values, unit=self.unit, fingerprint=self.fingerprint)


def _number(value: Any, *, pair: bool) -> Any:
    """Return a float, or a pair of them where a standard error may come along."""
    if pair and isinstance(value, tuple) and len(value) == _PAIR:
        return float(value[0]), float(value[1])
    try:
        return (float(value), 0.0) if pair else float(value)
    except (TypeError, ValueError):
        also = ", or a pair (value, standard error)" if pair else ""
        msg = f"it returned {value!r:.60}; return one number{also}"
        raise TypeError(msg) from None


def network_measure(
    name: str,
    *,
    unit: str = "",
    exact: bool = False,
    input: Any = None,
    fingerprint: str | None = None,
) -> Callable[[Callable[[nn.Module, Any], Any]], OfNetworks]:
    """Make a measure of the decorated function, which gets the network of a subnet.

    The function is called as `fn(net, example_input)` with what `extract` returns, in eval mode,
    and one sample; it returns a number, or a pair (value, standard error). What it raises for the
    first subnet ends the search, as no subnet works then; later it is a failure of that subnet. The
    direction is given in `objectives=`.

    Args:
        name: Its name in objectives, constraints, histories and plots.
        unit: The unit, for axes and tables.
        exact: Free of noise and cheap: each subnet is measured once, and not charged to the budget.
        input: The sample that the function gets. None: `fit` takes `example_input_array` or a
            validation sample.
        fingerprint: Names what the value depends on besides the subnet; see `Measure`.

    Raises:
        ObjectiveError: There is no name, or the decorated object cannot be called.

    Example:
        >>> import torch
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> @network_measure("flash_kb", unit="kB", exact=True)
        ... def flash(net, example_input):
        ...     return sum(p.numel() for p in net.parameters()) / 1000  # a byte per weight
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> space, bound = net.search_space(), flash.bind(net, torch.zeros(1, 1, 8, 8))
        >>> bound([space.smallest, space.largest])
        [18.642, 59.45]
    """

    def decorate(fn: Callable[[nn.Module, Any], Any]) -> OfNetworks:
        return OfNetworks(name, fn, unit, exact, input, fingerprint)

    return decorate
