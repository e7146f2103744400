# SPDX-License-Identifier: Apache-2.0
"""Outputs of a network in any structure: their tensors by name, and how far two of them differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path

TOLERANCE = 1e-4
"""The largest difference of outputs, as a share of the largest of them, that rounding explains."""
_STEPS = 8  # of rounding, of a type that is coarser than that


def named_outputs(output: Any) -> dict[str, torch.Tensor]:
    """Return the tensors in the output of a network, by name.

    Args:
        output: A tensor; or tensors in tuples, lists, dicts, dataclasses and the like.

    Example:
        >>> list(named_outputs({"logits": torch.zeros(2), "hidden": [torch.zeros(1)]}))
        ['logits', 'hidden.0']
    """
    if isinstance(output, torch.Tensor):
        return {"output": output}
    output = _fields(output)
    prefix = "" if isinstance(output, Mapping) else "output_"
    named: dict[str, torch.Tensor] = {}
    for path, leaf in tree_flatten_with_path(output, is_leaf=_is_own_mapping)[0]:
        name = prefix + ".".join(
            str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
        )
        if isinstance(leaf, torch.Tensor):
            named[name] = leaf
        elif (inner := _fields(leaf)) is not leaf:
            named |= {f"{name}.{key}": x for key, x in named_outputs(inner).items()}
    return named


def _is_own_mapping(item: Any) -> bool:
    """Return whether something is a mapping of a class of its own, as outputs of transformers are.

    They are registered with pytree without the names of their keys, if at all.
    """
    return isinstance(item, Mapping) and type(item) is not dict


def _fields(item: Any) -> Any:
    """Return mappings and the fields of dataclasses as a dict, and anything else as it is."""
    if _is_own_mapping(item):
        return dict(item)
    if isinstance(item, type) or not dataclasses.is_dataclass(item) or isinstance(item, Mapping):
        return item
    return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}


@dataclass(frozen=True)
class Difference:
    """The largest difference of two outputs.

    Args:
        absolute: The largest difference.
        relative: The same as a share of the largest absolute value that was expected.
        name: The output in which it is, as `named_outputs` calls it.
        expected: The value that was expected there.
        value: The value that came.
    """

    absolute: float = 0.0
    relative: float = 0.0
    name: str = ""
    expected: float = 0.0
    value: float = 0.0

    def __str__(self) -> str:
        if math.isinf(self.relative) and math.isnan(self.expected):
            return f"{self.name or 'the output'} has another shape"
        return (
            f"{self.expected:.6g} against {self.value:.6g} in {self.name or 'the output'}, "
            f"{self.relative:.2g} of its scale"
        )


def difference(expected: Any, output: Any) -> Difference:
    """Return the largest difference of two outputs, relative to the scale of each of their tensors.

    Equal NaNs and infinities do not differ; tensors of other shapes, and outputs of other names,
    differ infinitely.

    Args:
        expected: An output of any structure.
        output: An output of the same structure.

    Example:
        >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])).relative
        0.25
    """
    ones, others = named_outputs(expected), named_outputs(output)
    if ones.keys() != others.keys():
        name = next(iter(ones.keys() ^ others.keys()))
        return Difference(math.inf, math.inf, name, math.nan, math.nan)
    worst = Difference()
    for name, one in ones.items():
        gap = _difference(name, one, others[name])
        worst = gap if gap.relative > worst.relative else worst
    return worst


def _difference(name: str, expected: torch.Tensor, output: torch.Tensor) -> Difference:
    if expected.shape != output.shape:
        return Difference(math.inf, math.inf, name, math.nan, math.nan)
    if not expected.numel():
        return Difference(name=name)
    one, other = expected.detach().cpu().double(), output.detach().cpu().double()
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, torch.zeros_like(one), (one - other).abs()).nan_to_num(nan=math.inf)
    finite = one[one.isfinite()]
    scale = float(finite.abs().max()) if len(finite) else 0.0
    at = int(gap.argmax())
    absolute = float(gap.flatten()[at])
    return Difference(
        absolute,
        absolute / scale if scale else absolute,
        name,
        float(one.flatten()[at]),
        float(other.flatten()[at]),
    )


def default_tolerance(tensors: Iterable[torch.Tensor]) -> float:
    """Return the largest relative difference that rounding explains, by the coarsest type.

    Args:
        tensors: Weights and outputs.

    Example:
        >>> default_tolerance([torch.zeros(1)]), default_tolerance([torch.zeros(1).half()])
        (0.0001, 0.0078125)
    """
    steps = (torch.finfo(x.dtype).eps for x in tensors if x.is_floating_point())
    return max(TOLERANCE, _STEPS * max(steps, default=0.0))
