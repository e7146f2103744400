# SPDX-License-Identifier: Apache-2.0
"""Sizes of what a network is given: images or tokens, from an example input of any form."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_subnet.errors import ElasticityError


def image_size(net: nn.Module, example_input: Any) -> tuple[int, tuple[int, int]]:
    """Return how many images an input of a network holds, and their height and width.

    Args:
        net: Its forward pass takes images (n, channels, height, width) first.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        ElasticityError: They have another shape.

    Example:
        >>> image_size(nn.Conv2d(3, 8, 3), {"input": torch.zeros(2, 3, 8, 16)})
        (2, (8, 16))
    """
    (shape,) = _shapes(net, example_input, 1, "Images are (n, channels, height, width)", 4)
    n, _, height, width = shape
    return n, (height, width)


def token_sizes(net: nn.Module, example_input: Any, n: int) -> list[tuple[int, int]]:
    """Return the shapes (rows, length) of the tokens that the first n parameters are given.

    Args:
        net: The network.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.
        n: How many parameters of its forward pass are tokens.

    Raises:
        ElasticityError: There are fewer tensors, or of another shape.
    """
    shapes = _shapes(net, example_input, n, "Tokens are (n, length)", 2)
    return [(rows, length) for rows, length in shapes]


def _shapes(
    net: nn.Module, example_input: Any, n: int, form: str, ndim: int
) -> list[tuple[int, ...]]:
    """Return the shapes of the first n arguments, which all have so many dimensions."""
    values = _arguments(net, example_input)[:n]
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else () for x in values]
    if [len(shape) for shape in shapes] != [ndim] * n:
        given = ", ".join(
            str(tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__ for x in values
        )
        msg = f"{form}, in {n} argument(s) of {type(net).__name__}, not {given or 'nothing'}."
        raise ElasticityError(msg)
    return shapes


def _arguments(net: nn.Module, example_input: Any) -> list[Any]:
    """Return what the parameters of a forward pass are given, in the order of its signature."""
    named = dict(example_input) if isinstance(example_input, Mapping) else {}
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        call = inspect.signature(net.forward).bind(*(() if named else inputs), **named)
    except TypeError as error:
        msg = f"forward() of {type(net).__name__} does not take the example input: {error}."
        raise ElasticityError(msg) from error
    return [*call.arguments.values()]
