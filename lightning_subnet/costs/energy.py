# SPDX-License-Identifier: Apache-2.0
"""Energy of a forward pass, from the counters of the processor (RAPL) or the GPU (NVML).

The only file that imports pynvml.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_subnet._checks import checked_int
from lightning_subnet._json import digest
from lightning_subnet._torch.contexts import random_state
from lightning_subnet._torch.fingerprints import code_fingerprint
from lightning_subnet._torch.inputs import Inputs, arguments, batched, described, run_with
from lightning_subnet.costs.device import as_it_runs, describe_device, usable_device
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure

RAPL = "/sys/class/powercap"

_FEWEST = 5  # windows, for a standard error
_WARM = 3
_PROTOCOL = 1  # goes up when values of another version of this file are not to be reused

Counter = Callable[[], float]
"""A function that returns the millijoules since some moment; it never falls."""


@dataclass(frozen=True, eq=False)
class Energy:
    """Millijoules of one forward pass of the extracted subnet.

    The network runs over and over for windows of `window` seconds each; the value is the median
    over windows of the energy that the counter gained, divided by the passes. Nothing is
    subtracted: the device's idle power and whatever else runs on it are in it, so keep the machine
    quiet. The standard error is 1.2533 sigma / sqrt(windows), sigma = interquartile range / 1.349.

    On a CPU the counters are those of RAPL: the packages, and the memory where it has its own, as
    the Linux kernel shows them under `/sys/class/powercap` (Intel, and AMD since Zen); reading them
    needs root or a changed permission. On CUDA it is the total of the board since the driver was
    loaded, by NVIDIA's own library (extra `energy`, nvidia-ml-py; Volta or later).

    Args:
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        batch_size: Samples of one forward pass.
        threads: Threads within an operator meanwhile; None: as torch has it.
        window: Seconds of a window: many times what a counter takes to change, which is 1 ms for
            RAPL and up to 100 ms on a GPU.
        windows: How many windows, 5 or more.
        input: A tensor or a tuple of positional arguments; the first row of each tensor is repeated
            `batch_size` times. None: `fit` takes `example_input_array` or a validation sample.
        name: The measure's name.
        rapl: The folder of the counters of the processor.

    Raises:
        ObjectiveError: An argument is out of range, or there is no counter that can be read; the
            message names the place. Nothing was measured then.

    Example:
        >>> Energy(rapl="/nowhere")
        Traceback (most recent call last):
        ...
        lightning_subnet.errors.ObjectiveError: Energy: there is no counter of device='cpu': ...

    References:
        Khan et al., RAPL in Action, ACM TOMPECS 3(2), 2018.
    """

    device: str = "cpu"
    batch_size: int = 1
    threads: int | None = 1
    window: float = 0.5
    windows: int = 7
    input: Any = None
    name: str = "energy_mj"
    rapl: str = RAPL

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "threads": 1, "windows": _FEWEST}.items():
            if (name, value := getattr(self, name)) != ("threads", None):
                checked_int(value, f"Energy: {name}", error=ObjectiveError, least=least)
        if not (isinstance(self.window, Real) and 0 < self.window < math.inf):
            msg = f"Energy: window={self.window!r:.60} must be a positive number of seconds."
            raise ObjectiveError(msg)
        if self.input is not None:
            batched(self.input, who="Energy")
        self.counter()()

    def counter(self) -> Counter:
        """Return a counter of the energy of the device.

        Raises:
            ObjectiveError: There is no counter that can be read.
        """
        kind = usable_device(self.device).type
        if kind == "cpu":
            return RaplCounter(self.rapl)
        if kind == "cuda":
            return nvml_counter(self.device)
        msg = f"Energy: device={self.device!r} has no counter. Take 'cpu' or 'cuda'."
        raise ObjectiveError(msg)

    def bind(self, elastic: nn.Module, example_input: Any) -> Measure:
        """Return the measure of one super-network: pairs (value, standard error) in mJ."""
        sample = example_input if self.input is None else self.input
        inputs = batched(sample, self.batch_size, who="Energy")
        device, counter = usable_device(self.device), self.counter()
        largest = elastic_part(elastic).search_space().largest

        def energies(subnets: list[Subnet]) -> list[tuple[float, float]]:
            return [one(subnet) for subnet in subnets]

        def one(subnet: Subnet) -> tuple[float, float]:
            before = torch.get_num_threads()
            try:
                torch.set_num_threads(self.threads or before)
                with random_state():
                    net = extract(elastic, subnet, inputs, only="example").to(device)
                    return per_pass(net, inputs, counter, self.window, self.windows)
            except Exception as error:
                msg = f"Energy of {subnet!r:.120} on {described(inputs)} failed: {error}"
                raise (MeasurementError if subnet == largest else RuntimeError)(msg) from error
            finally:
                torch.set_num_threads(before)

        tensors = [*elastic.named_parameters(), *elastic.named_buffers()]
        shapes = [[name, [*t.shape], str(t.dtype)] for name, t in tensors]
        how = [_PROTOCOL, self.batch_size, self.threads, float(self.window), self.windows]
        what = [shapes, code_fingerprint(elastic), described(inputs), how]
        if not callable(getattr(elastic_part(elastic), "extract", None)):
            what.append("sliced")  # earlier versions ran all weights of such a network
        rest = digest(what)
        fingerprint = f"{self.name}: {describe_device(self.device)}, {rest}"
        return Measure(self.name, energies, "mJ", fingerprint=fingerprint)


@torch.inference_mode()
def per_pass(
    net: nn.Module, inputs: Inputs, counter: Counter, window: float, windows: int
) -> tuple[float, float]:
    """Return median and standard error of the energy of one forward pass, in mJ.

    Args:
        net: The network, in eval mode.
        inputs: Arguments.
        counter: Reads millijoules.
        window: Seconds of each window.
        windows: How many.

    Raises:
        RuntimeError: The counter did not move.
    """
    args, kwargs = arguments(net, inputs)
    run = as_it_runs(net, partial(run_with, net, kwargs or args))
    weight = next(net.parameters(), None)
    gpu = weight is not None and weight.is_cuda
    wait: Callable[[], Any] = torch.cuda.synchronize if gpu else lambda: None
    for _ in range(_WARM):
        run()
    wait()
    values = []
    for _ in range(windows):
        passes, start, end = 0, counter(), time.perf_counter() + window
        while time.perf_counter() < end:
            run()
            wait()
            passes += 1
        values.append((counter() - start) / passes)
    low, value, high = np.percentile(values, [25, 50, 75]).tolist()
    if value <= 0:
        msg = f"the counter did not move in {window} s: give a longer window="
        raise RuntimeError(msg)
    return value, 1.2533 * (high - low) / 1.349 / math.sqrt(len(values))


class RaplCounter:
    """Reads the energy counters of processor packages and of their memory, in mJ.

    A counter starts again at 0 after `max_energy_range_uj`, which takes minutes at full power, so
    it must be read more often than that.

    Args:
        root: The folder of `intel-rapl:0`, `intel-rapl:1` ... (AMD's have that name too).

    Raises:
        ObjectiveError: There are no counters, or they cannot be read.
    """

    def __init__(self, root: str | Path = RAPL) -> None:
        where = Path(root)
        zones = [path for path in sorted(where.glob("intel-rapl:*")) if _is_package(path)]
        # The memory's counter is beside the package's; those of cores and graphics are parts of it.
        inner = [path for zone in zones for path in sorted(zone.glob(f"{zone.name}:*"))]
        zones += [path for path in inner if _label(path) == "dram"]
        if not zones:
            msg = (
                f"Energy: there is no counter of device='cpu': no intel-rapl:* in {where}.\n"
                "RAPL needs Linux on an Intel or AMD processor, not a virtual machine. "
                "Measure latency_ms here."
            )
            raise ObjectiveError(msg)
        self._files = [path / "energy_uj" for path in zones]
        if locked := [path for path in self._files if not os.access(path, os.R_OK)]:
            msg = (
                f"Energy: {locked[0]} cannot be read. Run as root, or let everybody read it:\n"
                f"sudo chmod -R a+r {where}"
            )
            raise ObjectiveError(msg)
        self._ranges = [_whole(path / "max_energy_range_uj") for path in zones]
        self._last = [_whole(path) for path in self._files]
        self._total = 0

    def __call__(self) -> float:
        """Return the millijoules since the counter was constructed."""
        for i, (path, most) in enumerate(zip(self._files, self._ranges, strict=True)):
            now = _whole(path)
            gain = now - self._last[i]
            self._total += gain if gain >= 0 else gain + most
            self._last[i] = now
        return self._total / 1000


def _is_package(zone: Path) -> bool:
    return _label(zone).startswith("package")


def _label(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _whole(path: Path) -> int:
    return int(path.read_text())


def nvml_counter(name: str) -> Counter:
    """Return a counter of the energy of a GPU since its driver was loaded, in mJ.

    Args:
        name: A CUDA device.

    Raises:
        ObjectiveError: nvidia-ml-py is not installed, or the GPU does not count.
    """
    try:
        import pynvml
    except ImportError as error:
        msg = (
            f"Energy: device={name!r} is read through nvidia-ml-py, which is not installed: "
            "pip install 'lightning-subnet[energy]'."
        )
        raise ObjectiveError(msg) from error
    try:
        pynvml.nvmlInit()
        # By its identifier: CUDA_VISIBLE_DEVICES changes the numbers of torch, not of the driver.
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.device(name)).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:
        msg = (
            f"Energy: the energy of the GPU {name!r} cannot be read: {error!s:.100}.\n"
            "NVML counts it from Volta on, and not for a part of a GPU (MIG). Measure latency_ms."
        )
        raise ObjectiveError(msg) from error

    def read() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    return read
