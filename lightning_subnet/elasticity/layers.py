# SPDX-License-Identifier: Apache-2.0
"""Elastic layers of CNNs: a weight's first channels, its inner kernel, the first of a sequence.

A layer takes as many input channels as its input has, and gives `active_out` of its own. Weights
are used as views; nothing is copied, so gradients of the other parts are exactly zero. `plain`
returns an ordinary torch layer with a copy of the part in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet.errors import InvalidSubnetError, SpaceError

_M = TypeVar("_M", bound=nn.Module)


class ElasticLayer(nn.Module):
    """Base of elastic layers, those of your own too: each has a plain form of the part in force.

    Example:
        >>> class ElasticScale(ElasticLayer):
        ...     def __init__(self, dim):
        ...         super().__init__()
        ...         self.scale = nn.Parameter(torch.ones(dim))
        ...     def forward(self, input):
        ...         return input * self.scale[: input.shape[-1]]
        ...     def plain(self, n_in):
        ...         return fill(ElasticScale(n_in), scale=self.scale[:n_in])
        >>> layer = ElasticScale(8)
        >>> layer(torch.zeros(2, 4)).shape, layer.plain(4).scale.shape
        (torch.Size([2, 4]), torch.Size([4]))
    """

    def plain(self, n_in: int) -> nn.Module:
        """Return an ordinary torch layer with a copy of the weights in force.

        Args:
            n_in: The number of input channels that it will get.
        """
        msg = f"{type(self).__name__} does not have a plain form"
        raise TypeError(msg)  # pragma: no cover - overridden


class ElasticLinear(ElasticLayer, nn.Linear):
    """A linear layer of which the first output features run, on the first input features.

    Its bias, if it has one, runs while `active_bias` is true.

    Args:
        in_features: The most input features.
        out_features: The most output features.
        bias: Whether there is a bias.

    Example:
        >>> layer = ElasticLinear(8, 6)
        >>> layer.active_out = 2
        >>> layer(torch.zeros(1, 4)).shape, layer.plain(4)
        (torch.Size([1, 2]), Linear(in_features=4, out_features=2, bias=True))
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.active_out = out_features
        self.active_bias = bias

    def active_weights(self, n_in: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight (active_out, n_in) and the bias (active_out,) in force, as views."""
        out = at_most("active_out", self.active_out, self.out_features)
        n_in = at_most("input features", n_in, self.in_features)
        biased = self.bias is not None and self.active_bias
        return self.weight[:out, :n_in], self.bias[:out] if biased else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the part in force; (..., n_in) to (..., active_out)."""
        return F.linear(input, *self.active_weights(input.shape[-1]))

    def plain(self, n_in: int) -> nn.Linear:
        """Return an `nn.Linear` with a copy of the part in force."""
        weight, bias = self.active_weights(n_in)
        layer = nn.Linear(n_in, len(weight), bias=bias is not None, device="meta")
        return fill(layer, weight=weight, bias=bias)


class ElasticConv2d(ElasticLayer, nn.Conv2d):
    """A convolution with elastic channels and kernel size, padded so that stride 1 keeps the size.

    A smaller kernel is the centre of the next larger one, multiplied by a learned matrix that all
    filters share (it starts as the identity). With `groups`, whole groups are the unit: as many of
    the first groups run as the input has channels for, so a depthwise layer follows its input.

    Args:
        in_channels: The most input channels.
        out_channels: The most output channels.
        kernel_size: The kernel size, or the sizes it may take, odd numbers.
        stride: The stride.
        groups: Groups of the full layer; `in_channels` for a depthwise one.
        bias: Whether there is a bias.
        kernel_transform: Whether smaller kernels have their learned matrix.

    Raises:
        SpaceError: A kernel size that is even or repeated.

    References:
        Cai et al., Once-for-All, ICLR 2020, section 3.3 and figure 3 (kernel transformation).

    Example:
        >>> layer = ElasticConv2d(8, 8, [3, 5, 7], groups=8)
        >>> layer.active_kernel = 3
        >>> layer(torch.zeros(1, 4, 9, 9)).shape
        torch.Size([1, 4, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        kernel_transform: bool = True,
    ) -> None:
        sizes = sorted([kernel_size] if isinstance(kernel_size, int) else kernel_size)
        if len(set(sizes)) < len(sizes) or not sizes or any(k % 2 == 0 or k < 1 for k in sizes):
            msg = f"kernel_size={kernel_size!r} must be odd sizes, each once, such as [3, 5, 7]."
            raise SpaceError(msg)
        super().__init__(
            in_channels, out_channels, sizes[-1], stride, sizes[-1] // 2, groups=groups, bias=bias
        )
        self.kernel_sizes = tuple(sizes)
        self.transforms = nn.ParameterDict(
            {
                f"{large}to{small}": nn.Parameter(torch.eye(small**2))
                for small, large in pairwise(sizes)
                if kernel_transform
            }
        )
        self.active_kernel = sizes[-1]
        self.active_out = out_channels

    @property
    def unit_in(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    def _kernel(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the filters in the active kernel size, (out, in per group, k, k)."""
        if self.active_kernel not in self.kernel_sizes:
            msg = f"active_kernel={self.active_kernel} is not one of {list(self.kernel_sizes)}."
            raise InvalidSubnetError(msg)
        below = self.kernel_sizes[: self.kernel_sizes.index(weight.shape[-1])]
        for size in reversed(below):
            if weight.shape[-1] == self.active_kernel:
                break
            large = weight.shape[-1]
            at = (large - size) // 2
            weight = weight[..., at : at + size, at : at + size]
            if f"{large}to{size}" in self.transforms:
                matrix = self.transforms[f"{large}to{size}"]
                weight = torch.unflatten(F.linear(weight.flatten(-2), matrix), -1, (size, size))
        return weight

    def active_weights(self, n_in: int) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Return weight, bias and groups in force for so many input channels.

        The weight (out, n_in / groups, kernel, kernel) is a view, unless its kernel is transformed.
        """
        at_most("input channels", n_in, self.in_channels)
        if self.groups == 1:
            out, per_group, groups = self.active_out, n_in, 1
        else:
            groups = n_in // self.unit_in
            if groups * self.unit_in != n_in:
                msg = f"{n_in} input channels are not whole groups of {self.unit_in}."
                raise InvalidSubnetError(msg)
            out, per_group = groups * (self.out_channels // self.groups), self.unit_in
        at_most("active_out", out, self.out_channels)
        weight = self._kernel(self.weight[:out, :per_group])
        return weight, None if self.bias is None else self.bias[:out], groups

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the part in force; (n, n_in, h, w) to (n, out, h', w')."""
        weight, bias, groups = self.active_weights(input.shape[1])
        padding = self.active_kernel // 2
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, groups)

    def plain(self, n_in: int) -> nn.Conv2d:
        """Return an `nn.Conv2d` with a copy of the part in force."""
        with torch.no_grad():
            weight, bias, groups = self.active_weights(n_in)
        layer = nn.Conv2d(
            n_in,
            len(weight),
            self.active_kernel,
            self.stride,  # type: ignore[arg-type] # a pair, as nn.Conv2d keeps it
            self.active_kernel // 2,
            groups=groups,
            bias=bias is not None,
            device="meta",
        )
        layer = fill(layer, weight=weight, bias=bias)
        layer.weight.requires_grad_(self.weight.requires_grad)  # a transformed kernel has no flag
        return layer


class ElasticBatchNorm2d(ElasticLayer, nn.BatchNorm2d):
    """Batch normalisation of the first channels, as many as the input has.

    Running statistics are kept for the channels in force; those of other subnets overwrite them, so
    recalibrate before a subnet is measured (`recalibrate`).

    Args:
        num_features: The most channels.
        eps: Added to the variance.
        momentum: As in `nn.BatchNorm2d`; None averages all batches.

    Example:
        >>> ElasticBatchNorm2d(8)(torch.randn(2, 4, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise; (n, c, h, w) to the same."""
        c = at_most("input channels", input.shape[1], self.num_features)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        # Frozen by this flag, as in nn.BatchNorm2d: its batch normalises, its statistics stay.
        moves = self.training and self.track_running_stats
        uses = moves or not self.training
        factor = 0.0
        if moves:
            self.num_batches_tracked.add_(1)
            factor = (
                self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
            )
        return F.batch_norm(
            input,
            self.running_mean[:c] if uses else None,
            self.running_var[:c] if uses else None,
            self.weight[:c],
            self.bias[:c],
            self.training,
            factor,
            self.eps,
        )

    def plain(self, n_in: int) -> nn.BatchNorm2d:
        """Return an `nn.BatchNorm2d` with a copy of the part in force."""
        at_most("input channels", n_in, self.num_features)
        layer = nn.BatchNorm2d(n_in, eps=self.eps, momentum=self.momentum, device="meta")
        layer.track_running_stats = self.track_running_stats  # False where it is frozen so
        assert self.running_mean is not None
        assert self.running_var is not None
        return fill(
            layer,
            weight=self.weight[:n_in],
            bias=self.bias[:n_in],
            running_mean=self.running_mean[:n_in],
            running_var=self.running_var[:n_in],
            num_batches_tracked=self.num_batches_tracked,
        )


class ElasticSequential(ElasticLayer, nn.Sequential):
    """A sequence of which the first `active_depth` modules run.

    Example:
        >>> stage = ElasticSequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
        >>> stage.active_depth = 2
        >>> len(stage.active)
        2
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.active_depth = len(self)

    @property
    def active(self) -> list[nn.Module]:
        """The modules that run."""
        return list(self)[: at_most("active_depth", self.active_depth, len(self))]

    def forward(self, input: Any) -> Any:
        """Apply the first modules."""
        for module in self.active:
            input = module(input)
        return input


def at_most(name: str, value: int, limit: int) -> int:
    """Return a size from 1 to a limit, or raise `InvalidSubnetError`.

    Args:
        name: What it is the size of, for the message.
        value: The size.
        limit: The size that the layer was built with.
    """
    if not 1 <= value <= limit:
        msg = f"{name}={value} is not in 1..{limit}, what this layer was built with."
        raise InvalidSubnetError(msg)
    return value


def fill(layer: _M, **tensors: torch.Tensor | None) -> _M:
    """Return a layer with copies of tensors in it, on their device and in their type.

    Args:
        layer: The layer, which may be on the meta device.
        **tensors: By name of parameter or buffer; None where it has none. Each decides also whether
            its copy is trained.
    """
    state = {name: t.detach().clone() for name, t in tensors.items() if t is not None}
    layer.load_state_dict(state, assign=True)
    for name, parameter in layer.named_parameters():
        tensor = tensors[name]
        parameter.requires_grad_(tensor is None or tensor.requires_grad)
    return layer
