# SPDX-License-Identifier: Apache-2.0
"""The protocol of a super-network: it names its space and puts a subnet in force."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from lightning_subnet._torch.names import class_name
from lightning_subnet.errors import SearchError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

_Net = TypeVar("_Net", bound=nn.Module)


@runtime_checkable
class Elastic(Protocol):
    """Anything with these two methods can be searched."""

    def search_space(self) -> SearchSpace:
        """Return the space of all subnets."""

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
        """Wrap `activate`, so that the subnet in force can be asked for and restored."""
        super().__init_subclass__(**kwargs)
        if "activate" in cls.__dict__:
            activate = cls.__dict__["activate"]

            @functools.wraps(activate)
            def wrapper(self: SubnetMixin, subnet: Subnet) -> None:
                activate(self, subnet)
                self._active_subnet = subnet

            cls.activate = wrapper  # type: ignore[method-assign] # the point of the wrapper

    @abstractmethod
    def search_space(self) -> SearchSpace:
        """Return the space of all subnets, an equal one at every call."""

    @abstractmethod
    def activate(self, subnet: Subnet) -> None:
        """Put a subnet in force for all forward passes that follow, without copying weights."""

    @property
    def active_subnet(self) -> Subnet | None:
        """The subnet in force; None before the first `activate`."""
        return self._active_subnet


@contextmanager
def activated(module: nn.Module, subnet: Subnet) -> Iterator[None]:
    """Put a subnet in force inside a `with` block, and afterwards the one that was before it.

    Args:
        module: A super-network, or a module with one elastic descendant.
        subnet: The subnet to put in force. If none was before, the largest is afterwards.

    Example:
        >>> import torch
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny()
        >>> with activated(net, net.search_space().smallest):
        ...     logits = net(torch.zeros(1, 1, 8, 8))
        >>> net.active_subnet == net.search_space().largest
        True
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
    parts = [(name, child) for name, child in module.named_modules() if isinstance(child, Elastic)]
    outermost = [
        (name, child)
        for name, child in parts
        if not any(name.startswith(f"{n}.") for n, _ in parts)
    ]
    if len(outermost) == 1:
        return outermost[0][1]
    names = ", ".join(name for name, _ in outermost)
    msg = (
        f"{class_name(module)} has "
        f"{f'{len(outermost)} elastic parts ({names})' if names else 'no elastic part'}. "
        "Derive it from SubnetMixin and implement search_space() and activate(subnet), "
        "or give it exactly one child that does."
    )
    raise SearchError(msg)


class _Attached:
    """The protocol for a network whose class does not have it; lives on the instance."""

    def __init__(
        self,
        net: nn.Module,
        space: SearchSpace,
        activate: Callable[[Any, Subnet], object],
        extract: Callable[[Any, Subnet], nn.Module] | None,
    ) -> None:
        self._net, self._space, self._activate, self._extract = net, space, activate, extract

    def search_space(self) -> SearchSpace:
        return self._space

    def activate(self, subnet: Subnet) -> None:
        self._activate(self._net, subnet)
        self._net.active_subnet = subnet  # type: ignore[assignment] # no parameter

    def extract(self, subnet: Subnet) -> nn.Module:
        assert self._extract is not None
        return self._extract(self._net, subnet)


def elastic(
    net: _Net,
    *,
    space: SearchSpace,
    activate: Callable[[_Net, Subnet], object],
    extract: Callable[[_Net, Subnet], nn.Module] | None = None,
) -> _Net:
    """Attach the protocol to someone else's super-network; its class and state dict stay as is.

    Args:
        net: A network or a LightningModule.
        space: What may vary.
        activate: Called as `activate(net, subnet)`; puts the subnet in force.
        extract: Called as `extract(net, subnet)`; returns the subnet as a network of its own. It
            may put subnets in force, and leaves the one that was. Without it, extraction gives a
            frozen copy, which keeps all weights.

    Returns:
        The same object, with `search_space()`, `activate(subnet)` and `active_subnet`.

    Raises:
        SearchError: Not a module, not a space, or nothing to call.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net = elastic(net, space=SearchSpace(scale=[1, 2]),
        ...               activate=lambda net, subnet: setattr(net, "scale", subnet["scale"]))
        >>> net.activate(net.search_space().largest)
        >>> net.scale, net.active_subnet, type(net).__name__
        (2, Subnet(scale=2), 'Linear')
    """
    if not isinstance(net, nn.Module):
        msg = (
            f"elastic() got an object of type {class_name(net)}, which is not an nn.Module. "
            "Pass the network."
        )
        raise SearchError(msg)
    if not isinstance(space, SearchSpace):
        msg = f"space={space!r:.60} is not a SearchSpace. Write space=SearchSpace({{...}})."
        raise SearchError(msg)
    for name, function in (("activate", activate), ("extract", extract)):
        if not callable(function) and (function is not None or name == "activate"):
            msg = f"{name}={function!r:.60} cannot be called. Pass a function of (net, subnet)."
            raise SearchError(msg)
    detach(net)  # from an earlier call
    attached = _Attached(net, space, activate, extract)
    net.search_space = attached.search_space  # type: ignore[assignment] # on the instance
    net.activate = attached.activate  # type: ignore[assignment] # on the instance
    net.active_subnet = None  # type: ignore[assignment] # on the instance
    if extract is not None:
        net.extract = attached.extract  # type: ignore[assignment] # on the instance
    return net


def detach(net: nn.Module) -> None:
    """Remove the protocol that `elastic` attached; a network without it is left as it is."""
    attributes = vars(net)
    if not isinstance(getattr(attributes.get("activate"), "__self__", None), _Attached):
        return
    for name in ("search_space", "activate", "active_subnet", "extract"):
        attributes.pop(name, None)
