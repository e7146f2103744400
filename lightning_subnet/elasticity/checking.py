# SPDX-License-Identifier: Apache-2.0
"""Proof that choices are wired: changing one of them changes the network's outputs or its cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_subnet._torch.contexts import evaluating, random_state
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.elasticity.protocol import Elastic, activated, elastic_part
from lightning_subnet.errors import ElasticityError, MeasurementError
from lightning_subnet.space.choices import Value
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

_DRAWS = 200


def check_elastic(module: nn.Module, example_input: Any, *, seed: int = 0) -> None:
    """Prove that every value of every choice is another network; an error names dead choices.

    For each choice two subnets that differ in nothing else are run on the same input: they must
    give other outputs, or cost other MACs. It is also checked that a subnet gives the same outputs
    after others were in force. The subnet in force and all random states come back.

    Args:
        module: A super-network, or a module with one elastic descendant.
        example_input: A tensor, or a tuple of arguments of `forward`. Take real data or noise:
            zeros hide weights that they are multiplied with.
        seed: The seed of the subnets that are compared.

    Raises:
        ElasticityError: A choice or a value changes nothing, a subnet cannot be put in force or
            run, or its outputs depend on the subnet that was in force before.

    Example:
        >>> from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
        >>> check_elastic(ElasticMobileNetV3.tiny(), torch.randn(2, 1, 8, 8))
    """
    part = elastic_part(module)
    space = part.search_space()
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    with random_state(seed), activated(module, space.largest), evaluating(module):
        before = _outputs(module, part, space.largest, inputs)
        problems = [
            message
            for name in space.names
            for message in _check_choice(module, part, space, name, inputs, seed)
        ]
        if problems:
            raise ElasticityError("\n".join(problems[:3]))
        if not _same(before, _outputs(module, part, space.largest, inputs)):
            msg = (
                "The largest subnet gives other outputs after others were in force. "
                "activate() must set everything that a subnet depends on, each time."
            )
            raise ElasticityError(msg)


def _check_choice(
    module: nn.Module, part: Elastic, space: SearchSpace, name: str, inputs: Any, seed: int
) -> list[str]:
    """Return messages about one choice, none if it is wired."""
    family = _family(space, name, seed)
    if len(family) < 2:  # noqa: PLR2004 - a fixed choice, or one that never exists
        return []
    outputs = [_outputs(module, part, subnet, inputs) for _, subnet in family]
    equal = []
    for (one, a), (other, b) in pairwise(zip(family, outputs, strict=True)):
        if _same(a, b) and _macs(module, part, one[1], inputs) == _macs(
            module, part, other[1], inputs
        ):
            equal.append((one[0], other[0]))
    if len(equal) == len(family) - 1:
        return [
            f"Choice {name!r} is dead: all its values give the same outputs and MACs. "
            "Use it in activate() and forward()."
        ]
    return [
        f"Values {a!r} and {b!r} of {name!r} are the same network. "
        f"Say so, Choice(..., same=[({a!r}, {b!r})]), or wire them."
        for a, b in equal
    ]


def _family(space: SearchSpace, name: str, seed: int) -> list[tuple[Value, Subnet]]:
    """Return subnets that differ in one choice alone, by its distinct values."""
    j = space.names.index(name)
    X = space.indices([space.largest])
    if not space.active(X)[0, j]:
        draws = space.sample_indices(min(_DRAWS, space.size), np.random.default_rng(seed))
        X = draws[space.active(draws)[:, j]][:1]
    if not len(X):
        return []
    family: dict[Subnet, Value] = {}
    for i, value in enumerate(space.choices[name].values):
        changed = X.copy()
        changed[0, j] = i
        family.setdefault(space.from_indices(changed)[0], value)
    return [(value, subnet) for subnet, value in family.items()]


def _outputs(module: nn.Module, part: Elastic, subnet: Subnet, inputs: Any) -> list[Any]:
    try:
        part.activate(subnet)
        with torch.no_grad():
            return list(tree_leaves(module(*inputs)))
    except Exception as error:
        msg = (
            f"{subnet} cannot be put in force or run: {type(error).__name__}: {error}. "
            "Every subnet of the space must run: mend activate(), or exclude it by when=."
        )
        raise ElasticityError(msg) from error


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def _macs(module: nn.Module, part: Elastic, subnet: Subnet, inputs: Any) -> int:
    part.activate(subnet)
    try:
        return count_macs(module, inputs)
    except MeasurementError:
        return 0  # nothing in it is counted, so outputs alone decide
