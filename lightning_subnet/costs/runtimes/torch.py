# SPDX-License-Identifier: Apache-2.0
"""Torch as it is, and compiled by `torch.compile`."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.inputs import Inputs, run_with
from lightning_subnet.costs.device import as_it_runs
from lightning_subnet.costs.runtimes.base import MIXED, Conditions, ForwardPass, Runtime
from lightning_subnet.export.formats.base import quiet

_NUMBERS = itertools.count()


class Eager(Runtime):
    """Torch as it is."""

    name = "eager"
    graphs = True

    def make(self, net: nn.Module, inputs: Inputs, conditions: Conditions) -> ForwardPass:
        """Return the call of the network itself."""
        run = as_it_runs(net, _in_precision(net, inputs, conditions))
        if conditions.cuda_graph:
            return _replay(run, conditions.device)
        return ForwardPass(run, again=lambda: self.make(copy.deepcopy(net), inputs, conditions))

    def describe(self, conditions: Conditions) -> str:
        """Return the name, and whether a CUDA graph is replayed."""
        return "eager" + ", CUDA graph" * conditions.cuda_graph


class Compile(Runtime):
    """`torch.compile` of each network by itself, with a cache of its own that is given back."""

    name = "compile"
    graphs = True

    def make(self, net: nn.Module, inputs: Inputs, conditions: Conditions) -> ForwardPass:
        """Return the call of the compiled network, which has run once."""
        import torch._dynamo as dynamo
        import torch._inductor.config as inductor

        def forward(*args: Any) -> Any:
            return net(*args)

        # Dynamo keeps what it compiled with the code object, and stops compiling after eight
        # variants of one. All subnets share the code of their classes; so each gets an outermost
        # one for itself.
        code = forward.__code__.replace(co_name=f"subnet_{next(_NUMBERS)}")
        outermost = types.FunctionType(
            code, forward.__globals__, code.co_name, None, forward.__closure__
        )
        mode = "reduce-overhead" if conditions.cuda_graph else None
        compiled = torch.compile(outermost, dynamic=False, mode=mode)
        run = as_it_runs(
            net,
            _in_precision(compiled, inputs, conditions),
            trial=_in_precision(net, inputs, conditions),
        )
        reset: Any = getattr(dynamo.eval_frame, "reset_code")  # noqa: B009 - which it does not export
        limits = {
            name: 1 << 16
            for name in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit")
            if hasattr(dynamo.config, name)
        }
        threads = {"cpp.threads": conditions.threads}  # of the key under which kernels are stored
        # In the mode in which it is timed, as another one is compiled anew.
        with quiet(), dynamo.config.patch(limits), inductor.patch(threads), torch.inference_mode():
            run()

        def release() -> None:
            reset(code)
            _trim()

        return ForwardPass(run, release=release)

    def describe(self, conditions: Conditions) -> str:
        """Return the name, and the mode in which CUDA graphs are replayed."""
        return "torch.compile" + ", reduce-overhead" * conditions.cuda_graph


def _in_precision(
    call: Callable[..., Any], inputs: Inputs, conditions: Conditions
) -> Callable[[], Any]:
    """Return a forward pass, under autocast where a Trainer would enter it."""
    dtype = MIXED.get(conditions.precision)

    def mixed() -> Any:
        with torch.autocast(conditions.device.type, dtype):
            return run_with(call, inputs)

    return functools.partial(run_with, call, inputs) if dtype is None else mixed


def _replay(run: Callable[[], Any], device: torch.device) -> ForwardPass:
    """Return the replay of the kernels that a forward pass launches, captured once."""
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
    return ForwardPass(graph.replay, release=graph.reset)


def _trim() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    What a compiler keeps lies between the weights that it frees, so the heap would grow with each.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
