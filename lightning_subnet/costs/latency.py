# SPDX-License-Identifier: Apache-2.0
"""Latency of extracted subnets, relative to the largest, on a machine that drifts and is shared."""

from __future__ import annotations

import gc
import math
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_subnet.choices import digest
from lightning_subnet.codeprint import code_fingerprint
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.measures import Measure
from lightning_subnet.randomness import random_state
from lightning_subnet.subnet import Subnet

_PROTOCOL = 1  # goes up when values of another version of this file are not to be reused
_FEWEST = 15  # rounds, for a standard error
_ROUND_MS, _ROUND_TURNS = 10.0, 5  # a round: the turns that fit in, from 1 to 5
_TIMED_MS = 0.5  # what one timing lasts at least
_SPELLS = 0.005  # of the value: what two runs differ by where contention outlasts a measurement
_WARM = 20  # most calls of a warm-up
_Timer = Callable[[int], float]


@dataclass(frozen=True, eq=False)
class Latency:
    """Milliseconds of one forward pass of the extracted subnet.

    Timed is what `extract` returns, in eval and inference mode; of a network that cannot be sliced
    that is a frozen copy (`sliced=False`), which is often as slow as the super-network.

    Subnets take turns with a reference, the largest subnet (r s, s r, r s, ...), so that a drift of
    the machine meets both alike. A round is 10 ms of turns, or one; as disturbances only add time,
    the fastest timing of either counts in it. The value is the median over rounds of s / r, times
    the latency of the reference, timed once by itself. The standard error is 1.2533 sigma /
    sqrt(rounds), sigma = interquartile range / 1.349, and 0.5 % of the value for contention that
    outlasts a measurement; the error of the reference, which scales all values alike, is not in it.

    Threads, garbage collector, gradient mode and random states are put back. What stays is that
    the C library keeps up to some 60 MB of freed memory; else page faults slow a network down, or
    not, by what happens to lie on the heap.

    Args:
        batch_size: Samples of one forward pass.
        threads: Threads within an operator while timing; None: as torch has it.
        device: Where the subnets run: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        input: A tensor or a tuple of positional arguments; the first row of each tensor is repeated
            `batch_size` times. None: `fit` takes `example_input_array` or a validation sample.
        name: The measure's name.
        repeats: Most pairs of timings per subnet, beyond 15 rounds.
        seconds: Most time per subnet, beyond 15 rounds.
        tolerance: Enough is a standard error of this share of the value, without the 0.5 %.

    Raises:
        ObjectiveError: An argument is out of range.

    Example:
        >>> from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> latency = Latency(seconds=0.1).bind(net, torch.zeros(1, 1, 8, 8))
        >>> space = net.search_space()
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
            _batch(self.input, 1, None)

    def bind(self, elastic: nn.Module, example_input: Any) -> Measure:
        """Return the measure of one super-network: pairs (value, standard error) in ms.

        Its `on_reference` takes the latency of the largest subnet from another process, in ms.

        Args:
            elastic: A super-network, or a module with one elastic descendant, which is then timed.
            example_input: The input if `input` is None.

        Raises:
            ObjectiveError: The input cannot be batched, or the device is not there.
        """
        given = example_input if self.input is None else self.input
        dtype = next((p.dtype for p in elastic.parameters() if p.is_floating_point()), None)
        inputs, (device, hardware) = _batch(given, self.batch_size, dtype), _device(self.device)
        meter = _Meter(self, elastic, inputs, device)
        told = f"{hardware}, {self.threads or torch.get_num_threads()} threads, "
        told += f"batch {self.batch_size}, torch {torch.__version__}"
        with activated(elastic, elastic_part(elastic).search_space().largest):
            layers = re.sub("0x[0-9a-f]+", "", repr(elastic))  # strides, which no shape tells
        tensors = [*elastic.named_parameters(), *elastic.named_buffers()]
        shapes = [[name, [*t.shape], str(t.dtype)] for name, t in tensors]
        timing = [float(x) for x in (_PROTOCOL, self.repeats, self.seconds, self.tolerance)]
        rest = digest([shapes, layers, code_fingerprint(elastic), _described(inputs), timing])
        mark = f"{self.name}: {told}: {rest}"
        return Measure(self.name, meter, "ms", fingerprint=mark, on_reference=meter.on_reference)


class _Meter:
    """Times subnets; keeps the reference and its latency."""

    def __init__(
        self, settings: Latency, elastic: nn.Module, inputs: tuple[Any, ...], device: torch.device
    ) -> None:
        self._settings, self._elastic = settings, elastic
        self._inputs, self._device = inputs, device
        self._largest = elastic_part(elastic).search_space().largest
        self._reference: _Timer | None = None
        self._alone: tuple[float, float] | None = None
        self._anchor: float | None = None

    def on_reference(self, value: float) -> None:
        """Take the latency of the largest subnet, in ms, from an earlier measurement."""
        self._anchor = float(value)

    def __call__(self, subnets: list[Subnet]) -> list[tuple[float, float]]:
        """Return (value, standard error) of each subnet, in ms."""
        with random_state():
            return [self._measured(subnet) for subnet in subnets]

    def _measured(self, subnet: Subnet) -> tuple[float, float]:
        reference = self._reference = self._reference or self._runnable(self._largest)
        other = None if subnet == self._largest else self._runnable(subnet)
        with _clock(self._settings.threads):
            own, error = self._alone = self._alone or self._settled(reference)
            ratio, error = self._settled(reference, other) if other else (1.0, error / own)
        anchor = self._anchor or own
        return ratio * anchor, math.hypot(error, _SPELLS * ratio) * anchor

    def _runnable(self, subnet: Subnet) -> _Timer:
        """Extract a subnet and run it once."""
        try:
            timer = _timer(extract(self._elastic, subnet), self._inputs, self._device)
            with _clock(self._settings.threads):
                timer(1)
        except Exception as error:
            msg = (
                f"{type(self._elastic).__name__} with {subnet!r:.200} failed on an input of "
                f"{_described(self._inputs)} on {self._device} when its latency was measured: "
                f"{error}. Give Latency(input=...) one sample that forward() takes."
            )
            raise (MeasurementError if subnet == self._largest else RuntimeError)(msg) from error
        return timer

    def _settled(self, *timers: _Timer) -> tuple[float, float]:
        """Return median and standard error over rounds: of last / first, or ms of a single one."""
        once = [_warm(timer) for timer in timers]
        calls = [math.ceil(_TIMED_MS / ms) for ms in once]
        turns = int(np.clip(_ROUND_MS // np.dot(once, calls), 1, _ROUND_TURNS))
        deadline = time.perf_counter() + self._settings.seconds
        order, values = list(range(len(timers))), []
        while True:
            best = [math.inf for _ in timers]
            for _ in range(turns):
                for i in order:
                    best[i] = min(best[i], timers[i](calls[i]))
                order.reverse()  # a drift, and what one leaves in the caches, meet both alike
            values.append(best[-1] / best[0] if len(best) > 1 else best[0])
            if len(values) < _FEWEST:
                continue
            low, value, high = np.percentile(values, [25, 50, 75]).tolist()
            error = 1.2533 * (high - low) / 1.349 / math.sqrt(len(values))
            spent = (len(values) + 1) * turns > self._settings.repeats
            late = time.perf_counter() >= deadline
            if spent or late or error <= self._settings.tolerance * value:
                return value, error


def _timer(net: nn.Module, inputs: tuple[Any, ...], device: torch.device) -> _Timer:
    """Return a function that makes n calls and returns what one took, in ms."""
    net = net.to(device).eval()
    there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
    on = () if device.type == "mps" else (device,)
    synchronize = getattr(torch, device.type).synchronize

    def milliseconds(calls: int) -> float:
        synchronize(*on)
        start = time.perf_counter_ns()
        for _ in range(calls):
            net(*there)
            synchronize(*on)
        return (time.perf_counter_ns() - start) / 1e6 / calls

    return milliseconds


def _warm(timer: _Timer) -> float:
    """Call until the last three were no faster than those before; return the fastest, in ms."""
    times = [timer(1)]
    while len(times) < _WARM and min(times[-3:]) < 0.95 * min([*times[:-3], math.inf]):
        times.append(timer(1))
    return min(times)


@contextmanager
def _clock(threads: int | None) -> Iterator[None]:
    """Set the conditions of timing, and put them back."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    try:
        torch.set_num_threads(threads or before)
        gc.disable()
        # What glibc gives back to the system, a call faults in anew. Freeing one mapped block of
        # just under 32 MB makes it map only larger blocks, and trim the heap by 62 MB or more.
        torch.empty(31 << 20, dtype=torch.uint8)
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        (gc.enable if collecting else gc.disable)()


def _batch(given: Any, batch_size: int, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Return positional arguments: first rows repeated, floating point in the network's type."""
    inputs = given if isinstance(given, tuple) else (given,)
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if not tensors or any(x.ndim == 0 or len(x) == 0 for x in tensors):
        msg = (
            f"Latency cannot make an input of {_described(inputs) or 'nothing'}. Give input= a "
            "tensor, or a tuple with tensors, of one sample, with a batch dimension."
        )
        raise ObjectiveError(msg)

    def repeated(x: torch.Tensor) -> torch.Tensor:
        rows = x.detach()[:1].expand(batch_size, *x.shape[1:]).contiguous()
        return rows.to(dtype) if x.is_floating_point() and dtype else rows

    return tuple(repeated(x) if isinstance(x, torch.Tensor) else x for x in inputs)


def _described(inputs: tuple[Any, ...]) -> str:
    t = torch.Tensor
    return ", ".join(f"{(*x.shape,)} {x.dtype}" if isinstance(x, t) else repr(x) for x in inputs)


def _device(name: str) -> tuple[torch.device, str]:
    """Return a device that can be timed here, and the model of its processor."""
    try:
        device = torch.zeros(1, device=name).device
        runtime = getattr(torch, device.type)  # "meta" has none
    except Exception as error:  # of another class for each kind of device
        msg = f"Latency: device={name!r} cannot be used here: {error!s:.100}. Write device='cpu'."
        raise ObjectiveError(msg) from error
    if device.type == "cpu":
        info = Path("/proc/cpuinfo")
        found = info.exists() and re.search(r"model name\s*: (.+)", info.read_text())
        return device, found[1] if found else platform.processor() or platform.machine()
    named = getattr(runtime, "get_device_name", None)
    return device, named(device) if callable(named) else device.type
