# SPDX-License-Identifier: Apache-2.0
"""Cheap proxies of accuracy, from the weights alone: an objective that needs no validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.contexts import default_type, random_state
from lightning_subnet._torch.outputs import named_outputs
from lightning_subnet._torch.stored import weights
from lightning_subnet.elasticity.extraction import own_or_frozen
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, eq=False)
class SynFlow:
    """The logarithm of the synaptic flow of the extracted subnet: exact, with no data.

    With all weights replaced by their absolute values, normalisation layers passed by and an input
    of ones, R is the sum of the outputs; the flow is the sum over all weights w of `|w dR/dw|`, in
    double precision. It grows by orders of magnitude from subnet to subnet, hence the logarithm,
    which keeps the order. It ranks subnets by how freely signals pass, not by what they have
    learnt, so validate the front. Of a network without `extract` all weights are in the copy, and
    those that rest have no gradient, so they add nothing.

    Args:
        input: A tensor or a tuple of positional arguments; only the shapes of floating tensors
            matter. None: `fit` takes `example_input_array` or a validation sample.
        name: The measure's name.

    Raises:
        ObjectiveError: On binding: there is no tensor in the input.
        MeasurementError: The largest subnet does not take the input, or its flow is 0 or infinite.

    Example:
        >>> from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> flow, space = SynFlow().bind(net, torch.zeros(1, 1, 8, 8)), net.search_space()
        >>> small, large = flow([space.smallest, space.largest])
        >>> small < large, flow.exact
        (True, True)

    References:
        Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic
        flow, NeurIPS 2020, section 6; as a proxy of whole networks: Abdelfattah et al., Zero-Cost
        Proxies for Lightweight NAS, ICLR 2021.
    """

    input: Any = None
    name: str = "synflow"

    def bind(self, elastic: nn.Module, example_input: Any) -> Measure:
        """Return the measure of one super-network."""
        sample = example_input if self.input is None else self.input
        inputs = sample if isinstance(sample, tuple) else (sample,)
        if not any(isinstance(x, torch.Tensor) for x in inputs):
            msg = f"SynFlow: {sample!r:.60} has no tensor. Give input= a tensor (1, ...)."
            raise ObjectiveError(msg)
        flows: dict[Subnet, float] = {}

        def flow(subnets: list[Subnet]) -> list[float]:
            for subnet in subnets:
                if subnet not in flows:
                    try:
                        with random_state():  # the plain network is initialised first
                            flows[subnet] = log_flow(own_or_frozen(elastic, subnet), inputs)
                    except Exception as error:
                        msg = f"SynFlow of {subnet!r:.100} failed: {error}"
                        # Where not even one worked, none does.
                        raise (RuntimeError if flows else MeasurementError)(msg) from error
            return [flows[subnet] for subnet in subnets]

        return Measure(self.name, flow, exact=True)


def log_flow(net: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return the logarithm of the synaptic flow of a network, which is of no use afterwards.

    Args:
        net: The network; it is changed.
        inputs: Positional arguments; floating tensors are replaced by ones, others kept.

    Raises:
        ValueError: The flow is 0 or infinite, or weights have no gradient as they are quantised.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
        >>> _ = [nn.init.constant_(p, -2.0) for p in net.parameters()]
        >>> round(math.exp(log_flow(net, (torch.zeros(1, 2),))))  # R = 2 * 3 * 4, once a layer
        48
    """
    if len(weights(net)) > len(list(net.parameters())):
        msg = "it has quantised layers, whose weights have no gradient"
        raise ValueError(msg)
    net = net.to("cpu", torch.float64).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    for module in net.modules():
        if isinstance(module, _NORMS):
            module.register_forward_hook(lambda _module, args, _output: args[0])
    ones = (
        torch.ones_like(x[:1], dtype=torch.float64, device="cpu")
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x[:1].cpu()
        if isinstance(x, torch.Tensor)
        else x
        for x in inputs
    )
    with torch.enable_grad(), default_type(torch.float64):
        out = net(*ones)
        matrices = [p for p in net.parameters() if p.ndim > 1]
        total = torch.stack([x.sum() for x in _tensors(out)]).sum()
        gradients = torch.autograd.grad(total, matrices, allow_unused=True)
    flow = sum(
        float((p.detach() * g).abs().sum())
        for p, g in zip(matrices, gradients, strict=True)
        if g is not None
    )
    if not 0 < flow < math.inf:
        msg = f"its flow is {flow}"
        raise ValueError(msg)
    return math.log(flow)


def _tensors(out: Any) -> list[torch.Tensor]:
    """Return the floating tensors of an output."""
    return [x for x in named_outputs(out).values() if x.is_floating_point()]
