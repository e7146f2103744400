# SPDX-License-Identifier: Apache-2.0
"""Exact counts of a network's work, by tracing one forward pass of the active subnet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_subnet.elasticity.protocol import Elastic
from lightning_subnet.errors import MeasurementError
from lightning_subnet.measures import Measure
from lightning_subnet.subnet import Subnet


def count_macs(module: nn.Module, example_input: Any) -> int:
    """Return the multiply-accumulates of one forward pass.

    Counted are matrix products, convolutions and attention, as `torch.utils.flop_counter` does
    (FLOPs = 2 MACs); biases, normalisation and activations are not.

    Args:
        module: The network, with the subnet to be counted in force; run in eval mode.
        example_input: A tensor, or a tuple of positional arguments.

    Raises:
        MeasurementError: The network does not take the input, or nothing was counted.

    Example:
        >>> count_macs(nn.Linear(10, 5), torch.zeros(1, 10))
        50
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    training = {child: child.training for child in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nothing inside it is counted
    try:
        module.eval()
        # The counter sees nothing inside fused attention on a CPU; its plain form is counted.
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            module(*inputs)
    except Exception as error:
        shapes = [
            tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in inputs
        ]
        msg = (
            f"{type(module).__name__} failed on an input of {shapes} while its MACs were "
            f"counted: {error}. Set example_input_array to an input that forward() takes."
        )
        raise MeasurementError(msg) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for child, flag in training.items():
            child.training = flag
    macs = int(counter.get_total_flops()) // 2
    if macs == 0:
        msg = (
            f"No multiplication was counted in {type(module).__name__}: "
            "its operators are unknown to the counter."
        )
        raise MeasurementError(msg)
    return macs


def traced_macs(module: nn.Module, elastic: Elastic, example_input: Any) -> Measure:
    """Return the exact measure `macs` of a super-network, for one sample of the example input.

    Args:
        module: The module whose forward pass is counted.
        elastic: The part of it that activates subnets.
        example_input: A tensor, or a tuple of positional arguments.
    """
    counted: dict[Subnet, int] = {}

    def macs(subnets: list[Subnet]) -> list[float]:
        for subnet in subnets:
            if subnet in counted:
                continue
            elastic.activate(subnet)
            try:
                counted[subnet] = count_macs(module, example_input)
            except MeasurementError as error:
                if not counted:
                    raise  # no subnet can be counted
                raise RuntimeError(str(error)) from error  # this one cannot
        return [float(counted[subnet]) for subnet in subnets]

    return Measure("macs", macs, unit="MAC", exact=True)
