# SPDX-License-Identifier: Apache-2.0
"""Results as text and as data frames."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from lightning_subnet.errors import ObjectiveError
from lightning_subnet.study.measures import Measure

if TYPE_CHECKING:
    import pandas as pd

    from lightning_subnet.results.result import SearchResult


def told(measure: Measure) -> dict[str, str]:
    """Return the unit of a measure and, without its hash, what a noisy one depends on."""
    text = re.sub(r", [0-9a-f]{12,}$", "", measure.fingerprint or "")
    conditions = "" if measure.exact else text.removeprefix(f"{measure.name}: ")
    return {"unit": measure.unit} | ({"conditions": conditions} if conditions else {})


def text(result: SearchResult) -> str:
    """Return a table of the front, one line per subnet."""
    try:
        front = result.front
    except ObjectiveError as error:  # a relative bound whose reference failed
        return f"{result.name}: {len(result.history)} evaluations, no front. {error}"
    failed = int((~result.history.ok).sum()) if len(result.history) else 0
    head = (
        f"{result.name}: {len(result.history)} evaluations, {failed} failed, "
        f"{len(front)} on the front of {result.history.space.size:,} subnets"
    )
    if not len(front):
        return head
    names = list(dict.fromkeys([*result.problem.names, *(k for e in front for k in e.values)]))
    shown = [
        [f"{e.number}", *(f"{e.values.get(n, float('nan')):.6g}" for n in names)] for e in front
    ]
    rows = [["#", *names], *shown]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    subnets = ["subnet", *(repr(e.subnet)[7:-1] for e in front)]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        + "  "
        + subnet
        for row, subnet in zip(rows, subnets, strict=True)
    ]
    return "\n".join([head, *table])


def frame(result: SearchResult) -> pd.DataFrame:
    """Return all evaluations; see `SearchResult.to_dataframe`."""
    frame = result.history.to_dataframe()
    again = [result.verified.get(e.subnet.key, {}) for e in result.history]
    for name in dict.fromkeys(key for pairs in again for key in pairs):
        frame[f"{name}_verified"] = [pairs.get(name, (np.nan, 0.0))[0] for pairs in again]
    on_front = {evaluation.number for evaluation in result.front}
    frame["front"] = [number in on_front for number in frame.index]
    return frame
