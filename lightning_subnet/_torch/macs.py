# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_subnet._torch.contexts import evaluating, plain_attention
from lightning_subnet._torch.inputs import arguments
from lightning_subnet.errors import MeasurementError


def count_macs(module: nn.Module, example_input: Any) -> int:
    """Return the multiply-accumulates of one forward pass.

    Matrix products, convolutions and attention count, as in `torch.utils.flop_counter` (FLOPs = 2
    MACs); biases, normalisation and activations do not.

    Args:
        module: The network, with the subnet to be counted in force; run in eval mode.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        MeasurementError: The network does not take the input, or nothing was counted.

    Example:
        >>> count_macs(nn.Linear(10, 5), torch.zeros(1, 10))
        50
    """
    inputs, named = arguments(module, example_input)
    try:
        # The counter sees nothing inside fused attention on a CPU; its plain form is counted.
        with (
            plain_attention(),
            evaluating(module),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            module(*inputs, **named)
    except Exception as error:
        shapes = [
            tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            for x in (*inputs, *named.values())
        ]
        msg = (
            f"{type(module).__name__} failed on an input of {shapes} while its MACs were "
            f"counted: {error}. Set example_input_array to an input that forward() takes."
        )
        raise MeasurementError(msg) from error
    macs = int(counter.get_total_flops()) // 2
    if macs == 0:
        msg = (
            f"No multiplication was counted in {type(module).__name__}: "
            "its operators are unknown to the counter."
        )
        raise MeasurementError(msg)
    return macs
