# SPDX-License-Identifier: Apache-2.0
"""Timing of networks that take turns, on a machine that drifts and is shared."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from lightning_subnet.randomness import random_state

FEWEST = 15  # least rounds, for a standard error
_WARM = 20  # most calls of a warm-up
_ROUND_MS, _ROUND_TURNS = 10.0, 5  # a round: the turns that fit in, from 1 to 5
_TIMED_MS = 0.5  # one timing: as many calls as last so long

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]


class Effort(Protocol):
    """How long to measure."""

    @property
    def repeats(self) -> int:
        """Most turns, beyond the fewest rounds."""

    @property
    def seconds(self) -> float:
        """Most time, beyond the fewest rounds."""

    @property
    def tolerance(self) -> float:
        """Enough is a standard error of this share of the value."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured, in ms, or relative to a reference that took turns.

    Args:
        value: The median over rounds.
        error: Its standard error, 1.2533 sigma / sqrt(rounds), sigma from the quartiles.
        low: The first quartile of the rounds.
        high: The third.
        rounds: How many there were.
        preparing: Seconds that extracting, converting or compiling took.
    """

    value: float
    error: float
    low: float
    high: float
    rounds: int
    preparing: float = 0.0


def settled(calls: Sequence[Call], clock: Clock, effort: Effort) -> Timing:
    """Let one or two things take turns; return ms of the one, or last / first.

    Args:
        calls: What is timed; the first of two is the reference.
        clock: Returns what one of some calls takes, in ms.
        effort: How long to measure.
    """
    once = [_warm(call, clock) for call in calls]
    n_calls = [math.ceil(_TIMED_MS / ms) for ms in once]
    turns = int(np.clip(_ROUND_MS // np.dot(once, n_calls), 1, _ROUND_TURNS))
    deadline = time.perf_counter() + effort.seconds
    values: list[float] = []
    while True:
        best = [math.inf for _ in calls]
        for _ in range(turns):
            # Never the same twice in a row: it would find its weights in the cache, and rounds of
            # one turn would be of two kinds, between which their median wavers.
            for i, call in enumerate(calls):
                best[i] = min(best[i], clock(call, n_calls[i]))
        values.append(best[-1] / best[0] if len(best) > 1 else best[0])
        if len(values) < FEWEST:
            continue
        low, value, high = np.percentile(values, [25, 50, 75]).tolist()
        error = 1.2533 * (high - low) / 1.349 / math.sqrt(len(values))
        spent = (len(values) + 1) * turns > effort.repeats
        if spent or error <= effort.tolerance * value or time.perf_counter() >= deadline:
            return Timing(value, error, low, high, len(values))


def _warm(call: Call, clock: Clock) -> float:
    """Call until the last three were no faster than those before; return the fastest, in ms."""
    times = [clock(call, 1)]
    while len(times) < _WARM and min(times[-3:]) < 0.95 * min([*times[:-3], math.inf]):
        times.append(clock(call, 1))
    return min(times)


@contextmanager
def clock_of(device: torch.device) -> Iterator[Clock]:
    """Return the clock of a device: events of CUDA, or the time of the host."""
    if device.type == "cuda":
        yield partial(_events, torch.cuda, device)
        return
    synchronize = getattr(torch, device.type).synchronize
    with _waiting() as waits:
        yield partial(
            _host, synchronize if device.type == "mps" else partial(synchronize, device), waits
        )


def _host(synchronize: Call, waits: Callable[[], int], call: Call, n: int) -> float:
    """Return what one of n calls takes, in ms, less what the thread waited for a core meanwhile."""
    synchronize()
    # The clock is read outside of the counter: a wait between the two is in both, or in none.
    start = time.perf_counter_ns()
    before = waits()
    for _ in range(n):
        call()
        synchronize()
    waited = waits() - before
    return (time.perf_counter_ns() - start - waited) / 1e6 / n


def _events(cuda: Any, device: torch.device, call: Call, n: int) -> float:
    """Return what one of n calls takes, in ms, from its launch on an idle GPU to its end."""
    with cuda.device(device):
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        total = 0.0
        for _ in range(n):
            cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end)
    return total / n


@contextmanager
def _waiting() -> Iterator[Callable[[], int]]:
    """Give what tells how long this thread has waited for a core, in ns; always 0 if unknown.

    The kernel counts it while other programs have the cores: it is no part of a latency.
    """
    try:
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:  # not Linux, or it does not count
        yield lambda: 0
        return
    try:
        yield lambda: int(os.pread(file, 64, 0).split()[1])  # time run, time waited, turns
    finally:
        os.close(file)


@contextmanager
def conditions(threads: int) -> Iterator[None]:
    """Set torch's threads; put them, random states and environment variables back."""
    before, environment = torch.get_num_threads(), dict(os.environ)
    try:
        torch.set_num_threads(threads)
        with random_state():
            yield
    finally:
        torch.set_num_threads(before)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the garbage collector away, and the heap as large as it was."""
    collecting = gc.isenabled()
    try:
        gc.disable()
        # What glibc gives back to the system, a call faults in anew, or not, by the heap's layout.
        # After a mapped block of just under 32 MB was freed, it keeps up to 62 MB on the heap.
        torch.empty(31 << 20, dtype=torch.uint8)
        yield
    finally:
        (gc.enable if collecting else gc.disable)()
