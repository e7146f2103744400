# SPDX-License-Identifier: Apache-2.0
"""Parity: whether a subnet of its own gives the outputs of the super-network it was cut from."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_subnet._messages import listed
from lightning_subnet._torch.contexts import (
    default_type,
    default_types,
    evaluating,
    random_state,
    same_buffers,
)
from lightning_subnet._torch.inputs import as_weight
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.outputs import (
    Difference,
    default_tolerance,
    difference,
    named_outputs,
)
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.errors import ParityError
from lightning_subnet.space.subnet import Subnet

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward pass."""


def check_parity(
    module: nn.Module,
    subnet: Subnet,
    plain: nn.Module,
    calls: Sequence[Call],
    *,
    tolerance: float | None = None,
    what: str = "extraction",
    hint: str = "",
) -> Difference:
    """Return how far the outputs of a subnet of its own are from those of the super-network.

    A super-network that does not run in eval mode is compared in training mode, with the random
    state the same for both.

    Args:
        module: A super-network, or a module with one elastic descendant, which is then compared.
        subnet: The subnet; it is put in force, and the one before comes back.
        plain: The subnet as a network of its own.
        calls: Arguments of the super-network's forward pass, as many as are to be compared.
        tolerance: Largest allowed difference, as a share of the largest output; None: what
            rounding explains, by the type of weights and outputs.
        what: What `plain` is, for a message.
        hint: Where to look if it differs: a sentence.

    Raises:
        ParityError: The difference is larger, `plain` does not take the inputs, or the outputs of
            the super-network differ from one run to the next.

    Example:
        >>> from lightning_subnet import extract
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny()
        >>> subnet = net.search_space().smallest
        >>> call = ((torch.randn(2, 1, 8, 8),), {})
        >>> check_parity(net, subnet, extract(net, subnet), [call]).relative < 1e-4
        True
    """
    part: Any = elastic_part(module)
    worst, comparison = Difference(), _Comparison(part, subnet, plain, what)
    with activated(part, subnet):
        for call in calls:
            expected, outputs = comparison.outputs(call)
            gap = difference(expected, outputs)
            weights = [*part.parameters(), *plain.parameters(), *named_outputs(expected).values()]
            allowed = default_tolerance(weights) if tolerance is None else tolerance
            if not gap.relative <= allowed:
                comparison.check_repeatable(call, allowed)
                where = hint or _where(part)
                msg = (
                    f"The {what} of {subnet!r:.200} is another network than the super-network "
                    f"{class_name(part)} with this subnet in force: {gap} (allowed "
                    f"{allowed:.2g}). {where}"
                )
                raise ParityError(msg)
            worst = gap if gap.relative > worst.relative else worst
    return worst


def _where(part: Any) -> str:
    """Return where to look if an extraction differs."""
    name, hooks = class_name(part), _hooked(part)
    of_package = type(part).__module__.partition(".")[0] == __name__.partition(".")[0]
    if hooks and (of_package or not callable(getattr(part, "extract", None))):
        return (
            f"Forward hooks act in it that its extraction leaves out: those on {listed(hooks, 3)}. "
            "Remove them before a search, or put what they do into the forward() of a module."
        )
    if of_package:
        return (
            "Its extraction has the weights of its layers, their eps, momentum and the like: look "
            "for what else was changed in them by hand (methods, other layers, attributes)."
        )
    if callable(getattr(part, "extract", None)):
        hooked = f" (there are some on {listed(hooks, 3)})" if hooks else ""
        return (
            f"Look at {name}.extract(): it must give the network of the subnet that it gets, with "
            f"all that acts on the outputs, hooks too{hooked}."
        )
    return (
        f"Look at {name}.activate(): it must set everything that a subnet depends on in the "
        "network that it is called on, each time."
    )


def _hooked(part: nn.Module) -> list[str]:
    """Return the names of layers with forward hooks of others than torch."""
    return [
        name or class_name(part)
        for name, child in part.named_modules()
        if any(
            getattr(hook, "__module__", type(hook).__module__).partition(".")[0] != "torch"
            for hook in (*child._forward_pre_hooks.values(), *child._forward_hooks.values())
        )
    ]


class _Comparison:
    """Runs of a super-network and of a subnet of its own on the same inputs.

    Args:
        part: The super-network, with the subnet in force.
        subnet: The subnet, for a message.
        plain: The subnet as a network of its own.
        what: What that is, for a message.
    """

    def __init__(self, part: nn.Module, subnet: Subnet, plain: nn.Module, what: str) -> None:
        self._part, self._subnet, self._plain, self._what = part, subnet, plain, what
        self._training = False

    def outputs(self, call: Call) -> tuple[Any, Any]:
        """Return the outputs of both."""
        if not self._training:
            try:
                expected = self._run(self._part, call)
            except Exception:
                self._training = True  # it may run in training mode alone
        if self._training:
            expected = self._run(self._part, call)
        try:
            return expected, self._run(self._plain, call)
        except Exception as error:
            msg = (
                f"The {self._what} of {self._subnet!r:.200} does not run on what the super-network "
                f"{class_name(self._part)} takes: {type(error).__name__}: {error!s:.200}. "
                f"{_where(self._part)}"
            )
            raise ParityError(msg) from error

    def check_repeatable(self, call: Call, tolerance: float) -> None:
        """Raise if the super-network itself gives other outputs in another run."""
        gap = difference(self._run(self._part, call, seed=0), self._run(self._part, call, seed=1))
        if not gap.relative <= tolerance:
            msg = (
                f"{class_name(self._part)} gives other outputs for the same input from one run "
                f"to the next: {gap}. A network that draws in eval mode cannot be compared, nor "
                "its scores: make it deterministic there."
            )
            raise ParityError(msg)

    def _run(self, net: nn.Module, call: Call, seed: int = 0) -> Any:
        return outputs_of(net, call, seed=seed, training=self._training)


def outputs_of(net: nn.Module, call: Call, *, seed: int = 0, training: bool = False) -> Any:
    """Return the outputs of a network, which is left as it was.

    Args:
        net: The network.
        call: Arguments of its forward pass.
        seed: Of what it draws.
        training: Whether it runs in training mode, and not in eval mode.
    """
    args, kwargs = ready(net, call)
    with ExitStack() as stack:
        stack.enter_context(evaluating(net))
        stack.enter_context(random_state(seed))
        stack.enter_context(torch.no_grad())
        # As under a Trainer of precision="bf16-true", where tensors are made in that type.
        stack.enter_context(default_type(default_types(net)[-1]))
        if training:
            stack.enter_context(same_buffers(net))
            net.train()
        return net(*args, **kwargs)


def example_of(part: Any, call: Call) -> Any:
    """Return the arguments of a call as an example input: a tuple, or a dict if some have names."""
    args, kwargs = call
    if not kwargs:
        return tuple(args)
    return dict(inspect.signature(part.forward).bind(*args, **kwargs).arguments)


def ready(net: nn.Module, call: Call) -> Call:
    """Return copies of arguments on the device and in the precision of a network's weights."""
    copies = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, call)
    weight = next((p for p in net.parameters() if p.is_floating_point()), None)
    args, kwargs = copies if weight is None else as_weight(weight, copies)
    return args, kwargs
