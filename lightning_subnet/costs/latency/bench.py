# SPDX-License-Identifier: Apache-2.0
"""Bench on which networks are timed, its settings, and the meter that holds a reference."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_subnet._checks import checked_int
from lightning_subnet._torch.inputs import Inputs, batched, described
from lightning_subnet.costs.device import usable_device
from lightning_subnet.costs.latency.timing import (
    FEWEST,
    Timing,
    clock_of,
    time_groups,
    torch_threads,
    undisturbed,
)
from lightning_subnet.costs.runtimes.base import TRUE, Conditions, ForwardPass
from lightning_subnet.costs.runtimes.registry import make
from lightning_subnet.elasticity.extraction import detached_copy, extract
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import ExportError, MeasurementError, ObjectiveError
from lightning_subnet.space.subnet import Subnet

_log = logging.getLogger(__name__)
_MOST_AT_ONCE, _MOST_BYTES = 64, 1 << 30  # subnets that take turns, and bytes that they may have


@dataclass(frozen=True, eq=False)
class TimingSettings:
    """Settings of a timing; `Latency` has these arguments and explains them.

    Raises:
        ObjectiveError: An argument is out of range, the runtime is unknown, not installed, or does
            not compute in this precision.

    Example:
        >>> TimingSettings(repeats=3)
        Traceback (most recent call last):
        lightning_subnet.errors.ObjectiveError: TimingSettings: repeats=3 must be a whole number \
from 15.
    """

    batch_size: int = 1
    threads: int | None = 1
    device: str = "cpu"
    runtime: str = "eager"
    precision: str | None = None
    input: Any = None
    name: str = "latency_ms"
    repeats: int = 100
    seconds: float = 2.0
    tolerance: float = 0.005
    cuda_graph: bool = False
    compile_seconds: float = 300.0

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name, least in {"batch_size": 1, "threads": 1, "repeats": FEWEST}.items():
            if (name, value := getattr(self, name)) != ("threads", None):
                checked_int(value, f"{kind}: {name}", error=ObjectiveError, least=least)
        for name in ("seconds", "tolerance", "compile_seconds"):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not (number and 0 <= value < math.inf):
                msg = f"{kind}: {name}={value!r:.60} must be a finite number from 0."
                raise ObjectiveError(msg)
        try:
            make(self.runtime).accept(self.precision, cuda_graph=self.cuda_graph)
        except ObjectiveError as error:
            raise ObjectiveError(f"{kind}: {error}") from error
        if self.input is not None:
            batched(self.input, who=kind)

    def batch(self, example_input: Any) -> Inputs:
        """Return the arguments of a forward pass of one batch.

        Args:
            example_input: A tensor, a tuple or a dict, where the settings have no `input`.

        Raises:
            ObjectiveError: There is no sample to repeat.
        """
        sample = example_input if self.input is None else self.input
        return batched(sample, self.batch_size, who=type(self).__name__)


class Bench:
    """The runtime, device, number of threads and precision with which networks are timed.

    Args:
        settings: Those, and how long to measure.
        net: Its precision counts where the settings have none.
        inputs: Arguments of the forward pass.

    Raises:
        ObjectiveError: They do not go together on this machine.
    """

    def __init__(self, settings: TimingSettings, net: nn.Module, inputs: Inputs) -> None:
        self.settings, self.inputs, self._kind = settings, inputs, type(settings).__name__
        weights = (p.dtype for p in net.parameters() if p.is_floating_point())
        try:
            self.device = usable_device(settings.device)
            graph = settings.cuda_graph
            if graph and self.device.type != "cuda":
                msg = f"cuda_graph=True needs device='cuda', not {settings.device!r}."
                raise ObjectiveError(msg)
            self._runtime = make(settings.runtime)
            cast = self._runtime.accept(settings.precision, cuda_graph=graph)
            precision = self._runtime.precision_on(self.device, cast, next(weights, None))
        except ObjectiveError as error:
            raise ObjectiveError(f"{self._kind}: {error}") from error
        threads = settings.threads or torch.get_num_threads()
        self.conditions = Conditions(self.device, threads, precision, graph)
        self._cast = cast is not None  # else networks stay as they are
        self.dtype = TRUE.get(precision, torch.float32) if self._cast else None

    def __str__(self) -> str:
        conditions = self.conditions
        runtime = self._runtime.describe(conditions)
        return f"{runtime}, {conditions.precision}, {conditions.threads} threads"

    def prepare(
        self, make_net: Callable[[], nn.Module], what: str, *, must: bool = True
    ) -> ForwardPass:
        """Return the forward pass of a network, which has run once.

        Args:
            make_net: Returns the network in eval mode; it is changed.
            what: The network, for a message.
            must: Whether nothing can be measured where it does not run.

        Raises:
            MeasurementError: It does not run, or preparing it takes too long, and it must.
            RuntimeError: It does not run.
        """
        start = time.perf_counter()
        try:
            forward = self._runtime.prepare(
                make_net(), self.inputs, self.conditions, cast=self._cast
            )
            with undisturbed(), torch.inference_mode():
                forward.run()
        except Exception as error:  # of any class: of the network, a converter or a runtime
            msg = self._failure(what, error)
            raise (MeasurementError if must else RuntimeError)(msg) from error
        seconds = time.perf_counter() - start
        _log.debug("%s: %.2f s to prepare %s", self._kind, seconds, what)
        if must and seconds > self.settings.compile_seconds:
            forward.release()
            msg = (
                f"{self._kind}: runtime={self.settings.runtime!r} took {seconds:.1f} s to prepare "
                f"{what:.100}, and each subnet takes about as long. Raise compile_seconds="
                f"{self.settings.compile_seconds:g}, or choose another runtime."
            )
            raise MeasurementError(msg)
        return replace(forward, seconds=seconds)

    def time(
        self, passes: Sequence[ForwardPass], reference: ForwardPass | None = None
    ) -> list[Timing]:
        """Return ms of each forward pass, or relative to the reference; all of them take turns."""
        groups = [partial(_actions, _places(forward), reference) for forward in passes]
        with (
            undisturbed(),
            torch.inference_mode(),
            clock_of(self.device) as clock,
        ):
            timings = time_groups(groups, clock, self.settings)
        pairs = zip(timings, passes, strict=True)
        return [replace(timing, preparing=forward.seconds) for timing, forward in pairs]

    def _failure(self, what: str, error: Exception) -> str:
        name, kind = self.settings.runtime, self._kind
        if isinstance(error, ExportError):
            return f"{what:.200} has no form for runtime={name!r} of {kind}: {error}"
        hint = f"Give {kind}(input=...) one sample that forward() takes"
        hint += "." if name == "eager" else ", or try runtime='eager'."
        return (
            f"{what:.200} failed on an input of {described(self.inputs)} on {self.device} "
            f"with runtime={name!r} in {kind}: {str(error).strip():.300}. {hint}"
        )


class Meter:
    """A bench with a super-network, whose subnets are timed against its largest.

    Args:
        bench: What they run on.
        elastic: The super-network.

    Attributes:
        kinds: The kinds of measures that use it.
        alone: The timing of the largest subnet by itself, in ms; None before the first.
    """

    def __init__(self, bench: Bench, elastic: nn.Module) -> None:
        self.bench, self.elastic = bench, elastic
        self.largest = elastic_part(elastic).search_space().largest
        self.kinds: set[type] = set()
        self.alone: Timing | None = None
        self._reference: ForwardPass | None = None
        self._recent: dict[Subnet, Timing] = {}
        self._recent_kind: type | None = None

    def shares(self, elastic: nn.Module, inputs: Inputs, kind: type) -> bool:
        """Return whether another kind of measure, of the same network, may have its timings."""
        pairs = zip(tree_leaves(inputs), tree_leaves(self.bench.inputs), strict=True)
        same = (torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)
        return self.elastic is elastic and kind not in self.kinds and all(same)

    def relative(self, subnets: Sequence[Subnet], kind: type) -> list[Timing]:
        """Return the times of subnets relative to the largest; they take turns with each other.

        What one kind of measure took last, another kind gets once; then it is measured anew.
        """
        recent = {} if kind is self._recent_kind else self._recent
        timings = {s: recent.pop(s) for s in dict.fromkeys(subnets) if s in recent}
        if missing := [s for s in dict.fromkeys(subnets) if s not in timings]:
            timings |= self._measure(missing)
            self._recent_kind, self._recent = kind, dict(timings)
        return [timings[subnet] for subnet in subnets]

    def _measure(self, subnets: Sequence[Subnet]) -> dict[Subnet, Timing]:
        timings: dict[Subnet, Timing] = {}
        with torch_threads(self.bench.conditions.threads):
            reference = self._reference = self._reference or self._prepare(self.largest)
            alone = self.alone = self.alone or self.bench.time([reference])[0]
            if self.largest in subnets:
                error, low, high = (x / alone.value for x in (alone.error, alone.low, alone.high))
                timings[self.largest] = replace(alone, value=1.0, error=error, low=low, high=high)
            others = [subnet for subnet in subnets if subnet != self.largest]
            tensors = [*self.elastic.parameters(), *self.elastic.buffers()]
            size = 2 * sum(t.nelement() * t.element_size() for t in tensors)
            n = max(1, min(_MOST_AT_ONCE, _MOST_BYTES // max(size, 1)))
            for start in range(0, len(others), n):
                timings |= self._together(others[start : start + n], reference)
        return timings

    def _together(self, subnets: Sequence[Subnet], reference: ForwardPass) -> dict[Subnet, Timing]:
        passes: list[ForwardPass] = []
        try:
            passes.extend(self._prepare(subnet) for subnet in subnets)
            return dict(zip(subnets, self.bench.time(passes, reference), strict=True))
        finally:
            for forward in passes:
                forward.release()

    @cached_property
    def _castable(self) -> nn.Module:
        """The super-network, or a copy in the precision of the bench.

        Slicing fixes the types of tensors that a network makes on the way.
        """
        part = elastic_part(self.elastic)
        dtype = self.bench.dtype
        if dtype is None or callable(getattr(part, "extract", None)):
            return self.elastic
        return detached_copy(part, {}).to(dtype)  # type: ignore[no-any-return] # a module

    def _prepare(self, subnet: Subnet) -> ForwardPass:
        def plain() -> nn.Module:
            return extract(self._castable, subnet, self.bench.inputs, only="example")

        return self.bench.prepare(plain, repr(subnet), must=subnet == self.largest)


def _places(forward: ForwardPass) -> Iterator[ForwardPass]:
    """Yield a forward pass for one visit after the other, each elsewhere in memory if it can be."""
    held = forward
    while True:
        yield held
        if forward.again is not None:
            held = forward.again()  # before the last is freed, so not in its place


def _actions(
    places: Iterator[ForwardPass], reference: ForwardPass | None
) -> list[Callable[[], Any]]:
    before = [] if reference is None else [reference.run]
    return [*before, next(places).run]
