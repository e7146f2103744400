# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin
from lightning_subnet.costs import Throughput
from lightning_subnet.costs.device import describe_device
from lightning_subnet.costs.latency.latency import Latency, LatencyMeasure
from lightning_subnet.costs.runtimes.base import Conditions, ForwardPass
from lightning_subnet.costs.runtimes.registry import RUNTIMES
from lightning_subnet.costs.runtimes.torch import Eager
from lightning_subnet.elasticity.protocol import elastic
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.study.measures import NetworkMeasure
from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
from tests.elasticity.slicing.networks import TOKENS, HatNet, made

IMAGE = torch.zeros(1, 1, 8, 8)
ROWS = torch.zeros(1, 4)
QUICK = {"seconds": 0.0}  # the fewest rounds
USUAL = "eef694b91839096806d2de76049fc318"  # of one network, one input and the usual effort


class Observed(SubnetMixin, nn.Module):
    """Runs on a frozen copy, so what its forward passes meet is kept on the class.

    It decides by values, so it cannot be sliced, which would leave out that it sleeps. It sleeps
    `ms` ms, times a factor that grows with every call of any copy by `growth`.
    """

    met: list[dict[str, Any]]
    growth = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.ms = 8

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.met = []

    def search_space(self) -> SearchSpace:
        return SearchSpace(ms=[0, 4, 8])

    def activate(self, subnet: Subnet) -> None:
        self.ms = subnet["ms"]

    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        if x.isnan().any():
            raise ValueError("not a number")
        self.met.append(
            {
                "threads": torch.get_num_threads(),
                "gc": gc.isenabled(),
                "inference": torch.is_inference_mode_enabled(),
                "training": self.training,
                "net": id(self),
                "ms": self.ms,
                "inputs": (x, *more),
            }
        )
        if self.ms:
            time.sleep(self.ms / 1000 * (1 + self.growth * len(self.met)))
        return self.layer(x)


def sleeper(**attributes: Any) -> Any:
    """Return a network of a class of its own, and so with observations of its own."""
    return type("Sleeper", (Observed,), attributes)()


def value(measure: Any, net: Any, **choices: Any) -> float:
    return measure([net.search_space().subnet(**choices)])[0][0]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def state() -> tuple[Any, ...]:
    return (
        torch.get_num_threads(),
        gc.isenabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_rng_state().tolist(),
    )


def test_the_smallest_is_faster_than_the_largest() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space = net.search_space()
    measure = Latency(seconds=0.3).bind(net, IMAGE)
    pairs = measure([space.smallest, space.largest, *space.sample(2, rng=0)])
    assert all(math.isfinite(v) and 0.005 * v <= e < 0.5 * v for v, e in pairs)
    assert pairs[0][0] * 1.5 < pairs[1][0]
    assert (measure.unit, measure.exact, measure.takes) == ("ms", False, "subnets")
    assert isinstance(Latency(), NetworkMeasure)


def test_values_are_on_the_scale_of_a_recorded_largest() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space = net.search_space()
    measure = Latency(**QUICK).bind(net, IMAGE)
    assert measure.on_reference is not None
    measure.on_reference(space.largest, 1000.0)
    (small, _), (large, error) = measure([space.smallest, space.largest])
    assert large == 1000.0
    assert 200 < small < 700
    assert 5 <= error < 500


def test_timings_are_those_of_the_last_measurement() -> None:
    net = sleeper()
    measure = Latency(**QUICK).bind(net, ROWS)
    assert isinstance(measure, LatencyMeasure)
    assert dict(measure.timings) == {}
    half = net.search_space().subnet(ms=4)
    measure([half])
    assert list(measure.timings) == [half]
    assert measure.timings[half].value == pytest.approx(0.5, rel=0.1)
    before = measure.timings[half]
    measure([half])
    assert measure.timings[half] is not before


def test_any_recorded_subnet_sets_the_scale() -> None:
    net = sleeper()
    measure = Latency(**QUICK).bind(net, ROWS)
    measure.on_reference(net.search_space().subnet(ms=4), 100.0)
    assert value(measure, net, ms=4) == pytest.approx(100, rel=0.1)
    assert value(measure, net, ms=8) == pytest.approx(200, rel=0.1)
    with pytest.raises(ObjectiveError, match="a latency is a positive number"):
        measure.on_reference(net.search_space().largest, 0.0)


def test_half_the_time_is_half_the_value() -> None:
    net = sleeper()
    measure = Latency(**QUICK).bind(net, ROWS)
    measure.on_reference(net.search_space().largest, 8.0)
    space = net.search_space()
    (half, error), (whole, _) = measure([space.subnet(ms=4), space.largest])
    assert half == pytest.approx(4, rel=0.1)
    assert whole == 8.0
    assert error < 0.4


def test_a_common_drift_cancels() -> None:
    net = sleeper(growth=0.02)
    measure = Latency(**QUICK).bind(net, ROWS)
    measure.on_reference(net.search_space().largest, 8.0)
    assert value(measure, net, ms=4) == pytest.approx(4, rel=0.1)
    assert 1 + net.growth * len(net.met) > 1.8  # the machine became as much slower meanwhile


def test_a_fast_network_is_called_many_times_for_one_timing() -> None:
    net = sleeper()
    measure = Latency(repeats=15, **QUICK).bind(net, ROWS)
    measure.on_reference(net.search_space().largest, 8.0)
    assert 0 < value(measure, net, ms=0) < 0.8
    calls = sum(met["ms"] == 0 for met in net.met)
    assert calls > 15 * 5


def test_rounds_go_from_15_to_repeats() -> None:
    def rounds(**settings: Any) -> int:
        net = sleeper()
        Latency(**settings).bind(net, ROWS)([net.search_space().largest])
        return len(net.met)

    fewest = rounds(tolerance=0, seconds=0)
    # One to see that it runs, 4 to 20 to warm up, and one at each of four more visits.
    assert 15 + 5 <= fewest <= 15 + 25
    assert rounds(tolerance=0, repeats=40, seconds=60) >= 40 + 5
    assert rounds(tolerance=100, repeats=40, seconds=1) <= 15 + 25


@pytest.mark.usefixtures("two_threads")
def test_the_conditions_of_a_forward_pass_and_what_is_left_afterwards() -> None:
    net = sleeper()
    net.train()
    net.activate(net.search_space().smallest)
    before = state()
    Latency(threads=1, **QUICK).bind(net, ROWS)([net.search_space().largest])
    assert state() == before
    assert net.training
    assert net.active_subnet == net.search_space().smallest
    checked, *timed = net.met  # extraction runs the example once
    assert (checked["threads"], checked["training"]) == (1, False)
    seen = {(m["threads"], m["gc"], m["inference"], m["training"], m["ms"]) for m in timed}
    assert seen == {(1, False, True, False, 8)}
    assert id(net) not in {met["net"] for met in net.met}

    as_torch_has_it = sleeper()
    Latency(threads=None, **QUICK).bind(as_torch_has_it, ROWS)([net.search_space().largest])
    assert {met["threads"] for met in as_torch_has_it.met} == {2}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("fails_at", [0, 12])  # at first, and in the midst of the rounds
def test_an_exception_leaves_nothing_behind(collecting: bool, fails_at: int) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.ms == 4 and sum(met["ms"] == 4 for met in self.met) == fails_at:
            raise OSError("broken")
        return Observed.forward(self, x)

    net = sleeper(forward=forward)
    measure = Latency(**QUICK).bind(net, ROWS)
    (gc.enable if collecting else gc.disable)()
    before = state()
    try:
        with pytest.raises((OSError, RuntimeError), match="broken"):
            measure([net.search_space().subnet(ms=4)])
        assert state() == before
    finally:
        gc.enable()


def test_random_states_are_as_before_although_extraction_draws() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    before = state()
    Latency(**QUICK).bind(net, IMAGE)([net.search_space().smallest])
    assert state() == before


def test_the_reference_is_extracted_once() -> None:
    extracted = []

    class Counted(ElasticMobileNetV3):
        def extract(self, subnet: Subnet) -> Any:
            extracted.append(subnet)
            return super().extract(subnet)

    net = Counted.tiny(n_classes=10)
    space = net.search_space()
    measure = Latency(**QUICK).bind(net, IMAGE)
    assert extracted == []
    measure([space.smallest])
    measure([space.smallest, space.largest])
    assert extracted == [space.largest, space.smallest, space.smallest]


def test_a_network_that_cannot_be_sliced_is_timed_as_a_frozen_copy() -> None:
    net = sleeper()
    Latency(**QUICK).bind(net, ROWS)([net.search_space().smallest])
    assert {met["ms"] for met in net.met} == {0, 8}


class Sees(Eager):
    """Keeps the networks that it is given."""

    name = "sees"
    nets: ClassVar[list[nn.Module]] = []

    def make(self, net: nn.Module, inputs: tuple[Any, ...], conditions: Conditions) -> ForwardPass:
        self.nets.append(net)
        return super().make(net, inputs, conditions)


@pytest.mark.parametrize("precision", [None, "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("family", ["hat", "whittle", "autoformer"])
def test_a_network_without_extract_is_timed_as_it_is_sliced(
    family: str, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {**RUNTIMES.table, "sees": f"{__name__}:Sees"}
    monkeypatch.setattr(RUNTIMES, "table", table)
    monkeypatch.setattr(Sees, "nets", [])
    net, example = made(family)
    space = net.search_space()
    measure = Latency(precision=precision, runtime="sees", **QUICK).bind(net, example)
    measure([space.smallest])
    assert {type(x).__name__ for x in Sees.nets} == {"SlicedNetwork"}
    assert len({sum(p.numel() for p in x.parameters()) for x in Sees.nets}) == 2
    kinds = {p.dtype for x in Sees.nets for p in x.parameters()}
    assert kinds == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net.active_subnet == space.largest


def test_kept_slices_of_what_cannot_be_sliced_are_cast_too() -> None:
    class Decides(HatNet):
        def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(tokens, mask) if tokens.sum() >= 0 else self.embed(tokens)

    net = Decides().eval()
    measure = Latency(precision="bf16-true", **QUICK).bind(net, TOKENS)
    assert all(v > 0 for v, _ in measure([net.search_space().smallest]))


def test_someone_elses_network() -> None:
    net = elastic(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        space=SearchSpace(scale=[1, 2]),
        activate=lambda net, subnet: setattr(net, "scale", subnet["scale"]),
    )
    assert value(Latency(**QUICK).bind(net, ROWS), net, scale=1) > 0
    inside = nn.ModuleDict({"elastic": net})
    assert value(Latency(**QUICK).bind(inside, ROWS), net, scale=1) > 0


def test_a_tuple_of_inputs_is_batched_and_cast() -> None:
    net = sleeper().double()
    inputs = (torch.rand(2, 4), torch.tensor([[3], [4]]), "mean")
    Latency(batch_size=3, input=inputs, **QUICK).bind(net, None)([net.search_space().smallest])
    x, index, mode = net.met[-1]["inputs"]
    assert x.dtype == torch.float64
    assert x.is_contiguous()
    assert torch.equal(x, inputs[0][:1].double().expand(3, 4))
    assert index.tolist() == [[3], [3], [3]]
    assert mode == "mean"


def test_the_input_of_the_measure_goes_before_the_example() -> None:
    net = sleeper()
    Latency(input=torch.ones(5, 4), **QUICK).bind(net, ROWS)([net.search_space().smallest])
    assert net.met[-1]["inputs"][0].tolist() == [[1.0] * 4]


def fingerprint(net: nn.Module, example: Any = IMAGE, **settings: Any) -> str | None:
    return Latency(**settings).bind(net, example).fingerprint


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 2},
        {"threads": 2},
        {"input": torch.zeros(1, 1, 16, 16)},
        {"input": IMAGE.double()},
        {"name": "ms"},
        {"repeats": 50},
        {"seconds": 1.0},
        {"tolerance": 0.1},
    ],
)
def test_the_fingerprint_depends_on_every_argument(settings: dict[str, Any]) -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    assert fingerprint(net, **settings) != fingerprint(net)


def test_the_fingerprint_depends_on_the_architecture_and_not_on_weights() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    first = fingerprint(net)
    assert first == fingerprint(ElasticMobileNetV3.tiny(n_classes=10))
    net.activate(net.search_space().smallest)
    assert first == fingerprint(net, torch.ones(4, 1, 8, 8))
    assert torch.__version__ in first
    others = [
        ElasticMobileNetV3.tiny(n_classes=11),
        ElasticMobileNetV3.tiny(n_classes=10, strides=(1, 2, 2)),  # the same shapes
        ElasticMobileNetV3.tiny(n_classes=10).double(),
    ]
    assert first not in [fingerprint(other) for other in others]


def test_the_fingerprint_depends_on_the_code() -> None:
    class A(Observed):
        pass

    class B(Observed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    B.__qualname__ = A.__qualname__
    B.__name__ = A.__name__
    assert fingerprint(A(), ROWS) != fingerprint(B(), ROWS)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [  # recorded with commit 6ab0839, when the settings stood in Latency itself
        (Latency, {}, "latency_ms: {}, eager, 32-true, 1 threads, batch 1, " + USUAL),
        (Throughput, {}, "samples_per_s: {}, eager, 32-true, 1 threads, batch 1, " + USUAL),
        (
            Latency,
            {"batch_size": 3},
            "latency_ms: {}, eager, 32-true, 1 threads, batch 3, 85497e36ce5d2d2b131e82c2eccb806d",
        ),
        (
            Latency,
            {"threads": 2, "precision": "bf16"},
            "latency_ms: {}, eager, bf16-mixed, 2 threads, batch 1, " + USUAL,
        ),
        (
            Throughput,
            {"repeats": 50, "seconds": 0.5, "tolerance": 0.01, "name": "ms"},
            "ms: {}, eager, 32-true, 1 threads, batch 1, 232201d5a5ba14a9fc0b1b238fd8f9f0",
        ),
        (
            Latency,
            {"runtime": "compile"},
            "latency_ms: {}, torch.compile, 32-true, 1 threads, batch 1, " + USUAL,
        ),
        (
            Latency,
            {"runtime": "onnxruntime"},
            "latency_ms: {}, onnxruntime {onnxruntime}, CPUExecutionProvider, 32-true, 1 threads, "
            "batch 1, " + USUAL,
        ),
        (
            Latency,
            {"runtime": "openvino"},
            "latency_ms: {}, openvino {openvino}, latency, 1 stream, 32-true, 1 threads, batch 1, "
            + USUAL,
        ),
    ],
)
def test_fingerprints_are_those_of_earlier_versions(
    kind: type[Latency], settings: dict[str, Any], expected: str
) -> None:
    # Of classes of torch alone, as the code of others is in the hash.
    net = elastic(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        space=SearchSpace(scale=[1, 2]),
        activate=lambda net, subnet: setattr(net, "scale", subnet["scale"]),
        extract=lambda net, subnet: copy.deepcopy(net),
    )
    runtime = settings.get("runtime", "")
    versions = {}
    if runtime in ("onnxruntime", "openvino"):
        versions[runtime] = pytest.importorskip(runtime).__version__
    measure = kind(**settings).bind(net, ROWS)
    assert measure.fingerprint == expected.format(describe_device("cpu"), **versions)
    del net.extract  # it is sliced now, where earlier versions timed all its weights
    assert kind(**settings).bind(net, ROWS).fingerprint != measure.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 must be a whole number from 1"),
        ({"batch_size": None}, r"batch_size=None must be a whole number"),
        ({"threads": 0}, r"threads=0 must be a whole number from 1"),
        ({"threads": True}, r"threads=True must be a whole number"),
        ({"repeats": 5}, r"repeats=5 must be a whole number from 15"),
        ({"repeats": 20.0}, r"repeats=20.0 must be a whole number"),
        ({"seconds": -1}, r"seconds=-1 must be a finite number from 0"),
        ({"seconds": math.inf}, r"seconds=inf must be a finite number"),
        ({"tolerance": math.nan}, r"tolerance=nan must be a finite number"),
        ({"tolerance": "1%"}, r"tolerance='1%' must be a finite number"),
        ({"input": [1, 2]}, r"\[1, 2\] is not a batch. Give input="),
        ({"input": torch.tensor(1.0)}, r"\(\) torch.float32 is not a batch"),
        ({"input": torch.zeros(0, 3)}, r"\(0, 3\) torch.float32 is not a batch"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        Latency(**settings)


@pytest.mark.parametrize(
    "device",
    [
        "nonsense",
        "meta",
        pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")),
    ],
)
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ObjectiveError, match=f"device='{device}' cannot be used here: "):
        Latency(device=device).bind(sleeper(), ROWS)


def test_no_input_at_all() -> None:
    with pytest.raises(ObjectiveError, match="None is not a batch"):
        Latency().bind(sleeper(), None)


def test_an_input_that_no_subnet_takes() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    measure = Latency(batch_size=2).bind(net, torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        MeasurementError, match=r"failed on an input of \(2, 3, 8, 8\) torch.float32 on cpu"
    ):
        measure([net.search_space().smallest])


def test_one_subnet_that_cannot_run_is_its_own_failure() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.ms == 4:
            raise ValueError("too narrow")
        return self.layer(x)

    net = sleeper(forward=forward)
    measure = Latency(**QUICK).bind(net, ROWS)
    with pytest.raises(RuntimeError, match=r"Subnet\(ms=4\) failed on .* too narrow") as caught:
        value(measure, net, ms=4)
    assert not isinstance(caught.value, MeasurementError)
    assert value(measure, net, ms=8) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space = net.search_space()
    measure = Latency(device="cuda").bind(net, IMAGE)
    (small, _), (large, error) = measure([space.smallest, space.largest])
    assert 0 < small < large
    assert 0 < error < large
    assert torch.cuda.get_device_name() in measure.fingerprint
    assert next(net.parameters()).device.type == "cpu"
