# SPDX-License-Identifier: Apache-2.0
"""Latency and throughput of extracted subnets, relative to the largest, on the runtime in use."""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_subnet._json import digest
from lightning_subnet._torch.device import describe_device
from lightning_subnet._torch.fingerprints import code_fingerprint
from lightning_subnet.costs.latency.bench import Bench, Meter, described
from lightning_subnet.costs.latency.timing import FEWEST, Timing, conditions
from lightning_subnet.costs.runtimes.base import Runner, runtime
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.errors import ObjectiveError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure

_PROTOCOL = 5  # goes up when values of another version of these files are not to be reused
_SPELLS = 0.005  # of the value: what two runs differ by where contention outlasts a measurement
_METERS: weakref.WeakValueDictionary[tuple[Any, ...], Meter] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Latency:
    """Milliseconds of one forward pass of the extracted subnet, on the runtime that it ships to.

    Timed is what `extract` returns, in inference mode: for a network that cannot be sliced a frozen
    copy (`sliced=False`), which is often as slow as the super-network. Inputs are in place: no copy
    is timed. `runtime` is one of

    - `"eager"`: torch as it is.
    - `"compile"`: `torch.compile` of each subnet by itself, which costs seconds to minutes a subnet
      (again a tenth of it where the same subnet was compiled before: Inductor keeps its kernels on
      disk). Dynamo's limits and what it kept of a subnet are put back after each.
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
        runtime: What runs them.
        precision: As Lightning names it: `"32-true"`, `"bf16-true"` and `"16-true"` cast the
            network, `"bf16-mixed"` and `"16-mixed"` autocast; `"32"`, `"bf16"` and `"16"` are short
            for `"32-true"` and the mixed ones. None: the precision of the weights. ONNX Runtime has
            no mixed ones, and OpenVINO only those: it casts what gains by it.
        input: A tensor or a tuple of positional arguments; the first row of each tensor is repeated
            `batch_size` times. None: `fit` takes `example_input_array` or a validation sample.
        name: The measure's name; two latencies in one search need two.
        repeats: Most turns per subnet, beyond three rounds a visit.
        seconds: Most time per subnet, beyond three rounds a visit, and what it takes to convert it.
        tolerance: Enough is a standard error of this share of the value, without the 0.5 %.
        cuda_graph: Replay each subnet as a CUDA graph, which launches all its kernels at once.
        compile_seconds: The search ends where preparing the largest subnet, converting or
            compiling, takes longer: each subnet will take about as long.

    Raises:
        ObjectiveError: An argument is out of range, the runtime is unknown, not installed, or does
            not compute in this precision; on binding, no input, no such device, or a device on
            which the runtime does not run.

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
    runtime: str = "eager"
    precision: str | None = None
    input: Any = None
    name: str = "latency_ms"
    repeats: int = 100
    seconds: float = 2.0
    tolerance: float = 0.005
    cuda_graph: bool = False
    compile_seconds: float = 300.0

    _unit: ClassVar[str] = "ms"

    def __post_init__(self) -> None:
        kind = type(self).__name__
        least = {"batch_size": 1, "threads": 1, "repeats": FEWEST}
        least |= {"seconds": 0, "tolerance": 0, "compile_seconds": 0}
        for name, low in least.items():
            value: Any = getattr(self, name)
            number = isinstance(value, Integral if low else Real) and not isinstance(value, bool)
            if not (number and low <= value < math.inf) and (name, value) != ("threads", None):
                wanted = f"{'an integer' if low else 'a finite number'} of at least {low}"
                msg = f"{kind}: {name}={value!r:.60} must be {wanted}."
                raise ObjectiveError(msg)
        try:
            runtime(self.runtime, self.precision, cuda_graph=self.cuda_graph)
        except ObjectiveError as error:
            raise ObjectiveError(f"{kind}: {error}") from error
        if self.input is not None:
            _batch(self.input)

    def bind(self, elastic: nn.Module, example_input: Any) -> Measure:
        """Return the measure of one super-network: pairs (value, standard error)."""
        inputs = self._inputs(example_input)
        bench = Bench(self, elastic, inputs)
        tensors = [*elastic.named_parameters(), *elastic.named_buffers()]
        shapes = [[name, [*t.shape], str(t.dtype)] for name, t in tensors]
        with activated(elastic, elastic_part(elastic).search_space().largest):
            layers = re.sub("0x[0-9a-f]+", "", repr(elastic))  # strides, which no shape tells
        timing = [float(x) for x in (_PROTOCOL, self.repeats, self.seconds, self.tolerance)]
        rest = digest([shapes, layers, code_fingerprint(elastic), described(inputs), timing])
        told = f"{describe_device(self.device)}, {bench}, batch {self.batch_size}, {rest}"
        bound = _Bound(self, self._meter(bench, elastic, told))
        return Measure(
            self.name, bound, self._unit,
            fingerprint=f"{self.name}: {told}", on_reference=bound.on_reference, comparing=True,
        )  # fmt: skip

    def _meter(self, bench: Bench, elastic: nn.Module, told: str) -> Meter:
        """Return a meter, of the other kind of measure if there is one for the same timings."""
        key = (id(elastic), told)
        known = _METERS.get(key)
        if known is None or not known.shares(elastic, bench.inputs, type(self)):
            known = _METERS[key] = Meter(bench, elastic)
        known.kinds.add(type(self))
        return known

    def _inputs(self, example_input: Any) -> tuple[Any, ...]:
        return _batch(example_input if self.input is None else self.input, self.batch_size)

    def _value(self, ms: float, error: float) -> tuple[float, float]:
        """Return the measure's value and error of a latency."""
        return ms, error

    def _ms(self, value: float) -> float:
        """Return the latency behind a value."""
        return value

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
            >>> small, large = nn.Linear(64, 64), nn.Linear(640, 640)
            >>> Latency().timing(small, torch.zeros(1, 64)).value > 0
            True
        """
        nets = [net] if reference is None else [reference, net]
        bench = Bench(self, net, self._inputs(example_input))
        runners: list[Runner] = []
        with conditions(bench.conditions.threads):
            try:
                for each in nets:
                    make = partial(_copied, each)
                    runners.append(bench.ready(make, type(each).__name__))
                reference_runner = None if reference is None else runners[0]
                return bench.timed(runners[-1:], reference_runner)[0]
            finally:
                for runner in runners:
                    runner.release()


@dataclass(frozen=True, eq=False)
class Throughput(Latency):
    """Samples per second of the extracted subnet, one batch after the other: 1000 batch_size / ms.

    The reciprocal of `Latency`, measured in the same way with the same arguments. Where a search
    asks for both, with equal arguments, each subnet is measured once. Direction: `"max"`.

    Example:
        >>> from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> rate = Throughput(batch_size=8).bind(net, torch.zeros(1, 1, 8, 8))
        >>> space = net.search_space()
        >>> (fast, _), (slow, _) = rate([space.smallest, space.largest])
        >>> fast > slow > 0
        True
    """

    name: str = "samples_per_s"
    _unit: ClassVar[str] = "1/s"

    def _value(self, ms: float, error: float) -> tuple[float, float]:
        return 1000 * self.batch_size / ms, 1000 * self.batch_size / ms * error / ms

    def _ms(self, value: float) -> float:
        return 1000 * self.batch_size / value


class _Bound:
    """A measure of one super-network, on a scale of its own.

    `timings` has what was measured of each subnet last, relative to the largest.
    """

    def __init__(self, settings: Latency, meter: Meter) -> None:
        self._settings, self._meter = settings, meter
        self._anchor: float | None = None
        self.timings: dict[Subnet, Timing] = {}

    def on_reference(self, subnet: Subnet, value: float) -> None:
        """Put all values on the scale on which an earlier measurement gave this one."""
        if not 0 < value < math.inf:
            what, unit = type(self._settings).__name__.lower(), self._settings._unit
            msg = f"on_reference({subnet}, {value!r}): a {what} is a positive number of {unit}."
            raise ObjectiveError(msg)
        ms = self._settings._ms(float(value))
        if subnet == self._meter.largest:
            self._anchor = ms
        else:  # of a part of the space, which need not hold the largest
            ((measured, _),) = self([subnet])
            self._anchor = self._scale() * ms / self._settings._ms(measured)

    def __call__(self, subnets: Sequence[Subnet]) -> list[tuple[float, float]]:
        timings = self._meter.relative(subnets, type(self._settings))
        self.timings.update(zip(subnets, timings, strict=True))
        anchor = self._scale()
        return [
            self._settings._value(t.value * anchor, math.hypot(t.error, _SPELLS * t.value) * anchor)
            for t in timings
        ]

    def _scale(self) -> float:
        """Return what the reference takes, in ms."""
        assert self._meter.alone is not None, "something was measured"
        return self._anchor or self._meter.alone.value


def _batch(given: Any, n: int = 1) -> tuple[Any, ...]:
    """Return positional arguments, the first row of each tensor n times."""
    inputs = given if isinstance(given, tuple) else (given,)
    tensors = [x for x in inputs if torch.is_tensor(x)]
    if not tensors or any(x.ndim == 0 or len(x) == 0 for x in tensors):
        msg = f"Latency: {described(inputs):.60} is no batch. Give input= a tensor (1, ...)."
        raise ObjectiveError(msg)
    firsts = (x.detach()[:1] if torch.is_tensor(x) else x for x in inputs)
    return tuple(x.repeat_interleave(n, 0) if torch.is_tensor(x) else x for x in firsts)


def _copied(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).eval()
