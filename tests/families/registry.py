# SPDX-License-Identifier: Apache-2.0
"""All families of the matrix, and what is known not to hold, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from tests.families import (
    attentive,
    autoformer,
    dynabert,
    hat,
    ofa,
    own,
    residual,
    slimmable,
    whittle,
)
from tests.families.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in (
        own,
        ofa,
        whittle,
        hat,
        slimmable,
        autoformer,
        dynabert,
        attentive,
        residual,
    )
    for family in module.FAMILIES
}


@dataclass(frozen=True)
class Limit:
    """What does not hold, and why.

    Args:
        value: How the cell says so.
        reason: Why, in words for a user.
    """

    value: str
    reason: str


# The one list of what does not hold: a cell that is here must fail, in these words.
LIMITS: dict[tuple[str, str], Limit] = {
    ("HAT, mask by value", "onnx"): Limit(
        "ExportError", "`if not mask.any()` goes by values, which a file cannot follow"
    ),
    ("HAT, mask by value", "params"): Limit(
        "not sliced", "`if not mask.any()` goes by values, which torch.export cannot follow"
    ),
}

SLICED = (  # by way of torch.export, in seconds a subnet
    "whittle GPT",
    "HAT",
    "HAT, mask by value",
    "slimmable, switchable BatchNorm",
    "slimmable, universal BatchNorm",
    "slimmable, one BatchNorm sliced",
    "AutoFormer",
    "DynaBERT",
)
# Cells that take long.
SLOW = {(name, key) for name in SLICED for key in ("extracted", "onnx", "macs", "params")} | {
    ("AttentiveNAS", "onnx")
}
