# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from lightning_subnet.costs.latency.timing import (
    _host,
    _waiting,
    clock_of,
    time_groups,
    torch_threads,
    undisturbed,
)

LINUX = os.path.exists("/proc/thread-self/schedstat")


@dataclass
class Effort:
    repeats: int = 100
    seconds: float = 1.0
    tolerance: float = 0.0


class Machine:
    """A clock whose machine becomes slower with every call, and is disturbed now and then."""

    def __init__(self, drift: float = 0.0, noise: float = 0.0, disturbed: float = 0.0) -> None:
        self.rng, self.calls = np.random.default_rng(0), 0
        self.drift, self.noise, self.disturbed = drift, noise, disturbed

    def __call__(self, call: Any, n: int) -> float:
        self.calls += n
        ms = call() * (1 + self.drift * self.calls) * (1 + self.noise * self.rng.normal())
        return float(ms * (3 if self.rng.random() < self.disturbed else 1))


def two() -> list[Any]:
    return [lambda: 8.0, lambda: 4.0]


def test_a_drift_and_disturbances_cancel() -> None:
    machine = Machine(drift=0.005, noise=0.002, disturbed=0.2)
    timing = time_groups([two], machine, Effort())[0]
    assert 1 + machine.drift * machine.calls > 1.5
    assert timing.value == pytest.approx(0.5, rel=0.01)
    assert timing.low <= timing.value <= timing.high


def test_the_standard_error_is_that_of_the_median_over_repetitions() -> None:
    timings = [time_groups([two], machine, Effort())[0] for machine in machines(40, noise=0.05)]
    spread = np.std([t.value for t in timings])
    expected = np.mean([t.error for t in timings])
    assert 0.6 < expected / spread < 1.6


def machines(n: int, **settings: float) -> list[Machine]:
    fleet = [Machine(**settings) for _ in range(n)]
    for i, machine in enumerate(fleet):
        machine.rng = np.random.default_rng(i)
    return fleet


def test_rounds_end_by_tolerance_by_repeats_or_by_time() -> None:
    assert time_groups([two], Machine(), Effort())[0].rounds == 15  # no noise, so no error
    noisy = Effort(repeats=40)
    assert time_groups([two], Machine(noise=0.1), noisy)[0].rounds == 40
    assert time_groups([two], Machine(noise=0.1), Effort(seconds=0))[0].rounds == 15
    assert time_groups([two], Machine(noise=0.1), Effort(tolerance=0.1))[0].rounds < 40


def test_a_spell_meets_all_that_take_turns_alike() -> None:
    machine = Machine(noise=0.002)

    def spell(call: Any, n: int) -> float:  # of the second half, by 10 %, of one of the two only
        slow = call() == 4 and machine.calls > 420
        return (1.1 if slow else 1) * machine(call, n)

    effort = Effort(repeats=200)
    first, second = time_groups([two], spell, effort)[0], time_groups([two], spell, effort)[0]
    assert second.value / first.value > 1.09
    machine.calls = 0
    first, second = time_groups([two, two], spell, effort)
    assert machine.calls > 800
    assert second.value == pytest.approx(first.value, rel=0.04)
    assert 0.5 < first.value < 0.55
    assert first.error > 0.005  # what its visits differ by


def test_one_thing_alone_is_in_ms() -> None:
    assert time_groups([lambda: two()[:1]], Machine(), Effort())[0].value == 8


def test_what_the_thread_waited_for_a_core_is_no_part_of_a_timing() -> None:
    counted = iter([7, 2_000_007])  # ns, before and after
    start = time.perf_counter()
    ms = _host(lambda: None, lambda: next(counted), lambda: time.sleep(0.01), 1)
    wall = 1000 * (time.perf_counter() - start)
    assert 10 - 2 <= ms <= wall - 2


@pytest.mark.skipif(not LINUX, reason="the kernel tells only on Linux")
def test_a_wait_is_counted_where_cores_are_taken_and_its_file_is_closed() -> None:
    process = psutil.Process()
    before, cores = process.num_fds(), process.cpu_affinity()
    burn = [sys.executable, "-c", "while True: pass"]
    other = subprocess.Popen(burn)
    try:
        process.cpu_affinity(cores[:1])  # both on one core
        psutil.Process(other.pid).cpu_affinity(cores[:1])
        with _waiting() as waits:
            end = time.perf_counter() + 60
            while waits() < 20_000_000 and time.perf_counter() < end:
                pass
            waited = waits()
    finally:
        process.cpu_affinity(cores)
        other.kill()
        other.wait()
    assert waited >= 20_000_000
    assert process.num_fds() == before


@pytest.mark.skipif(not LINUX, reason="the kernel tells only on Linux")
def test_a_timing_is_never_less_than_what_ran() -> None:
    def work() -> None:
        end = time.thread_time_ns() + 200_000
        while time.thread_time_ns() < end:
            pass

    with clock_of(torch.device("cpu")) as clock:
        assert min(clock(work, 2) for _ in range(200)) >= 0.2


def test_conditions_and_what_is_left_of_them() -> None:
    before = torch.get_num_threads(), torch.get_rng_state().tolist(), dict(os.environ)

    def changes() -> None:
        with torch_threads(before[0] + 1):
            assert torch.get_num_threads() == before[0] + 1
            torch.rand(3)
            os.environ["LIGHTNING_SUBNET_TEST"] = "1"
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        changes()
    assert (torch.get_num_threads(), torch.get_rng_state().tolist(), dict(os.environ)) == before


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_not_collected_meanwhile(collecting: bool) -> None:
    (gc.enable if collecting else gc.disable)()
    try:
        with undisturbed():
            assert not gc.isenabled()
        assert gc.isenabled() is collecting
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_events_count_the_work_of_the_gpu_and_not_only_its_launch() -> None:
    x = torch.rand(4096, 4096, device="cuda")
    with clock_of(torch.device("cuda")) as clock:
        clock(lambda: x @ x, 3)
        one, ten = clock(lambda: x @ x, 5), clock(lambda: [x @ x for _ in range(10)], 5)
    assert 5 < ten / one < 20


def test_each_visit_times_what_its_group_makes_for_it() -> None:
    numbers = iter(range(100))

    def group() -> list[Any]:
        ms = 4.0 + next(numbers)
        return [lambda: ms]

    timing = time_groups([group], Machine(), Effort())[0]
    assert next(numbers) == 5
    assert timing.value == 6  # of 4 to 8 the mean of 5, 6 and 7
    assert timing.error > 0.5
