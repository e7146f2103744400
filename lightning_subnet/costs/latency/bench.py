# SPDX-License-Identifier: Apache-2.0
"""The bench on which networks are timed, and the meter that keeps a super-network's reference."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_subnet._torch.device import usable_device
from lightning_subnet.costs.latency.timing import Timing, clock_of, conditions, settled, undisturbed
from lightning_subnet.costs.runtimes.base import Conditions, Runner, on_device, runtime
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import ExportError, MeasurementError, ObjectiveError
from lightning_subnet.space.subnet import Subnet

if TYPE_CHECKING:
    from lightning_subnet.costs.latency.latency import Latency

_log = logging.getLogger(__name__)
_MOST, _HELD = 64, 1 << 30  # subnets that take turns, and bytes that they may have


class Bench:
    """Networks on one runtime, device, number of threads and precision.

    Args:
        settings: Those, and how long to measure.
        net: Whose precision counts where none is asked for.
        inputs: Positional arguments of the forward pass.

    Raises:
        ObjectiveError: They do not go together on this machine.
    """

    def __init__(self, settings: Latency, net: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.settings, self.inputs, self._kind = settings, inputs, type(settings).__name__
        weights = (p.dtype for p in net.parameters() if p.is_floating_point())
        try:
            self.device = usable_device(settings.device)
            graph = settings.cuda_graph
            if graph and self.device.type != "cuda":
                msg = f"cuda_graph=True needs device='cuda', not {settings.device!r}."
                raise ObjectiveError(msg)
            self._runtime, asked = runtime(settings.runtime, settings.precision, cuda_graph=graph)
            precision = on_device(settings.runtime, asked, self.device, next(weights, None))
        except ObjectiveError as error:
            raise ObjectiveError(f"{self._kind}: {error}") from error
        threads = settings.threads or torch.get_num_threads()
        self.conditions = Conditions(self.device, threads, precision, graph)
        self._cast = asked is not None  # else networks stay as they are

    def __str__(self) -> str:
        told = self.conditions
        return f"{self._runtime.describe(told)}, {told.precision}, {told.threads} threads"

    def ready(self, make: Callable[[], nn.Module], what: str, *, must: bool = True) -> Runner:
        """Return what runs a network, once it has run.

        Args:
            make: Returns the network in eval mode; it is changed.
            what: What it is, for a message.
            must: Whether nothing can be measured where it does not run.
        """
        start = time.perf_counter()
        try:
            runner = self._runtime.prepare(make(), self.inputs, self.conditions, cast=self._cast)
            with undisturbed(), torch.inference_mode():
                runner.run()
        except Exception as error:  # of any class: of the network, a converter or a runtime
            msg = self._failure(what, error)
            raise (MeasurementError if must else RuntimeError)(msg) from error
        seconds = time.perf_counter() - start
        _log.debug("%s: %.2f s to prepare %s", self._kind, seconds, what)
        if must and seconds > self.settings.compile_seconds:
            runner.release()
            msg = (
                f"{self._kind}: runtime={self.settings.runtime!r} took {seconds:.1f} s to prepare "
                f"{what:.100}, and each subnet takes about as long. Raise compile_seconds="
                f"{self.settings.compile_seconds:g}, or choose another runtime."
            )
            raise MeasurementError(msg)
        return replace(runner, seconds=seconds)

    def timed(self, runners: Sequence[Runner], reference: Runner | None = None) -> list[Timing]:
        """Return ms of each runner, or relative to the reference; all of them take turns."""
        groups = [partial(_visited, _places(runner), reference) for runner in runners]
        with (
            undisturbed(),
            torch.inference_mode(),
            clock_of(self.device) as clock,
        ):
            timings = settled(groups, clock, self.settings)
        pairs = zip(timings, runners, strict=True)
        return [replace(timing, preparing=runner.seconds) for timing, runner in pairs]

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
    """Times the subnets of one super-network against its largest, which it keeps.

    Args:
        bench: What they run on.
        elastic: The super-network.
    """

    def __init__(self, bench: Bench, elastic: nn.Module) -> None:
        self.bench, self.elastic = bench, elastic
        self.largest = elastic_part(elastic).search_space().largest
        self.kinds: set[type] = set()
        self.alone: Timing | None = None
        self._reference: Runner | None = None
        self._recent: dict[Subnet, Timing] = {}
        self._recent_kind: type | None = None

    def shares(self, elastic: nn.Module, inputs: tuple[Any, ...], kind: type) -> bool:
        """Return whether another kind of measure, of the same network, may have its timings."""
        pairs = zip(inputs, self.bench.inputs, strict=True)
        same = (torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)
        return self.elastic is elastic and kind not in self.kinds and all(same)

    def relative(self, subnets: Sequence[Subnet], kind: type) -> list[Timing]:
        """Return the times of subnets relative to the largest; they take turns with each other.

        What one kind of measure took last, another kind gets once; then it is measured anew.
        """
        known = {} if kind is self._recent_kind else self._recent
        found = {s: known.pop(s) for s in dict.fromkeys(subnets) if s in known}
        if missing := [s for s in dict.fromkeys(subnets) if s not in found]:
            found |= self._measured(missing)
            self._recent_kind, self._recent = kind, dict(found)
        return [found[subnet] for subnet in subnets]

    def _measured(self, subnets: Sequence[Subnet]) -> dict[Subnet, Timing]:
        timings: dict[Subnet, Timing] = {}
        with conditions(self.bench.conditions.threads):
            reference = self._reference = self._reference or self._ready(self.largest)
            own = self.alone = self.alone or self.bench.timed([reference])[0]
            if self.largest in subnets:
                error, low, high = (x / own.value for x in (own.error, own.low, own.high))
                timings[self.largest] = replace(own, value=1.0, error=error, low=low, high=high)
            others = [subnet for subnet in subnets if subnet != self.largest]
            tensors = [*self.elastic.parameters(), *self.elastic.buffers()]
            size = 2 * sum(t.nelement() * t.element_size() for t in tensors)
            n = max(1, min(_MOST, _HELD // max(size, 1)))
            for start in range(0, len(others), n):
                timings |= self._together(others[start : start + n], reference)
        return timings

    def _together(self, subnets: Sequence[Subnet], reference: Runner) -> dict[Subnet, Timing]:
        runners: list[Runner] = []
        try:
            runners.extend(self._ready(subnet) for subnet in subnets)
            return dict(zip(subnets, self.bench.timed(runners, reference), strict=True))
        finally:
            for runner in runners:
                runner.release()

    def _ready(self, subnet: Subnet) -> Runner:
        def make() -> nn.Module:
            return extract(self.elastic, subnet)

        return self.bench.ready(make, repr(subnet), must=subnet == self.largest)


def _places(runner: Runner) -> Iterator[Runner]:
    """Yield a runner for one visit after the other, each elsewhere in memory if it can be."""
    held = runner
    while True:
        yield held
        if runner.again is not None:
            held = runner.again()  # before the last is freed, so not in its place


def _visited(places: Iterator[Runner], reference: Runner | None) -> list[Callable[[], Any]]:
    before = [] if reference is None else [reference.run]
    return [*before, next(places).run]


def described(inputs: tuple[Any, ...]) -> str:
    """Return shapes and types of arguments."""
    parts = (f"{tuple(x.shape)} {x.dtype}" if torch.is_tensor(x) else repr(x) for x in inputs)
    return ", ".join(parts)
