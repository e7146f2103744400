# SPDX-License-Identifier: Apache-2.0
"""Latency of extracted subnets, relative to the largest, on a machine that drifts and is shared."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_subnet.choices import digest
from lightning_subnet.codeprint import code_fingerprint
from lightning_subnet.costs.counts import as_weight
from lightning_subnet.costs.machine import describe_device, usable_device
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.measures import Measure
from lightning_subnet.randomness import random_state
from lightning_subnet.subnet import Subnet

_PROTOCOL = 1  # goes up when values of another version of this file are not to be reused
_FEWEST, _WARM = 15, 20  # least rounds, for a standard error; most calls of a warm-up
_ROUND_MS, _ROUND_TURNS = 10.0, 5  # a round: the turns that fit in, from 1 to 5
_TIMED_MS = 0.5  # one timing: as many calls as last so long
_SPELLS = 0.005  # of the value: what two runs differ by where contention outlasts a measurement


@dataclass(frozen=True, eq=False)
class Latency:
    """Milliseconds of one forward pass of the extracted subnet.

    Timed is what `extract` returns, in inference mode: for a network that cannot be sliced a frozen
    copy (`sliced=False`), which is often as slow as the super-network.

    Subnets take turns with a reference, the largest subnet (r s, s r, r s, ...), so that a drift of
    the machine meets both alike. A round is 10 ms of turns, or one; as disturbances only add time,
    the fastest timing of either counts in it. The value is the median over rounds of s / r, times
    the latency of the reference, timed once by itself. The standard error is 1.2533 sigma /
    sqrt(rounds), sigma = interquartile range / 1.349, and 0.5 % of the value for contention that
    outlasts a measurement; the error of the reference, which scales all values alike, is not in it.
    Threads, garbage collector, gradient mode and random states are as before afterwards.

    Args:
        batch_size: Samples of one forward pass.
        threads: Threads within an operator while timing; None: as torch has it.
        device: Where the subnets run: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        input: A tensor or a tuple of positional arguments; the first row of each tensor is repeated
            `batch_size` times. None: `fit` takes `example_input_array` or a validation sample.
        name: The measure's name.
        repeats: Most turns per subnet, beyond 15 rounds.
        seconds: Most time per subnet, beyond 15 rounds.
        tolerance: Enough is a standard error of this share of the value, without the 0.5 %.

    Raises:
        ObjectiveError: An argument is out of range; on binding, no input or no such device.

    Example:
        >>> from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> latency, space = Latency().bind(net, torch.zeros(1, 1, 8, 8)), net.search_space()
        >>> (small, _), (large, error) = latency([space.smallest, space.largest])
        >>> 0 < small < large, 0 < error < large
        (True, True)

    References:
        Chen and Revels, Robust benchmarking in noisy environments, IEEE HPEC 2016: why the fastest.
    """

    batch_size: int = 1
    threads: int | None = 1
    device: str = "cpu"
    input: Any = None
    name: str = "latency_ms"
    repeats: int = 100
    seconds: float = 2.0
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "threads": 1, "repeats": _FEWEST, "seconds": 0, "tolerance": 0}
        for name, low in least.items():
            value: Any = getattr(self, name)
            number = isinstance(value, Integral if low else Real) and not isinstance(value, bool)
            if not (number and low <= value < math.inf) and (name, value) != ("threads", None):
                wanted = f"{'an integer' if low else 'a finite number'} of at least {low}"
                msg = f"Latency: {name}={value!r:.60} must be {wanted}."
                raise ObjectiveError(msg)
        if self.input is not None:
            _batch(self.input)

    def bind(self, elastic: nn.Module, example_input: Any) -> Measure:
        """Return the measure of one super-network: pairs (value, standard error) in ms."""
        inputs = _batch(example_input if self.input is None else self.input, self.batch_size)
        device = usable_device(self.device)
        meter = _Meter(self, elastic, inputs, device)
        with activated(elastic, meter.largest):
            layers = re.sub("0x[0-9a-f]+", "", repr(elastic))  # strides, which no shape tells
        tensors = [*elastic.named_parameters(), *elastic.named_buffers()]
        shapes = [[name, [*t.shape], str(t.dtype)] for name, t in tensors]
        timing = [float(x) for x in (_PROTOCOL, self.repeats, self.seconds, self.tolerance)]
        rest = digest([shapes, layers, code_fingerprint(elastic), _described(inputs), timing])
        threads = self.threads or torch.get_num_threads()
        told = f"{self.name}: {describe_device(self.device)}, {threads} threads, "
        told += f"batch {self.batch_size}, {rest}"
        return Measure(self.name, meter, "ms", fingerprint=told, on_reference=meter.on_reference)


class _Meter:
    """Times subnets; keeps the reference and its latency."""

    def __init__(
        self, settings: Latency, elastic: nn.Module, inputs: tuple[Any, ...], device: torch.device
    ) -> None:
        self.settings, self.elastic, self.inputs, self.device = settings, elastic, inputs, device
        synchronize = getattr(torch, device.type).synchronize
        self.synchronize = synchronize if device.type == "mps" else partial(synchronize, device)
        self.largest = elastic_part(elastic).search_space().largest
        self.reference: nn.Module | None = None
        self.alone: tuple[float, float] | None = None
        self.anchor: float | None = None

    def on_reference(self, subnet: Subnet, value: float) -> None:
        """Put all values on the scale on which an earlier measurement gave this one, in ms."""
        if not 0 < value < math.inf:
            msg = f"on_reference({subnet}, {value!r}): a latency is a positive number of ms."
            raise ObjectiveError(msg)
        if subnet == self.largest:
            self.anchor = float(value)
        else:  # of a part of the space, which need not hold the largest
            ((measured, _),) = self([subnet])
            assert self.alone is not None
            self.anchor = (self.anchor or self.alone[0]) * value / measured

    def __call__(self, subnets: list[Subnet]) -> list[tuple[float, float]]:
        return [self._measured(subnet) for subnet in subnets]

    def _measured(self, subnet: Subnet) -> tuple[float, float]:
        with _conditions(self.settings.threads):
            self.reference = self.reference or self._runnable(self.largest)
            other = [] if subnet == self.largest else [self._runnable(subnet)]
            own, error = self.alone = self.alone or self._settled(self.reference)
            ratio, error = self._settled(self.reference, *other) if other else (1.0, error / own)
        anchor = self.anchor or own
        return ratio * anchor, math.hypot(error, _SPELLS * ratio) * anchor

    def _runnable(self, subnet: Subnet) -> nn.Module:
        """Return a subnet that has run once."""
        try:
            net = extract(self.elastic, subnet).to(self.device)
            self._timed(net)
        except Exception as error:
            msg = (
                f"{subnet!r:.200} failed on an input of {_described(self.inputs)} on {self.device} "
                f"in Latency: {error}. Give Latency(input=...) one sample that forward() takes."
            )
            raise (MeasurementError if subnet == self.largest else RuntimeError)(msg) from error
        return net

    @torch.inference_mode()
    def _timed(self, net: nn.Module, calls: int = 1) -> float:
        """Return what one of some calls takes, in ms."""
        weights = (p for p in net.parameters() if p.is_floating_point())
        like = next(weights, torch.empty(0, device=self.device))
        inputs = as_weight(like, self.inputs)
        self.synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            net(*inputs)
            self.synchronize()
        return (time.perf_counter_ns() - start) / 1e6 / calls

    def _warm(self, net: nn.Module) -> float:
        """Call until the last three were no faster than those before; return the fastest, in ms."""
        times = [self._timed(net)]
        while len(times) < _WARM and min(times[-3:]) < 0.95 * min([*times[:-3], math.inf]):
            times.append(self._timed(net))
        return min(times)

    def _settled(self, *nets: nn.Module) -> tuple[float, float]:
        """Return median and standard error over rounds: of last / first, or ms of a single one."""
        once = [self._warm(net) for net in nets]
        calls = [math.ceil(_TIMED_MS / ms) for ms in once]
        turns = int(np.clip(_ROUND_MS // np.dot(once, calls), 1, _ROUND_TURNS))
        deadline = time.perf_counter() + self.settings.seconds
        order, values = list(range(len(nets))), []
        while True:
            best = [math.inf for _ in nets]
            for _ in range(turns):
                for i in order:
                    best[i] = min(best[i], self._timed(nets[i], calls[i]))
                order.reverse()  # a drift, and what one leaves in the caches, meet both alike
            values.append(best[-1] / best[0] if len(best) > 1 else best[0])
            if len(values) < _FEWEST:
                continue
            low, value, high = np.percentile(values, [25, 50, 75]).tolist()
            error = 1.2533 * (high - low) / 1.349 / math.sqrt(len(values))
            spent = (len(values) + 1) * turns > self.settings.repeats
            if spent or error <= self.settings.tolerance * value or time.perf_counter() >= deadline:
                return value, error


@contextmanager
def _conditions(threads: int | None) -> Iterator[None]:
    """Set the conditions of timing, and put them back."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    try:
        torch.set_num_threads(threads or before)
        gc.disable()
        # What glibc gives back to the system, a call faults in anew, or not, by the heap's layout.
        # After a mapped block of just under 32 MB was freed, it keeps up to 62 MB on the heap.
        torch.empty(31 << 20, dtype=torch.uint8)
        with random_state():
            yield
    finally:
        torch.set_num_threads(before)
        (gc.enable if collecting else gc.disable)()


def _batch(given: Any, n: int = 1) -> tuple[Any, ...]:
    """Return positional arguments, the first row of each tensor n times."""
    inputs = given if isinstance(given, tuple) else (given,)
    tensors = [x for x in inputs if torch.is_tensor(x)]
    if not tensors or any(x.ndim == 0 or len(x) == 0 for x in tensors):
        msg = f"Latency: {_described(inputs):.60} is no batch. Give input= a tensor (1, ...)."
        raise ObjectiveError(msg)
    firsts = (x.detach()[:1] if torch.is_tensor(x) else x for x in inputs)
    return tuple(x.repeat_interleave(n, 0) if torch.is_tensor(x) else x for x in firsts)


def _described(inputs: tuple[Any, ...]) -> str:
    parts = (f"{tuple(x.shape)} {x.dtype}" if torch.is_tensor(x) else repr(x) for x in inputs)
    return ", ".join(parts)
