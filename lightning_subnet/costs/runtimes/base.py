# SPDX-License-Identifier: Apache-2.0
"""Runtimes: what runs a network while it is timed, as it will run where it is shipped.

Each makes a `Runner`: one forward pass on inputs that are in place already, so that copies are not
timed. What it runs with is described in words, for the fingerprint of a measure.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._torch.inputs import as_weight
from lightning_subnet.errors import ExportError, ObjectiveError
from lightning_subnet.export.call import Call
from lightning_subnet.export.formats.base import quiet
from lightning_subnet.export.formats.onnx import import_onnx, import_onnxruntime, to_onnx
from lightning_subnet.export.formats.openvino import import_openvino, openvino_core, to_openvino

_TRUE = {
    "64-true": torch.float64,
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_SHORT = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's
_PRECISIONS = (*_TRUE, *_MIXED)
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Conditions:
    """What a network runs on.

    Args:
        device: Where it runs.
        threads: Threads within an operator.
        precision: One of Lightning's, in full.
        cuda_graph: Replay a CUDA graph.
    """

    device: torch.device
    threads: int
    precision: str
    cuda_graph: bool = False


@dataclass(frozen=True)
class Runner:
    """One forward pass.

    Args:
        run: Does it.
        again: Returns the same elsewhere in memory, where that takes little time.
        release: Gives back what only this network holds.
        seconds: What it took to make it.
    """

    run: Callable[[], Any]
    again: Callable[[], Runner] | None = None
    release: Callable[[], Any] = lambda: None
    seconds: float = 0.0


@dataclass(frozen=True)
class Runtime:
    """A way to run networks.

    Args:
        make: Turns a network and its positional arguments into a `Runner`; both are on the device
            and in the precision of the weights already.
        describe: Names what it runs with: versions and options.
        precisions: Those that it computes in.
        devices: Those that it runs on.
        libraries: Functions that import the optional libraries that it needs.
        graphs: Whether it can replay CUDA graphs.
    """

    make: Callable[[nn.Module, tuple[Any, ...], Conditions], Runner]
    describe: Callable[[Conditions], str]
    precisions: tuple[str, ...] = _PRECISIONS
    devices: tuple[str, ...] = ()
    libraries: tuple[Callable[[], Any], ...] = ()
    graphs: bool = False

    def prepare(
        self,
        net: nn.Module,
        inputs: tuple[Any, ...],
        conditions: Conditions,
        *,
        cast: bool = True,
    ) -> Runner:
        """Return what runs a network, which is put on the device.

        Args:
            net: In eval mode; it is changed.
            inputs: Positional arguments of its forward pass.
            conditions: What it runs on.
            cast: Put its weights in the precision.
        """
        dtype = _weights(conditions.precision) if cast else None
        net = net.to(device=conditions.device, dtype=dtype)
        weights = (p for p in net.parameters() if p.is_floating_point())
        like = next(weights, torch.empty(0, device=conditions.device, dtype=dtype))
        return self.make(net, as_weight(like, inputs), conditions)


def runtime(
    name: str, precision: str | None, *, cuda_graph: bool = False
) -> tuple[Runtime, str | None]:
    """Return a runtime by name, and a precision in full.

    Args:
        name: `"eager"`, `"compile"`, `"onnxruntime"` or `"openvino"`.
        precision: Lightning's: `"32-true"`, `"bf16-true"`, `"16-true"`, `"bf16-mixed"`,
            `"16-mixed"`, or its short forms `"32"`, `"bf16"` and `"16"`.
        cuda_graph: Whether a CUDA graph is to be replayed.

    Raises:
        ObjectiveError: There is no such runtime or precision, the runtime does not compute in it,
            or it needs a library that is not installed.

    Example:
        >>> runtime("eager", "bf16")[1]
        'bf16-mixed'
    """
    if name not in RUNTIMES:
        hint = did_you_mean(name, RUNTIMES)
        msg = f"runtime={name!r} is unknown.{hint} It is one of: {listed(RUNTIMES)}."
        raise ObjectiveError(msg)
    found = RUNTIMES[name]
    full = None if precision is None else _SHORT.get(str(precision), str(precision))
    if full is not None and full not in _PRECISIONS:
        msg = (
            f"precision={precision!r} is unknown.{did_you_mean(precision, _PRECISIONS)} "
            f"It is one of: {listed(_PRECISIONS)}."
        )
        raise ObjectiveError(msg)
    _check_precision(name, full)
    if cuda_graph and not found.graphs:
        msg = f"cuda_graph=True: runtime={name!r} replays no graph. Use 'eager' or 'compile'."
        raise ObjectiveError(msg)
    for import_library in found.libraries:
        try:
            import_library()
        except ExportError as error:
            msg = f"runtime={name!r} cannot be used: {error}"
            raise ObjectiveError(msg) from error
    return found, full


def on_device(
    name: str, precision: str | None, device: torch.device, dtype: torch.dtype | None
) -> str:
    """Return the precision that a runtime computes in on a device.

    Args:
        name: Of the runtime.
        precision: In full; None: that of the weights.
        device: Where it runs.
        dtype: Of the weights; None if there are none.

    Raises:
        ObjectiveError: The runtime does not run on this device, or does not compute in it there.
    """
    found = RUNTIMES[name]
    if found.devices and device.type not in found.devices:
        msg = f"runtime={name!r} does not run on {device.type!r} here. Write device='cpu'."
        raise ObjectiveError(msg)
    if precision is None:
        precision = next((k for k, v in _TRUE.items() if v is dtype), str(dtype or "32-true"))
        if found.precisions != _PRECISIONS:
            _check_precision(name, precision, "the network is in ")
    if name == "onnxruntime":
        _provider(device)
    if name == "openvino" and precision in _MIXED:
        able = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if {"bf16-mixed": "BF16", "16-mixed": "FP16"}[precision] not in able:
            msg = f"precision={precision!r}: OpenVINO has only {listed(able)} on this processor."
            raise ObjectiveError(msg)
    return precision


def _check_precision(name: str, precision: str | None, start: str = "precision=") -> None:
    able = RUNTIMES[name].precisions
    if precision is None or precision in able:
        return
    msg = (
        f"{start}{precision!r}, in which runtime={name!r} does not compute. "
        f"Set precision= to one of: {listed(able)}."
    )
    raise ObjectiveError(msg)


def _weights(precision: str) -> torch.dtype:
    return _TRUE.get(precision, torch.float32)


def _eager(net: nn.Module, inputs: tuple[Any, ...], conditions: Conditions) -> Runner:
    run = _cast(net, inputs, conditions)
    if conditions.cuda_graph:
        return _graphed(run, conditions.device)
    return Runner(run, again=lambda: _eager(copy.deepcopy(net), inputs, conditions))


def _cast(
    call: Callable[..., Any], inputs: tuple[Any, ...], conditions: Conditions
) -> Callable[[], Any]:
    """Return a forward pass, under autocast where a Trainer would enter it."""
    dtype = _MIXED.get(conditions.precision)

    def mixed() -> Any:
        with torch.autocast(conditions.device.type, dtype):
            return call(*inputs)

    return functools.partial(call, *inputs) if dtype is None else mixed


def _graphed(run: Callable[[], Any], device: torch.device) -> Runner:
    """Return the replay of what a forward pass launches, captured once."""
    cuda: Any = torch.cuda
    with cuda.device(device):
        aside = cuda.Stream()
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):  # the first passes choose kernels and allocate
            for _ in range(3):
                run()
        cuda.current_stream().wait_stream(aside)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            run()
    return Runner(graph.replay, release=graph.reset)


def _compile(net: nn.Module, inputs: tuple[Any, ...], conditions: Conditions) -> Runner:
    """Return a network compiled by itself, with a cache of its own that is given back."""
    import torch._dynamo as dynamo
    import torch._inductor.config as inductor

    def forward(*args: Any) -> Any:
        return net(*args)

    # Dynamo keeps what it compiled with the code object, and stops compiling after eight variants
    # of one. All subnets share the code of their classes; so each gets an outermost one of its own.
    code = forward.__code__.replace(co_name=f"subnet_{next(_NUMBERS)}")
    own = types.FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
    mode = "reduce-overhead" if conditions.cuda_graph else None
    run = _cast(torch.compile(own, dynamic=False, mode=mode), inputs, conditions)
    reset: Any = getattr(dynamo.eval_frame, "reset_code")  # noqa: B009 - which it does not export
    limits = {
        name: 1 << 16
        for name in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit")
        if hasattr(dynamo.config, name)
    }
    threads = {"cpp.threads": conditions.threads}  # part of the key under which kernels are kept
    # In the mode in which it is timed, as another one is compiled anew.
    with quiet(), dynamo.config.patch(limits), inductor.patch(threads), torch.inference_mode():
        run()

    def release() -> None:
        reset(code)
        _trim()

    return Runner(run, release=release)


def _trim() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    What a compiler keeps lies between the weights that it frees, so the heap would grow with each.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _onnxruntime(net: nn.Module, inputs: tuple[Any, ...], conditions: Conditions) -> Runner:
    ort = import_onnxruntime()
    model = to_onnx(net, inputs, dynamic_batch=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = conditions.threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # errors are raised
    # Threads that go on spinning after a pass would take the cores from what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    given = dict(zip(*_tensors(net, inputs), strict=True))
    device = conditions.device

    def again() -> Runner:
        session = ort.InferenceSession(model, options, providers=[_provider(device)])
        return Runner(_bound(ort, session, given, device), again=again)

    return again()


def _bound(
    ort: Any, session: Any, given: dict[str, Any], device: torch.device
) -> Callable[[], Any]:
    """Return a pass of a session whose inputs and outputs stay in place."""
    index, binding = device.index or 0, session.io_binding()
    for port in session.get_inputs():
        value = ort.OrtValue.ortvalue_from_numpy(given[port.name], device.type, index)
        binding.bind_ortvalue_input(port.name, value)
    names = [port.name for port in session.get_outputs()]
    for name in names:
        binding.bind_output(name, device.type, index)
    session.run_with_iobinding(binding)
    for name, value in zip(names, binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(name, value)  # written again and again, never allocated
    return lambda: session.run_with_iobinding(binding)


def _provider(device: torch.device) -> str:
    """Return the execution provider of a device."""
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device.type]
    able = import_onnxruntime().get_available_providers()
    if name not in able:
        msg = (
            f"runtime='onnxruntime' has no {name} here, only {listed(able)}. "
            "Install onnxruntime-gpu, or write device='cpu'."
        )
        raise ObjectiveError(msg)
    return name


def _openvino(net: nn.Module, inputs: tuple[Any, ...], conditions: Conditions) -> Runner:
    openvino = import_openvino()
    model = to_openvino(net, inputs, dynamic_batch=False)
    hint = {"bf16-mixed": "bf16", "16-mixed": "f16"}.get(conditions.precision, "f32")
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": conditions.threads,
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": hint,
    }
    request = openvino_core().compile_model(model, "CPU", options).create_infer_request()
    for name, array in zip(*_tensors(net, inputs), strict=True):
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    return Runner(lambda: request.infer(share_inputs=True, share_outputs=True))


def _tensors(net: nn.Module, inputs: tuple[Any, ...]) -> tuple[tuple[str, ...], list[Any]]:
    """Return the names and arrays of the tensors among the inputs."""
    call = Call.of(net, inputs, dynamic_batch=False)
    return call.input_names, [x.cpu().numpy() for x in call.tensors]


RUNTIMES: dict[str, Runtime] = {
    "eager": Runtime(_eager, lambda c: "eager" + ", CUDA graph" * c.cuda_graph, graphs=True),
    "compile": Runtime(
        _compile, lambda c: "torch.compile" + ", reduce-overhead" * c.cuda_graph, graphs=True
    ),
    "onnxruntime": Runtime(
        _onnxruntime,
        lambda c: f"onnxruntime {import_onnxruntime().__version__}, {_provider(c.device)}",
        precisions=("64-true", "32-true", "16-true"),
        devices=("cpu", "cuda"),
        libraries=(import_onnxruntime, import_onnx),
    ),
    "openvino": Runtime(
        _openvino,
        lambda _: f"openvino {import_openvino().__version__}, latency, 1 stream",
        precisions=("32-true", "bf16-mixed", "16-mixed"),
        devices=("cpu",),
        libraries=(import_openvino, import_onnx),
    ),
}
