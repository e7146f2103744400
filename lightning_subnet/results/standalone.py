# SPDX-License-Identifier: Apache-2.0
"""A copy of a model whose super-network is one subnet for good, to train on as any other module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from lightning_subnet.elasticity.extraction import detached_copy, extract, own_or_frozen
from lightning_subnet.elasticity.parity import Call, check_parity, example_of
from lightning_subnet.elasticity.protocol import Elastic, elastic_part
from lightning_subnet.errors import SearchError, SubnetError
from lightning_subnet.export.call import brief
from lightning_subnet.space.subnet import Subnet

_Module = TypeVar("_Module")


def standalone(
    model: _Module,
    subnet: Subnet,
    extractor: Callable[..., Any] | None = None,
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
        # The super-network itself has the training step: of its class there must be a copy.
        whole = part is model
        extracted = extractor or partial(_compared, part, calls=calls)
        plain: Any = extracted(subnet, whole=whole)
        if getattr(plain, "untrainable_because", None) is not None:
            plain = extracted(subnet, whole=True)
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


def name_of_part(model: Any) -> str:
    """Return the name of the elastic part of a model; an empty string if it is the model."""
    part = elastic_part(model)
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(part)]


def _compared(part: Any, subnet: Subnet, *, calls: Sequence[Call], whole: bool) -> nn.Module:
    """Return a subnet of a super-network; outputs have been compared if there is an input.

    Args:
        part: The super-network.
        subnet: The subnet.
        calls: Arguments of its forward pass.
        whole: Whether its class is to stay, unless it has an `extract` of its own.
    """
    if whole:
        plain = own_or_frozen(part, subnet)
    else:
        plain = extract(part, subnet, example_of(part, calls[0]) if calls else None)
    check_parity(part, subnet, plain, calls)
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
