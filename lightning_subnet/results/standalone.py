# SPDX-License-Identifier: Apache-2.0
"""A copy of a model whose super-network is one subnet for good, to train on as any other module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from lightning_subnet.elasticity.extraction import detached_copy, extract
from lightning_subnet.elasticity.parity import Call, check_parity
from lightning_subnet.elasticity.protocol import Elastic, elastic_part
from lightning_subnet.errors import SearchError, SubnetError
from lightning_subnet.export.call import brief
from lightning_subnet.space.subnet import Subnet

_Module = TypeVar("_Module")


def standalone(
    model: _Module,
    subnet: Subnet,
    extractor: Callable[[Subnet], Any] | None = None,
    calls: Sequence[Call] = (),
) -> _Module:
    """Return a copy of a model with one subnet in force; see `SearchResult.to_module`.

    Args:
        model: The module that was searched.
        subnet: The subnet of the copy.
        extractor: Extracts from this model, with BatchNorm statistics; None: `extract`.
        calls: Arguments of the super-network's forward pass; without an extractor, outputs are
            compared on them.

    Raises:
        ParityError: The subnet gives other outputs than the super-network with it in force.
        SearchError: The model is not a module, cannot be copied, or cannot be replaced.
    """
    if not isinstance(model, nn.Module):
        msg = f"to_module() got {model!r:.60}, not a module. Pass the one that was searched."
        raise SearchError(msg)
    part: Any = elastic_part(model)
    try:
        plain: Any = extractor(subnet) if extractor else _compared(model, subnet, calls)
        module: Any = plain if part is model else detached_copy(model, {id(part): plain})
    except SubnetError:
        raise
    except (RuntimeError, TypeError) as error:  # of attributes that are not tensors
        msg = f"{type(model).__name__} cannot be copied: {brief(error)}"
        hint = "Keep only what copy.deepcopy takes in its attributes: no locks or open files."
        raise SearchError(f"{msg}\n{hint}") from error
    if hasattr(model, "training_step") and not hasattr(module, "training_step"):
        msg = (
            f"{type(model).__name__} is the super-network itself, and its extract() returns a "
            f"{type(module).__name__}, which has no training_step.\nMove the network into a child "
            "of the module: the child is replaced, and loss and metrics stay."
        )
        raise SearchError(msg)
    if not plain.sliced:
        plain.activate = _Fixed(plain, subnet).activate
    _as_in(model, module)
    return module  # type: ignore[no-any-return] # a copy of the model


def _compared(model: nn.Module, subnet: Subnet, calls: Sequence[Call]) -> nn.Module:
    """Return a subnet of a model, whose outputs have been compared if there is an input."""
    plain = extract(model, subnet)
    check_parity(model, subnet, plain, calls)
    return plain


class _Fixed:
    """An `activate` that keeps one subnet in force; lives on the instance."""

    def __init__(self, net: Elastic, subnet: Subnet) -> None:
        self._activate, self._subnet = net.activate, subnet

    def activate(self, _subnet: Subnet) -> None:
        self._activate(self._subnet)


def _as_in(model: nn.Module, module: nn.Module) -> None:
    """Let weights of a module learn, and children train, as those of the same name in a model."""
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in module.named_parameters():
        p.requires_grad_(learning.get(name, True))
    training = {name: child.training for name, child in model.named_modules()}
    evaluated = not any(training.values())  # left in eval mode, which is no way to train
    for name, child in module.named_modules():
        child.training = evaluated or training.get(name, model.training)
