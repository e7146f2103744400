# SPDX-License-Identifier: Apache-2.0
"""Inputs of a network: one sample or a batch of it, on the device of the weights, or in words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_subnet._torch.contexts import ordinary_tensors
from lightning_subnet._torch.structures import flatten, unflatten
from lightning_subnet.errors import ObjectiveError

Inputs = tuple[Any, ...] | dict[str, Any]
"""Positional arguments, or all of them by name."""


def batched(sample: Any, n: int = 1, *, who: str = "This measure") -> Inputs:
    """Return arguments in which the first row of each tensor stands n times.

    Args:
        sample: A tensor, a tuple of positional or a dict of keyword arguments, with at least one
            tensor (n, ...).
        n: Rows of the batch.
        who: The measure that asks, for the message.

    Raises:
        ObjectiveError: There is no tensor, or one has no rows.

    Example:
        >>> batched((torch.tensor([[1.0], [2.0]]), "mean"), 3)
        (tensor([[1.],
                [1.],
                [1.]]), 'mean')
    """
    inputs: Inputs = sample if isinstance(sample, tuple) else (sample,)
    if isinstance(sample, Mapping):
        inputs = dict(sample)
    values = inputs.values() if isinstance(inputs, dict) else inputs
    tensors = [x for x in values if torch.is_tensor(x)]
    if not tensors or any(x.ndim == 0 or len(x) == 0 for x in tensors):
        msg = f"{who}: {described(inputs):.60} is not a batch. Give input= a tensor (1, ...)."
        raise ObjectiveError(msg)

    def repeated(x: Any) -> Any:
        return x.detach()[:1].repeat_interleave(n, 0) if torch.is_tensor(x) else x

    if isinstance(inputs, dict):
        return {name: repeated(x) for name, x in inputs.items()}
    return tuple(map(repeated, inputs))


def run_with(net: Any, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Any:
    """Return the output of a network for positional arguments, or for arguments by name.

    Example:
        >>> run_with(max, (1, 2)), run_with(dict, {"a": 1})
        (2, {'a': 1})
    """
    return net(**inputs) if isinstance(inputs, Mapping) else net(*inputs)


def described(inputs: Inputs) -> str:
    """Return the shapes and types of arguments, in words.

    Example:
        >>> described((torch.zeros(2, 3), "mean"))
        "(2, 3) torch.float32, 'mean'"
    """

    def words(x: Any) -> str:
        return f"{tuple(x.shape)} {x.dtype}" if torch.is_tensor(x) else repr(x)

    if isinstance(inputs, Mapping):
        return ", ".join(f"{name}: {words(x)}" for name, x in inputs.items())
    return ", ".join(map(words, inputs))


def sample_for(model: nn.Module, example_input: Any, *measures: Any) -> Any:
    """Return the sample that costs of a model are measured on, or None.

    Args:
        model: Its `example_input_array` comes last.
        example_input: The caller's, or None.
        *measures: Their `input` comes first.
    """
    inputs = (getattr(measure, "input", None) for measure in measures)
    sample = next((x for x in inputs if x is not None), example_input)
    return getattr(model, "example_input_array", None) if sample is None else sample


def arguments(module: nn.Module, example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a call, as the weights are (`as_weight`).

    Tensors of an inference mode are copied, as autograd and exporters refuse them.

    Args:
        module: The network.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.

    Example:
        >>> with torch.inference_mode():
        ...     x = torch.zeros(1, 2)
        >>> args, kwargs = arguments(nn.Linear(2, 2), x)
        >>> args[0].is_inference(), kwargs
        (False, {})
    """
    named = dict(example_input) if isinstance(example_input, Mapping) else {}
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    inputs = () if named else inputs
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    with ordinary_tensors():
        if weight is not None:
            inputs, named = as_weight(weight, inputs), as_weight(weight, named)
        return _ordinary(inputs), _ordinary(named)


def _ordinary(inputs: Any) -> Any:
    """Return inputs with copies of those tensors that were made in an inference mode."""
    leaves, spec = flatten(inputs)
    if not any(isinstance(x, torch.Tensor) and x.is_inference() for x in leaves):
        return inputs
    copies = (x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x for x in leaves)
    return unflatten(copies, spec)


def as_weight(weight: torch.Tensor, inputs: Any) -> Any:
    """Return inputs on the device of a weight and, if floating, in its precision.

    A Trainer leaves the weights where, and in the precision in which, it used them.
    """

    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(weight) if x.is_floating_point() else x.to(weight.device)

    leaves, spec = flatten(inputs)
    return unflatten(map(moved, leaves), spec)


def cloned(batch: Any, device: Any = None) -> Any:
    """Return a copy of a batch, as a step may work on it in place."""

    def clone(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to(device, copy=True)
        return copy.deepcopy(x)

    return tree_map(clone, batch)
