# SPDX-License-Identifier: Apache-2.0
"""Parity before a search: a few subnets in the super-network, extracted, and as files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_subnet._messages import listed, warn
from lightning_subnet._torch.contexts import random_state
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.outputs import default_tolerance, difference, named_outputs
from lightning_subnet.elasticity.parity import Call, check_parity, outputs_of
from lightning_subnet.elasticity.protocol import activated
from lightning_subnet.errors import (
    ElasticityError,
    ExportError,
    ParityError,
    ParityWarning,
)
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.training.validation.scoring import Converted, extracted


def probes(space: SearchSpace) -> list[Subnet]:
    """Return the largest, the smallest and a random subnet, each once."""
    rng = np.random.default_rng(0)
    return list(dict.fromkeys([space.largest, space.smallest, *space.sample(1, rng)]))


def check_subnets(
    part: Any,
    space: SearchSpace,
    calls: list[Call],
    *,
    runtimes: Sequence[str] = (),
    tolerance: float | None = None,
) -> None:
    """Compare a few subnets in the super-network, extracted, and as files of some runtimes.

    Args:
        part: The super-network.
        space: Its space.
        calls: Arguments of its forward pass; the first is what files are compared on.
        runtimes: `"onnxruntime"` and `"openvino"`, as far as something is measured there.
        tolerance: See `Checks`.

    Raises:
        ParityError: One differs; the message says which.
        ElasticityError: `extract` returns something other than a network.
    """
    own = callable(getattr(part, "extract", None))
    if not calls:
        if own:
            msg = (
                f"What {type(part).__name__}.extract() gives cannot be compared with what is "
                "scored, as no validation batch goes through its forward(). Set "
                "example_input_array in the model."
            )
            warn(msg, ParityWarning)
        return
    for subnet in probes(space):
        try:
            with random_state(0):
                plain = extracted(part, subnet, calls, only=None if runtimes else "example")
        except (ElasticityError, ParityError):
            raise
        except Exception as error:
            msg = (
                f"{subnet!r:.200} cannot be extracted from {type(part).__name__}: "
                f"{type(error).__name__}: {error!s:.200}. It can be scored, and not shipped."
            )
            warn(msg, ParityWarning)
            return
        _check_apart(part, subnet, plain)
        check_parity(part, subnet, plain, calls, tolerance=tolerance)
        for runtime in runtimes:
            _check_file(plain, subnet, calls[0], runtime, tolerance)
    _tell_of_draws(part, space.largest, calls[0])


def _check_apart(part: nn.Module, subnet: Subnet, plain: nn.Module) -> None:
    """Refuse an extraction whose weights are the super-network's, as training it trains that."""
    own = {at for _, at in _memory(part)}
    if shared := [name for name, at in _memory(plain) if at in own]:
        msg = (
            f"The extraction of {subnet!r:.200} shares weights with the super-network "
            f"{class_name(part)}: {listed(shared, 3)}. What is done to one is done to the other. "
            f"Let {class_name(part)}.extract() copy them: weight.detach().clone(), or "
            "copy.deepcopy(layer)."
        )
        raise ParityError(msg)


def _memory(net: nn.Module) -> list[tuple[str, int]]:
    """Return the names of parameters and buffers, each with the address of what it lies in."""
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return [
        (name, x.untyped_storage().data_ptr())
        for name, x in tensors
        if x.layout == torch.strided and x.device.type != "meta" and x.numel()
    ]


def _tell_of_draws(part: Any, subnet: Subnet, call: Call) -> None:
    """Warn of a network that draws in eval mode: each subnet is scored with the same draws."""
    with activated(part, subnet), suppress(Exception):  # one that does not run in eval mode
        gap = difference(*(outputs_of(part, call, seed=seed) for seed in (0, 1)))
        if gap.relative > default_tolerance(named_outputs(outputs_of(part, call)).values()):
            msg = (
                f"{type(part).__name__} draws random numbers in eval mode: its outputs differ from "
                f"one random state to another, {gap}. Every subnet is scored from the same state, "
                "and what ships gives other values each time it runs. Turn off what draws there "
                "(dropout, sampling), if it is not meant."
            )
            warn(msg, ParityWarning)


def _check_file(
    plain: nn.Module, subnet: Subnet, call: Call, runtime: str, tolerance: float | None
) -> None:
    try:
        Converted(plain, call, runtime, tolerance)
    except ParityError as error:
        msg = (
            f"The extraction of {subnet!r:.200} gives the outputs of the super-network, and its "
            f"file for {runtime} does not: {error}"
        )
        raise ParityError(msg) from error
    except ExportError:
        return  # of what cannot be converted the measure itself tells


def runs(net: nn.Module, call: Call) -> Exception | None:
    """Return the error of a network on a call in eval mode; None if it runs."""
    try:
        outputs_of(net, call)
    except Exception as error:
        return error
    return None
