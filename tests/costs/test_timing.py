# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from lightning_subnet.costs.timing import (
    _host,
    _waiting,
    clock_of,
    conditions,
    settled,
    undisturbed,
)

LINUX = os.path.exists("/proc/self/schedstat")


@dataclass
class Effort:
    repeats: int = 100
    seconds: float = 60.0
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
    timing = settled(two(), machine, Effort())
    assert 1 + machine.drift * machine.calls > 1.5
    assert timing.value == pytest.approx(0.5, rel=0.01)
    assert timing.low <= timing.value <= timing.high


def test_the_standard_error_is_that_of_the_median_over_repetitions() -> None:
    found = [settled(two(), machine, Effort()) for machine in machines(40, noise=0.05)]
    spread = np.std([t.value for t in found])
    claimed = np.mean([t.error for t in found])
    assert 0.6 < claimed / spread < 1.6


def machines(n: int, **settings: float) -> list[Machine]:
    made = [Machine(**settings) for _ in range(n)]
    for i, machine in enumerate(made):
        machine.rng = np.random.default_rng(i)
    return made


def test_rounds_end_by_tolerance_by_repeats_or_by_time() -> None:
    assert settled(two(), Machine(), Effort()).rounds == 15  # no noise, so no error
    noisy = Effort(repeats=40)
    assert settled(two(), Machine(noise=0.1), noisy).rounds == 40
    assert settled(two(), Machine(noise=0.1), Effort(seconds=0)).rounds == 15
    assert settled(two(), Machine(noise=0.1), Effort(tolerance=0.1)).rounds < 40


def test_one_thing_alone_is_in_ms() -> None:
    assert settled(two()[:1], Machine(), Effort()).value == 8


def test_what_the_working_thread_waited_for_a_core_is_no_part_of_a_timing() -> None:
    # (time on a core, time waiting for one) in ns, of two threads, before and after
    counted = iter([[(100, 7), (0, 0)], [(9_000_100, 2_000_007), (1_000, 50_000_000)]])
    start = time.perf_counter()
    ms = _host(lambda: None, lambda: next(counted), lambda: time.sleep(0.01), 1)
    wall = 1000 * (time.perf_counter() - start)
    assert 10 - 2 - 0.1 <= ms <= wall - 2


@pytest.mark.skipif(not LINUX, reason="the kernel tells only on Linux")
def test_the_kernel_counts_the_work_of_each_thread_and_its_files_are_closed() -> None:
    process = psutil.Process()
    before = process.num_fds()
    with _waiting() as waits:
        a = waits()
        assert len(a) == len(os.listdir("/proc/self/task"))
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        b = waits()
        ran = [(y[0] - x[0]) / 1e9 for x, y in zip(a, b, strict=True)]
        assert max(ran) > 0.02
        assert all(y[1] >= x[1] for x, y in zip(a, b, strict=True))
    assert process.num_fds() == before


def test_conditions_and_what_is_left_of_them() -> None:
    before = torch.get_num_threads(), torch.get_rng_state().tolist(), dict(os.environ)

    def changes() -> None:
        with conditions(before[0] + 1):
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
