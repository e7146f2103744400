# SPDX-License-Identifier: Apache-2.0
"""Exact counts of a network's work, by tracing one forward pass of the active subnet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_subnet._torch.macs import count_macs
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import Elastic
from lightning_subnet.errors import MeasurementError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure

BUILT_IN = ("macs", "params", "size_mb")


def traced_measures(module: nn.Module, elastic: Elastic, example_input: Any) -> dict[str, Measure]:
    """Return exact `macs`, `params` and `size_mb` of a super-network, one traced subnet at a time.

    `macs` is for the example input, and of what ships: of the extracted subnet if the network can
    be sliced, as a super-network may do work of its own (OFA's kernel transformations). `params`
    and `size_mb` (parameters and buffers in their types, in 10^6 bytes) are those of the extracted
    subnet: of a network that only a frozen copy can be made of, they are those of the
    super-network.

    Args:
        module: The module whose forward pass is counted.
        elastic: The part of it that activates subnets.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments; only `macs`
            needs it.
    """

    def macs(subnet: Subnet) -> float:
        elastic.activate(subnet)
        with _extracted(elastic, subnet):
            return count_macs(module, example_input)

    def params(subnet: Subnet) -> float:
        return sum(p.numel() for p in extract(_module(elastic), subnet).parameters())

    def size_mb(subnet: Subnet) -> float:
        state = extract(_module(elastic), subnet).state_dict().values()
        n_bytes: int = sum(t.numel() * t.element_size() for t in state)
        return n_bytes / 1e6

    counts = {"macs": (macs, "MAC"), "params": (params, ""), "size_mb": (size_mb, "MB")}
    return {name: remembered(name, fn, unit) for name, (fn, unit) in counts.items()}


def count_measures(
    module: nn.Module, elastic: Elastic, names: Sequence[str], example: Callable[[], Any]
) -> list[Measure]:
    """Return exact measures by name: the tables that the network has, else traced ones.

    Each has been called on the largest subnet, so an input that does not fit shows here.

    Args:
        module: The module whose forward pass is counted.
        elastic: The part of it that activates subnets.
        names: Built-in ones, or what its `exact_measures()` names.
        example: Gives one sample, where a traced `macs` needs it.
    """
    tables = getattr(elastic, "exact_measures", None)
    exact = {m.name: m for m in tables()} if names and callable(tables) else {}
    if any(name not in exact for name in names):
        sample = example() if "macs" in names and "macs" not in exact else None
        exact = traced_measures(module, elastic, sample) | exact
    space = elastic.search_space()
    for name in names:
        exact[name].evaluate(space, space.indices([space.largest]))
    return [exact[name] for name in names]


@contextmanager
def _extracted(elastic: Elastic, subnet: Subnet) -> Iterator[None]:
    """Let a subnet's own network, if there is one, run in the place of the elastic part."""
    if not callable(getattr(elastic, "extract", None)):
        yield
        return
    own = vars(elastic)
    before = own.get("forward")
    own["forward"] = extract(_module(elastic), subnet).forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _module(elastic: Elastic) -> nn.Module:
    assert isinstance(elastic, nn.Module), "the elastic part of a module is a module"
    return elastic


def remembered(name: str, fn: Callable[[Subnet], float], unit: str = "") -> Measure:
    """Return an exact measure that calls a function once per subnet.

    A `MeasurementError` of it ends the search while no subnet has worked; later it is a failure of
    that subnet alone.
    """
    known: dict[Subnet, float] = {}

    def measure(subnets: list[Subnet]) -> list[float]:
        for subnet in subnets:
            if subnet in known:
                continue
            try:
                known[subnet] = float(fn(subnet))
            except MeasurementError as error:
                if not known:
                    raise  # no subnet can be counted
                raise RuntimeError(str(error)) from error  # this one cannot
        return [known[subnet] for subnet in subnets]

    return Measure(name, measure, unit=unit, exact=True)
