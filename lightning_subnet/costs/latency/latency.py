# SPDX-License-Identifier: Apache-2.0
"""Latency and throughput of extracted subnets, timed in turns with the largest."""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import nn

from lightning_subnet._json import digest
from lightning_subnet._torch.fingerprints import code_fingerprint
from lightning_subnet._torch.inputs import described
from lightning_subnet._torch.names import class_name
from lightning_subnet.costs.device import describe_device
from lightning_subnet.costs.latency.bench import Bench, Meter, TimingSettings
from lightning_subnet.costs.latency.timing import Timing, torch_threads
from lightning_subnet.costs.runtimes.base import ForwardPass
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.errors import ObjectiveError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure

_PROTOCOL = 5  # goes up when values of another version of these files are not to be reused
_SPELLS = 0.005  # of the value: what two runs differ by where contention outlasts a measurement
_METERS: weakref.WeakValueDictionary[tuple[Any, ...], Meter] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class LatencyMeasure(Measure):
    """A `Latency` or `Throughput` that is bound to one super-network.

    Args:
        timings: By subnet its last timing, relative to the largest subnet.

    Example:
        >>> import torch
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> latency = Latency(seconds=0.1).bind(net, torch.zeros(1, 1, 8, 8))
        >>> small = net.search_space().smallest
        >>> _ = latency([small])
        >>> timing = latency.timings[small]
        >>> 0 < timing.low <= timing.value <= timing.high < 1
        True
    """

    timings: Mapping[Subnet, Timing] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Latency(TimingSettings):
    """Milliseconds of one forward pass of the extracted subnet, on the runtime that it ships to.

    It is the time of what `extract` returns for the input, in inference mode: for a network that
    cannot be sliced of a frozen copy (`sliced=False`), which is often as slow as the super-network.
    Inputs are in place: no copy is timed. `runtime` is one of

    - `"eager"`: torch as it is.
    - `"compile"`: `torch.compile` of each subnet by itself, which costs seconds to minutes a subnet
      (again a tenth of it where the same subnet was compiled before: Inductor keeps its kernels on
      disk). Dynamo's limits are put back after each subnet, and what it cached of it is freed.
    - `"onnxruntime"`: a session of fixed shapes, sequential, with IO binding (extra `onnx`).
    - `"openvino"`: one stream and request, latency hint (extra `openvino`).

    Subnets take turns with a reference, the largest subnet (r s r s ...), so that a drift of the
    machine meets both alike. A round is 10 ms of turns, or one; as disturbances only add time, the
    fastest timing of either counts in it, less what the thread waited for a core (Linux). Rounds
    are made in visits of a quarter of a second, at least five, with a new copy of the subnet in
    each (not of what is compiled), as its time depends on where in memory it lies; several subnets
    that are measured at once, such as a front that is measured again, are visited in turns, so that
    spells of contention meet all of them. The value is the mean of the middle three fifths of the
    visits, each the median of s / r, times the latency of the reference, timed once by itself. The
    standard error is 1.2533 sigma / sqrt(rounds), sigma = interquartile range / 1.349, at least
    what the visits differ by, and 0.5 % of the value for contention that outlasts a measurement;
    the error of the reference, which scales all values alike, is not in it. Threads, garbage
    collector, gradient mode, random states and environment variables are as before afterwards. On a
    GPU each pass is timed between two events, from an idle device to its end; weights that fit in
    its L2 cache stay there.

    Args:
        batch_size: Samples of one forward pass.
        threads: Threads within an operator while timing; None: as torch has it.
        device: Where the subnets run: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        runtime: The name of the library that runs them.
        precision: As Lightning names it: `"32-true"`, `"bf16-true"` and `"16-true"` cast the
            network, `"bf16-mixed"` and `"16-mixed"` autocast; `"32"`, `"bf16"` and `"16"` are short
            for `"32-true"` and the mixed ones. None: the precision of the weights. ONNX Runtime has
            no mixed ones, and OpenVINO only those, besides `"32-true"`: it casts where it gains.
        input: A tensor or a tuple of positional arguments; the first row of each tensor is repeated
            `batch_size` times. None: `fit` takes `example_input_array` or a validation sample.
        name: The measure's name; two latencies in one search need two.
        repeats: The most turns per subnet, beyond three rounds a visit.
        seconds: The most time per subnet, beyond three rounds a visit and its conversion.
        tolerance: A standard error of this share of the value, without the 0.5 %, is enough.
        cuda_graph: Replay each subnet as a CUDA graph, which launches all its kernels at once.
        compile_seconds: The search ends where preparing the largest subnet, converting or
            compiling, takes longer: each subnet will take about as long.

    Raises:
        ObjectiveError: An argument is out of range, the runtime is unknown, not installed, or does
            not compute in this precision; on binding: there is no input, no such device, or the
            runtime does not run on it.

    Example:
        >>> import torch
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> latency, space = Latency().bind(net, torch.zeros(1, 1, 8, 8)), net.search_space()
        >>> (small, _), (large, error) = latency([space.smallest, space.largest])
        >>> 0 < small < large, 0 < error < large
        (True, True)

    References:
        Chen and Revels, Robust benchmarking in noisy environments, IEEE HPEC 2016: why the fastest.
    """

    unit: ClassVar[str] = "ms"

    def from_ms(self, ms: float, error: float) -> tuple[float, float]:
        """Return the value of the measure, and its standard error, of a latency."""
        return ms, error

    def to_ms(self, value: float) -> float:
        """Return the latency of a value of the measure."""
        return value

    def bind(self, elastic: nn.Module, example_input: Any) -> LatencyMeasure:
        """Return the measure of one super-network: pairs (value, standard error)."""
        inputs = self.batch(example_input)
        bench = Bench(self, elastic, inputs)
        tensors = [*elastic.named_parameters(), *elastic.named_buffers()]
        shapes = [[name, [*t.shape], str(t.dtype)] for name, t in tensors]
        with activated(elastic, elastic_part(elastic).search_space().largest):
            layers = re.sub("0x[0-9a-f]+", "", repr(elastic))  # strides, which no shape tells
        effort = [float(x) for x in (_PROTOCOL, self.repeats, self.seconds, self.tolerance)]
        what = [shapes, layers, code_fingerprint(elastic), described(inputs), effort]
        if not callable(getattr(elastic_part(elastic), "extract", None)):
            what.append("sliced")  # earlier versions timed all weights of such a network
        rest = digest(what)
        basis = f"{describe_device(self.device)}, {bench}, batch {self.batch_size}, {rest}"
        scale = _Scale(self, self._meter(bench, elastic, basis))
        return LatencyMeasure(
            self.name, scale, self.unit,
            fingerprint=f"{self.name}: {basis}", on_reference=scale.on_reference, comparing=True,
            timings=scale.timings,
        )  # fmt: skip

    def _meter(self, bench: Bench, elastic: nn.Module, basis: str) -> Meter:
        """Return a meter, of the other kind of measure if there is one for the same timings."""
        key = (id(elastic), basis)
        meter = _METERS.get(key)
        if meter is None or not meter.shares(elastic, bench.inputs, type(self)):
            meter = _METERS[key] = Meter(bench, elastic)
        meter.kinds.add(type(self))
        return meter

    def timing(
        self, net: nn.Module, example_input: Any = None, *, reference: nn.Module | None = None
    ) -> Timing:
        """Time any network under these settings, alone or in turns with another one.

        Args:
            net: Not changed; it runs in eval mode, as a copy.
            example_input: Where the settings have no `input`.
            reference: A network that takes turns with it; the times are then relative to its own.

        Returns:
            Median, standard error and quartiles, in ms or as a ratio.

        Raises:
            ObjectiveError: As `bind` does.
            MeasurementError: A network does not take the input, or the runtime not the network.

        Example:
            >>> import torch
            >>> small, large = nn.Linear(64, 64), nn.Linear(640, 640)
            >>> Latency().timing(small, torch.zeros(1, 64)).value > 0
            True
        """
        nets = [net] if reference is None else [reference, net]
        bench = Bench(self, net, self.batch(example_input))
        passes: list[ForwardPass] = []
        with torch_threads(bench.conditions.threads):
            try:
                passes.extend(bench.prepare(partial(_copy, n), class_name(n)) for n in nets)
                return bench.time(passes[-1:], None if reference is None else passes[0])[0]
            finally:
                for forward in passes:
                    forward.release()


@dataclass(frozen=True, eq=False)
class Throughput(Latency):
    """Samples per second of the extracted subnet, one batch after the other: 1000 batch_size / ms.

    The reciprocal of `Latency`, measured in the same way with the same arguments. Where a search
    asks for both, with equal arguments, each subnet is measured once. Direction: `"max"`.

    Example:
        >>> import torch
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> rate = Throughput(batch_size=8).bind(net, torch.zeros(1, 1, 8, 8))
        >>> space = net.search_space()
        >>> (fast, _), (slow, _) = rate([space.smallest, space.largest])
        >>> fast > slow > 0
        True
    """

    name: str = "samples_per_s"
    unit: ClassVar[str] = "1/s"

    def from_ms(self, ms: float, error: float) -> tuple[float, float]:
        """Return the samples per second, and their standard error, of a latency."""
        return 1000 * self.batch_size / ms, 1000 * self.batch_size / ms * error / ms

    def to_ms(self, value: float) -> float:
        """Return the latency of a number of samples per second."""
        return 1000 * self.batch_size / value


class _Scale:
    """The function of a measure: the ratios of a meter on a scale in the measure's unit.

    Attributes:
        timings: By subnet its last timing, relative to the largest.
    """

    def __init__(self, settings: Latency, meter: Meter) -> None:
        self.settings, self.meter = settings, meter
        self._anchor: float | None = None
        self.timings: dict[Subnet, Timing] = {}

    def on_reference(self, subnet: Subnet, value: float) -> None:
        """Put all values on the scale on which an earlier measurement gave this one."""
        if not 0 < value < math.inf:
            what, unit = type(self.settings).__name__.lower(), self.settings.unit
            msg = f"on_reference({subnet}, {value!r}): a {what} is a positive number of {unit}."
            raise ObjectiveError(msg)
        ms = self.settings.to_ms(float(value))
        if subnet == self.meter.largest:
            self._anchor = ms
        else:  # of a part of the space, which need not hold the largest
            ((now, _),) = self([subnet])
            self._anchor = self._reference_ms() * ms / self.settings.to_ms(now)

    def __call__(self, subnets: Sequence[Subnet]) -> list[tuple[float, float]]:
        timings = self.meter.relative(subnets, type(self.settings))
        self.timings.update(zip(subnets, timings, strict=True))
        ms = self._reference_ms()
        return [
            self.settings.from_ms(t.value * ms, math.hypot(t.error, _SPELLS * t.value) * ms)
            for t in timings
        ]

    def _reference_ms(self) -> float:
        assert self.meter.alone is not None, "something was measured"
        return self._anchor or self.meter.alone.value


def _copy(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).eval()
