# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, strategies as st

from lightning_subnet._torch.outputs import (
    TOLERANCE,
    default_tolerance,
    difference,
    named_outputs,
)

A, B = torch.tensor([1.0, -2.0]), torch.tensor([3.0])


@dataclass
class Output:
    logits: torch.Tensor
    hidden: Any = None
    more: list[Any] = field(default_factory=list)


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (A, ["output"]),
        ((A, B), ["output_0", "output_1"]),
        ([A, None, B], ["output_0", "output_2"]),
        ({"logits": A, "hidden": (B, B)}, ["logits", "hidden.0", "hidden.1"]),
        (OrderedDict(logits=A), ["logits"]),
        (Pair(A, B), ["output_one", "output_other"]),
        (Output(A, B), ["logits", "hidden"]),
        (Output(A, (B, A), [B]), ["logits", "hidden.0", "hidden.1", "more.0"]),
        ((A, Output(B)), ["output_0", "output_1.logits"]),
        (3.0, []),
    ],
)
def test_tensors_of_any_structure_have_names(output: Any, names: list[str]) -> None:
    assert sorted(named_outputs(output)) == sorted(names)
    assert difference(output, output).relative == 0


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_the_difference_names_both_values_and_is_relative_to_what_was_expected(
    one: float, other: float
) -> None:
    gap = difference({"y": torch.tensor([one, 2e3])}, {"y": torch.tensor([other, 2e3])})
    assert gap.absolute == pytest.approx(
        abs(torch.tensor(one).item() - torch.tensor(other).item()), abs=1e-9
    )
    assert gap.relative == pytest.approx(gap.absolute / 2e3)
    if gap.absolute:
        assert (gap.name, gap.expected, gap.value) == (
            "y", torch.tensor(one).item(), torch.tensor(other).item(),
        )  # fmt: skip


def test_each_tensor_has_its_own_scale() -> None:
    gap = difference((1000 * A, B), (1000 * A, B + 0.3))
    assert (gap.name, gap.relative) == ("output_1", pytest.approx(0.1))


def test_equal_nans_and_infinities_do_not_differ_and_others_do() -> None:
    odd = torch.tensor([math.nan, math.inf, 1.0])
    assert difference(odd, odd.clone()).relative == 0
    assert difference(odd, torch.tensor([0.0, math.inf, 1.0])).relative == math.inf


@pytest.mark.parametrize("other", [(A,), (A, A[:1]), {"a": A, "b": B}, None])
def test_another_structure_or_shape_differs_infinitely(other: Any) -> None:
    gap = difference((A, A), other)
    assert gap.relative == math.inf
    assert "another shape" in str(gap)


def test_the_coarsest_type_decides_what_rounding_explains() -> None:
    assert default_tolerance([]) == default_tolerance([A, A.long(), A.double()]) == TOLERANCE
    assert default_tolerance([A, A.half()]) == 8 * torch.finfo(torch.float16).eps
    assert default_tolerance([A.bfloat16(), A.half()]) == 8 * torch.finfo(torch.bfloat16).eps
