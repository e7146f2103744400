# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import Latency, SearchSpace, Subnet, SubnetMixin, SubnetSearch
from lightning_subnet.costs import Throughput
from lightning_subnet.costs.runtimes.registry import make, names
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.experiments import specialise
from lightning_subnet.study.measures import by_name

ROOT = Path(__file__).resolve().parents[3]
ROWS = torch.rand(1, 256, generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {"seconds": 0.05, "repeats": 15}
CONVERTED = ("onnxruntime", "openvino")


class Wide(SubnetMixin, nn.Module):
    """256 -> width -> 256: the time is that of the products, in any runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256))

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=[32, 1024, 2048])

    def activate(self, subnet: Subnet) -> None:
        self.active = subnet

    def extract(self, subnet: Subnet) -> nn.Module:
        w, (first, _, last) = subnet["width"], self.layers
        plain = nn.Sequential(nn.Linear(256, w), nn.ReLU(), nn.Linear(w, 256))
        weights = first.weight[:w], first.bias[:w], last.weight[:, :w], last.bias
        with torch.no_grad():
            for p, weight in zip(plain.parameters(), weights, strict=True):
                p.copy_(weight)
        return plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, (first, relu, last) = self.active["width"], self.layers
        x = relu(F.linear(x, first.weight[:w], first.bias[:w]))
        return F.linear(x, last.weight[:, :w], last.bias)


class Strange(nn.Module):
    """An operator without an ONNX form; eager torch runs it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Partly(Wide):
    """One width that no converter takes."""

    strange = 1024

    def extract(self, subnet: Subnet) -> nn.Module:
        plain = super().extract(subnet)
        return nn.Sequential(plain, Strange()) if subnet["width"] == self.strange else plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return Strange()(x) if self.active["width"] == self.strange else x


class OnlyStrange(Partly):
    strange = 2048


class Lit(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", self.net(batch[0]).square().mean())


def batches() -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(8, 256)), batch_size=4)


def search(measures: list[Any], **settings: Any) -> SubnetSearch:
    objectives = {"loss": "min"} | {
        m.name: "max" if isinstance(m, Throughput) else "min" for m in measures
    }
    usual = {"strategy": "random", "budget": 3, "storage": None, "calibration_images": 0}
    usual |= {"verify_front": False, "objectives": objectives, "measures": measures}
    return SubnetSearch(**{**usual, **settings})


def state() -> dict[str, Any]:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    return {
        "threads": torch.get_num_threads(),
        "collecting": gc.isenabled(),
        "gradient": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "random": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "cores": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "dynamo": dynamo.get_config_copy(),
        "inductor": inductor.cpp.threads,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "logging": {
            name: (logger.level, [str(h) for h in logger.handlers])
            for name in ("torch", "onnxscript", "onnxruntime", "openvino")
            for logger in [logging.getLogger(name)]
        },
    }


@pytest.fixture(autouse=True)
def two_threads() -> Any:  # so that one thread while timing is another number
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


COLD = {"compile": pytest.mark.slow}  # its first compilation takes a quarter of a minute


@pytest.mark.parametrize("name", [pytest.param(n, marks=COLD.get(n, ())) for n in names()])
def test_each_runtime_measures_and_leaves_nothing_changed(name: str) -> None:
    net = Wide()
    space = net.search_space()
    measure = Latency(runtime=name, **QUICK).bind(net, ROWS)
    measure([space.largest])  # after which everything that is imported once is imported
    before = state()
    (small, error), (large, _) = measure([space.smallest, space.largest])
    after = state()
    assert {k: v for k, v in after.items() if v != before[k]} == {}
    assert 0 < small * 1.5 < large
    assert 0 < error < small
    timing = measure.timings[space.smallest]
    assert 0 < timing.low <= timing.value <= timing.high < 1
    assert timing.preparing > 0
    assert timing.rounds >= 15


@pytest.mark.parametrize("name", CONVERTED)
def test_what_is_timed_gives_the_outputs_of_the_network(name: str) -> None:
    # The session that is timed is what a converted file would be run by, so its form is compared.
    from lightning_subnet.export.formats.onnx import onnx_session, to_onnx
    from lightning_subnet.export.formats.openvino import openvino_compiled, to_openvino

    net = Wide().extract(Wide().search_space().largest).eval()
    expected = net(ROWS).detach().numpy()
    if name == "onnxruntime":
        session = onnx_session(to_onnx(net, ROWS, dynamic_batch=False), threads=1)
        assert session.get_inputs()[0].shape == [1, 256]  # no open batch size is timed
        outputs = session.run(None, {"input": ROWS.numpy()})[0]
    else:
        compiled = openvino_compiled(to_openvino(net, ROWS, dynamic_batch=False), threads=1)
        assert compiled.input(0).shape == [1, 256]
        outputs = compiled(ROWS.numpy())[0]
    assert abs(outputs - expected).max() < 1e-5


def fingerprint(**settings: Any) -> str:
    text = Latency(**{**QUICK, **settings}).bind(wide(), ROWS).fingerprint
    assert text is not None
    return text


def wide() -> Wide:
    net = Wide()
    net.activate(net.search_space().largest)
    return net


SETTINGS: list[dict[str, Any]] = [
    {},
    *({"runtime": name} for name in names() if name != "eager"),
    {"precision": "bf16-true"},
    {"precision": "bf16"},
    {"precision": "16-true"},
    {"threads": 2},
    {"batch_size": 2},
    {"runtime": "onnxruntime", "threads": 2},
    {"runtime": "onnxruntime", "precision": "16-true"},
]
BFLOAT: dict[str, Any] = {"runtime": "openvino", "precision": "bf16"}


def test_fingerprints_tell_settings_apart_and_versions() -> None:
    import onnxruntime
    import openvino

    from lightning_subnet.export.formats.openvino import openvino_core

    texts = [fingerprint(**settings) for settings in SETTINGS]
    if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        texts.append(fingerprint(**BFLOAT))
    else:
        with pytest.raises(ObjectiveError, match=r"'bf16-mixed': OpenVINO has only .*processor"):
            fingerprint(**BFLOAT)
    assert len(set(texts)) == len(texts)
    assert onnxruntime.__version__ in fingerprint(runtime="onnxruntime")
    assert openvino.__version__ in fingerprint(runtime="openvino")
    assert fingerprint(precision="32") == fingerprint(precision="32-true") == fingerprint()


def program(code: str, *arguments: str) -> str:
    """Run code in a new interpreter; return the last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="where signals have a stack of OpenVINO's")
def test_signals_find_their_stack_when_openvino_is_done() -> None:
    output = program(
        "import gc, os, signal, torch\n"
        "from lightning_subnet.export.formats.openvino import openvino_compiled, to_openvino\n"
        "model = to_openvino(torch.nn.Linear(3, 2), torch.zeros(1, 3))\n"
        "first, second = openvino_compiled(model), openvino_compiled(model)\n"
        "del first; gc.collect()\n"
        "del second; gc.collect()\n"
        "signal.signal(signal.SIGCHLD, lambda *_: print('handled'))  # as a DataLoader does\n"
        "os.kill(os.getpid(), signal.SIGCHLD)"
    )
    assert output == "handled"


@pytest.mark.slow
def test_fingerprints_are_those_of_another_process() -> None:
    cases = [{}, {"runtime": "compile"}, {"runtime": "onnxruntime", "precision": "16-true"}]
    output = program(
        "import json, sys; from tests.costs.runtimes.test_base import fingerprint\n"
        "print(json.dumps([fingerprint(**s) for s in json.loads(sys.argv[1])]))",
        json.dumps(cases),
    )
    assert json.loads(output) == [fingerprint(**s) for s in cases]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (torch.float32, False)),
        ({"precision": "bf16-true"}, (torch.bfloat16, False)),
        ({"precision": "bf16"}, (torch.bfloat16, True)),  # Lightning's short for bf16-mixed
        ({"precision": "16-true"}, (torch.float16, False)),
        ({"precision": "64-true"}, (torch.float64, False)),
    ],
)
def test_precisions_are_those_of_a_trainer(
    settings: dict[str, Any], expected: tuple[torch.dtype, bool]
) -> None:
    met = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            met.append((y.dtype, torch.is_autocast_enabled("cpu"), self.weight.dtype))
            return y

    class Net(Wide):
        def extract(self, subnet: Subnet) -> nn.Module:
            return Spy(256, 4)

    net = Net()
    Latency(**QUICK, **settings).bind(net, ROWS)([net.search_space().largest])
    dtype, mixed = expected
    assert set(met) == {(dtype, mixed, torch.float32 if mixed else dtype)}
    assert net.layers[0].weight.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "onnxrutime"}, r"runtime='onnxrutime' is unknown. Did you mean 'onnxruntime'"),
        ({"runtime": "tensorrt"}, r"It is one of: 'eager', 'compile', 'onnxruntime', 'openvino'"),
        ({"precision": "fp16"}, r"precision='fp16' is unknown. .*'bf16-true'"),
        ({"precision": 8}, r"precision=8 is unknown"),
        (
            {"runtime": "onnxruntime", "precision": "bf16"},
            r"'bf16-mixed', in which runtime='onnxruntime' does not compute. Set precision= to one "
            r"of: '64-true', '32-true', '16-true'",
        ),
        (
            {"runtime": "openvino", "precision": "bf16-true"},
            r"'bf16-true', .* one of: '32-true', 'bf16-mixed', '16-mixed'",
        ),
        ({"runtime": "onnxruntime", "cuda_graph": True}, r"'onnxruntime' replays no graph"),
        ({"compile_seconds": -1}, r"compile_seconds=-1 must be a finite number"),
    ],
)
@pytest.mark.parametrize("kind", [Latency, Throughput])
def test_wrong_settings_fail_when_they_are_made(
    settings: dict[str, Any], message: str, kind: type[Latency]
) -> None:
    with pytest.raises(ObjectiveError, match=message) as caught:
        kind(**settings)
    assert str(caught.value).startswith(kind.__name__)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "openvino", "device": "cuda"}, "device='cuda' cannot be used here"),
        ({"cuda_graph": True}, "cuda_graph=True needs device='cuda', not 'cpu'"),
    ],
)
def test_what_this_machine_cannot_do_fails_on_binding(
    settings: dict[str, Any], message: str
) -> None:
    if torch.cuda.is_available() and settings.get("device") == "cuda":
        message = "runtime='openvino' does not run on 'cuda' here"
    with pytest.raises(ObjectiveError, match=message):
        Latency(**settings).bind(wide(), ROWS)


def test_a_network_in_a_precision_that_a_runtime_has_not() -> None:
    with pytest.raises(
        ObjectiveError, match=r"the network is in 'bf16-true', in which .* '32-true'"
    ):
        Latency(runtime="onnxruntime").bind(wide().bfloat16(), ROWS)
    net = wide().bfloat16()
    measure = Latency(runtime="onnxruntime", precision="32", **QUICK).bind(net, ROWS)
    assert measure([net.search_space().largest])[0][0] > 0


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_runtime_names_its_extra(name: str, extra: str) -> None:
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {name!r}: raise ImportError('No module named ' + name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from lightning_subnet import Latency\n"
        f"try: Latency(runtime={name!r})\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
        "print(Latency().runtime)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    message, runtime = done.stdout.splitlines()
    assert message.startswith(f"ObjectiveError Latency: runtime={name!r} cannot be used: ")
    assert f"pip install 'lightning-subnet[{extra}]'" in message
    assert runtime == "eager"


@pytest.mark.parametrize("name", names())
def test_an_input_that_the_network_refuses(name: str) -> None:
    measure = Latency(runtime=name).bind(wide(), torch.zeros(1, 3))
    with pytest.raises(MeasurementError, match=r"Subnet\(width=2048\)") as caught:
        measure([wide().search_space().smallest])
    message = str(caught.value)
    assert "(1, 3)" in message
    assert "input" in message.rsplit("3)", maxsplit=1)[-1]  # what to do
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize("name", CONVERTED)
def test_a_subnet_that_cannot_be_converted_is_its_own_failure(name: str) -> None:
    result = search([Latency(runtime=name, **QUICK)]).fit(
        Lit(Partly()), dataloaders=batches(), progress=False
    )
    failed = {e.subnet["width"]: e.reason for e in result.history if not e.ok}
    assert set(failed) == {1024}
    assert "bessel_j0" in failed[1024]
    assert len(result.front) > 0
    assert sum(e.ok for e in result.history) == 2


@pytest.mark.parametrize("name", CONVERTED)
def test_a_largest_that_cannot_be_converted_ends_the_search_at_once(name: str) -> None:
    unfinished = search([Latency(runtime=name, **QUICK)])
    with pytest.raises(MeasurementError, match=r"width=2048.*bessel_j0"):
        unfinished.fit(Lit(OnlyStrange()), dataloaders=batches(), progress=False)
    assert unfinished.space is None  # nothing was recorded, so no study is open


def test_a_largest_that_takes_too_long_to_prepare_ends_the_search() -> None:
    measure = Latency(runtime="onnxruntime", compile_seconds=0).bind(wide(), ROWS)
    with pytest.raises(MeasurementError, match=r"took \d+\.\d s to prepare .* compile_seconds=0"):
        measure([wide().search_space().smallest])


def grown(name: str, times: int) -> tuple[float, int, int]:
    """Return MiB, threads and open files that the second half of some measurements adds."""
    net = Wide() if name == "onnxruntime" else Many()
    subnets = list(net.search_space())[:2]
    measure = Latency(runtime=name, seconds=0, threads=2).bind(net, ROWS)
    process = psutil.Process()

    def now() -> tuple[float, int, int]:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what is free is not counted
        return process.memory_info().rss / 2**20, process.num_threads(), process.num_fds()

    states = []
    for i in range(times):
        measure([subnets[i % 2]])
        if i + 1 in (times // 2, times):
            states.append(now())
    before, after = states
    return after[0] - before[0], after[1] - before[1], after[2] - before[2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("compile", 30), ("onnxruntime", 40)])
def test_measurements_add_no_memory_threads_or_files(name: str, times: int) -> None:
    # In a process of its own, as pytest keeps every record that Dynamo logs, with graphs in it.
    output = program(
        "import json, sys; from tests.costs.runtimes.test_base import grown\n"
        "print(json.dumps(grown(sys.argv[1], int(sys.argv[2]))))",
        name, str(times),
    )  # fmt: skip
    memory, threads, files = json.loads(output)
    assert memory < 0.25 * times  # each holds 2 MiB of weights, and a copy in its session
    assert threads <= 0
    assert files <= 0


class Tagged(nn.Module):
    """What Dynamo compiles anew for each tag, to one and the same graph, which Inductor keeps."""

    def __init__(self, tag: int) -> None:
        super().__init__()
        self.tag = tag

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.tag else x


class Many(Wide):
    def search_space(self) -> SearchSpace:
        return SearchSpace(tag=range(1, 13))  # Dynamo's limit is eight

    def extract(self, subnet: Subnet) -> nn.Module:
        return Tagged(subnet["tag"])


@pytest.mark.slow
def test_every_subnet_is_compiled_although_all_share_their_code() -> None:
    from torch._dynamo.utils import counters

    net = Many()
    counters.clear()
    Latency(runtime="compile", seconds=0).bind(net, ROWS)(list(net.search_space()))
    assert counters["stats"]["unique_graphs"] == 12
    assert not counters["unimplemented"]


def test_throughput_is_the_reciprocal_and_measured_once() -> None:
    extracted = []

    class Counted(Wide):
        def extract(self, subnet: Subnet) -> nn.Module:
            extracted.append(subnet["width"])
            return super().extract(subnet)

    measures = [Latency(batch_size=4, **QUICK), Throughput(batch_size=4, **QUICK)]
    result = search(measures, checks=False).fit(
        Lit(Counted()), dataloaders=batches(), progress=False
    )
    assert sorted(extracted) == [32, 1024, 2048]
    for evaluation in result.history:
        ms, rate = (evaluation.values[name] for name in ("latency_ms", "samples_per_s"))
        assert rate == pytest.approx(4000 / ms, rel=1e-9)
        errors = [evaluation.errors[n] / evaluation.values[n] for n in evaluation.errors]
        assert errors[0] == pytest.approx(errors[1], rel=1e-9)
    fastest = result.best("samples_per_s")
    assert fastest.values["latency_ms"] == min(e.values["latency_ms"] for e in result.history)


def test_a_second_measurement_of_the_same_kind_is_a_new_one() -> None:
    net = Wide()
    one, two = net.search_space().smallest, net.search_space().largest
    settings: dict[str, Any] = {"seconds": 0.0}
    first, rate = Latency(**settings).bind(net, ROWS), Throughput(**settings).bind(net, ROWS)
    other = Latency(**settings).bind(net, ROWS)
    ((a, _), (b, _)) = first([one, two])
    assert rate([two, one]) != rate([two, one])
    assert other([one])[0][0] != a
    assert first([one])[0][0] != a
    assert first([two])[0][0] == b  # the scale itself
    of_another_batch = Throughput(batch_size=2, **settings).bind(net, ROWS)
    assert of_another_batch.fn.meter is not rate.fn.meter


def test_throughput_on_the_scale_of_a_recorded_largest() -> None:
    net = Wide()
    space = net.search_space()
    rate = Throughput(batch_size=2, **QUICK).bind(net, ROWS)
    assert rate.on_reference is not None
    rate.on_reference(space.largest, 10.0)
    assert rate([space.largest])[0][0] == pytest.approx(10.0)
    assert rate([space.smallest])[0][0] > 15
    with pytest.raises(ObjectiveError, match="a throughput is a positive number of 1/s"):
        rate.on_reference(space.largest, 0.0)


def test_two_latencies_need_two_names() -> None:
    with pytest.raises(ObjectiveError, match=r"two measures of the name 'latency_ms'.* name="):
        by_name([Latency(), Latency(batch_size=64)])
    both = [Latency(**QUICK), Latency(batch_size=64, name="latency_b64_ms", **QUICK)]
    result = search(both).fit(Lit(Wide()), dataloaders=batches(), progress=False)
    assert all(e.values["latency_b64_ms"] > e.values["latency_ms"] for e in result.history)


def test_hardware_settings_of_two_runtimes_have_labels() -> None:
    results = specialise(
        Lit(Wide()), dataloaders=batches(), objectives={"loss": "min", "latency_ms": "min"},
        settings=[Latency(**QUICK), Latency(runtime="onnxruntime", precision="32", **QUICK)],
        strategy="random", budget=2, calibration_images=0, storage=None, verify_front=False,
        progress=False,
    )  # fmt: skip
    assert list(results) == ["cpu-batch1-threads1", "cpu-batch1-threads1-onnxruntime-32"]


def test_any_network_can_be_timed_alone_and_against_another() -> None:
    small, large = nn.Linear(256, 16), nn.Sequential(nn.Linear(256, 4096), nn.Dropout())
    latency = Latency(**QUICK)
    alone = latency.timing(large, ROWS)
    ratio = latency.timing(small, ROWS, reference=large)
    assert 0 < ratio.value < 1
    assert 0 < alone.low <= alone.value <= alone.high
    assert large.training
    with pytest.raises(MeasurementError, match=r"Linear failed on an input of \(1, 3\)"):
        latency.timing(small, torch.zeros(1, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("settings", [{}, {"cuda_graph": True}, {"precision": "16-true"}])
def test_runtimes_on_a_gpu(settings: dict[str, Any]) -> None:
    net = Wide()
    space = net.search_space()
    measure = Latency(device="cuda", batch_size=512, **settings).bind(net, ROWS)
    (small, _), (large, error) = measure([space.smallest, space.largest])
    assert 0 < small < large
    assert 0 < error < large


def test_the_registry_names_libraries_that_have_an_extra() -> None:
    for name in names():
        assert make(name).accept(None) is None
