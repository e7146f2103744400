# SPDX-License-Identifier: Apache-2.0
"""Timing of networks that take turns, on a machine that drifts and is shared."""

from __future__ import annotations

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

from lightning_subnet._torch.contexts import collection_paused, random_state

_WARM = 20  # most calls of a warm-up
_ROUND_MS, _ROUND_TURNS = 10.0, 5  # a round: the turns that fit in, from 1 to 5
_TIMED_MS = 0.5  # one timing: as many calls as last so long
_VISIT_SECONDS, _VISITS = 0.25, (5, 25)  # so long a visit, but at least and at most so many
_VISIT_ROUNDS = 3  # least rounds of a visit
FEWEST = _VISITS[0] * _VISIT_ROUNDS  # least rounds in all, for a standard error

Action = Callable[[], Any]
Clock = Callable[[Action, int], float]
Group = Callable[[], Sequence[Action]]


class Effort(Protocol):
    """The effort of a measurement."""

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
    """A time in ms, or relative to a reference that took turns.

    Args:
        value: The mean of the middle three fifths of the visits, each the median over its rounds.
        error: Its standard error: 1.2533 sigma / sqrt(rounds), sigma from the quartiles of the
            rounds, and at least sigma / sqrt(visits), sigma from those of the visits.
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


def time_groups(groups: Sequence[Group], clock: Clock, effort: Effort) -> list[Timing]:
    """Let the one or two actions of a group take turns; return ms of the one, or last / first.

    Each group is visited 5 to 25 times for a quarter of a second, in turns with the other groups,
    and its value is the mean of the middle three fifths of the visits. So a spell of contention
    meets all groups alike, and the place in memory differs by visit, if the group returns new
    actions.

    Args:
        groups: Each returns at every visit one or two actions; the first of two is the reference.
        clock: Returns the time of one of some calls, in ms.
        effort: How long to measure each group.
    """
    visits = int(np.clip(effort.seconds / _VISIT_SECONDS, *_VISITS))
    all_turns = [_Turns(group, clock, effort, visits) for group in groups]
    for _ in range(visits):
        for turns in all_turns:
            turns.visit()
    return [turns.timing() for turns in all_turns]


class _Turns:
    """The rounds of one group, visit by visit."""

    def __init__(self, group: Group, clock: Clock, effort: Effort, of_visits: int) -> None:
        self._group, self._clock, self._effort, self._of = group, clock, effort, of_visits
        self._visits: list[list[float]] = []
        self._counts: tuple[int, list[int]] | None = None

    def visit(self) -> None:
        """Add rounds until their share of the effort is spent, or they are precise enough."""
        effort, values, actions = self._effort, list[float](), self._group()
        self._visits.append(values)
        if self._counts is None:
            once = [_warm(action, self._clock) for action in actions]
            n_calls = [math.ceil(_TIMED_MS / ms) for ms in once]
            turns = int(np.clip(_ROUND_MS // np.dot(once, n_calls), 1, _ROUND_TURNS))
            self._counts = turns, n_calls
        else:
            for action in actions:
                action()
        turns, n_calls = self._counts
        deadline = time.perf_counter() + effort.seconds / self._of
        while True:
            values.append(self._round(actions, turns, n_calls))
            if len(values) < _VISIT_ROUNDS:
                continue
            precise = _error(values) <= effort.tolerance * math.sqrt(self._of) * np.median(values)
            spent = (len(values) + 1) * turns > effort.repeats / self._of
            if spent or precise or time.perf_counter() >= deadline:
                return

    def _round(self, actions: Sequence[Action], turns: int, n_calls: Sequence[int]) -> float:
        best = [math.inf for _ in actions]
        for _ in range(turns):
            # Never the same twice in a row: it would find its weights in the cache, and rounds of
            # one turn would be of two kinds, between which their median wavers.
            for i, action in enumerate(actions):
                best[i] = min(best[i], self._clock(action, n_calls[i]))
        return best[-1] / best[0] if len(best) > 1 else best[0]

    def timing(self) -> Timing:
        """Return the time that the visits come to."""
        rounds = [value for values in self._visits for value in values]
        medians = sorted(float(np.median(values)) for values in self._visits)
        low, high = np.percentile(rounds, [25, 75]).tolist()
        # That of a trimmed mean is about that of a mean.
        error = max(_error(rounds), _sigma(medians) / math.sqrt(self._of))
        value = float(np.mean(medians[self._of // 5 : -(self._of // 5)]))
        return Timing(value, error, low, high, len(rounds))


def _error(values: Sequence[float]) -> float:
    """Return the standard error of a median."""
    return 1.2533 * _sigma(values) / math.sqrt(len(values))


def _sigma(values: Sequence[float]) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / 1.349


def _warm(action: Action, clock: Clock) -> float:
    """Call until the last three were no faster than those before; return the fastest, in ms."""
    times = [clock(action, 1)]
    while len(times) < _WARM and min(times[-3:]) < 0.95 * min([*times[:-3], math.inf]):
        times.append(clock(action, 1))
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


def _host(synchronize: Action, waits: Callable[[], int], action: Action, n: int) -> float:
    """Return the time of one of n calls, in ms, without the thread's waiting for a core."""
    synchronize()
    # The clock is read outside of the counter: a wait between the two is in both, or in none.
    start = time.perf_counter_ns()
    before = waits()
    for _ in range(n):
        action()
        synchronize()
    wait = waits() - before
    return (time.perf_counter_ns() - start - wait) / 1e6 / n


def _events(cuda: Any, device: torch.device, action: Action, n: int) -> float:
    """Return the time of one of n calls, in ms, from its launch on an idle GPU to its end."""
    with cuda.device(device):
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        total = 0.0
        for _ in range(n):
            cuda.synchronize()
            start.record()
            action()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end)
    return total / n


@contextmanager
def _waiting() -> Iterator[Callable[[], int]]:
    """Yield a function that returns how long this thread has waited for a core, in ns, or 0.

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
def torch_threads(threads: int) -> Iterator[None]:
    """Set torch's threads; put them, random states and environment variables back afterwards."""
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
    with collection_paused():
        # What glibc gives back to the system, a call faults in anew, or not, by the heap's layout.
        # After a mapped block of just under 32 MB was freed, it keeps up to 62 MB on the heap.
        torch.empty(31 << 20, dtype=torch.uint8)
        yield
