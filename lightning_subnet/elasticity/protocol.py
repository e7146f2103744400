# SPDX-License-Identifier: Apache-2.0
"""The protocol of a super-network: it names its space and puts a subnet in force."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lightning_subnet.errors import SearchError
from lightning_subnet.space import SearchSpace
from lightning_subnet.subnet import Subnet


@runtime_checkable
class Elastic(Protocol):
    """Anything with these two methods can be searched."""

    def search_space(self) -> SearchSpace:
        """Return what may vary."""

    def activate(self, subnet: Subnet) -> None:
        """Put a subnet in force for all forward passes that follow."""


class SubnetMixin(ABC):
    """Makes a module a super-network: implement `search_space` and `activate`.

    Example:
        >>> import torch
        >>> from lightning_subnet import SearchSpace, SubnetMixin
        >>> class Net(SubnetMixin, torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer, self.width = torch.nn.Linear(4, 8), 8
        ...     def search_space(self):
        ...         return SearchSpace(width=[2, 4, 8])
        ...     def activate(self, subnet):
        ...         self.width = subnet["width"]
        ...     def forward(self, x):
        ...         return torch.nn.functional.linear(x, self.layer.weight[: self.width])
        >>> net = Net()
        >>> net.activate(net.search_space().smallest)
        >>> net(torch.zeros(1, 4)).shape, net.active_subnet
        (torch.Size([1, 2]), Subnet(width=2))
    """

    _active_subnet: Subnet | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap `activate`, so that what is in force can be asked and restored."""
        super().__init_subclass__(**kwargs)
        if "activate" in cls.__dict__:
            activate = cls.__dict__["activate"]

            @functools.wraps(activate)
            def recorded(self: SubnetMixin, subnet: Subnet) -> None:
                activate(self, subnet)
                self._active_subnet = subnet

            cls.activate = recorded  # type: ignore[method-assign] # the point of the wrapper

    @abstractmethod
    def search_space(self) -> SearchSpace:
        """Return what may vary; equal at every call."""

    @abstractmethod
    def activate(self, subnet: Subnet) -> None:
        """Put a subnet in force for all forward passes that follow, without copying weights."""

    @property
    def active_subnet(self) -> Subnet | None:
        """The subnet in force; None before the first `activate`."""
        return self._active_subnet


@contextmanager
def activated(module: nn.Module, subnet: Subnet) -> Iterator[None]:
    """Put a subnet in force inside a `with` block, and what was in force before it afterwards.

    Args:
        module: A super-network, or a module with one elastic descendant.
        subnet: What to put in force. If nothing was before, the largest is afterwards.
    """
    part = elastic_part(module)
    before = getattr(part, "active_subnet", None)
    try:
        part.activate(subnet)
        yield
    finally:
        part.activate(part.search_space().largest if before is None else before)


def elastic_part(module: nn.Module) -> Elastic:
    """Return the module itself if it is elastic, else its only elastic descendant.

    Raises:
        SearchError: There is none, or more than one.
    """
    if isinstance(module, Elastic):
        return module
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, Elastic)]
    outermost = [
        (name, child)
        for name, child in found
        if not any(name.startswith(f"{n}.") for n, _ in found)
    ]
    if len(outermost) == 1:
        return outermost[0][1]
    names = ", ".join(name for name, _ in outermost)
    msg = (
        f"{type(module).__name__} has "
        f"{f'{len(outermost)} elastic parts ({names})' if names else 'no elastic part'}. "
        "Derive it from SubnetMixin and implement search_space() and activate(subnet), "
        "or give it exactly one child that does."
    )
    raise SearchError(msg)
