# SPDX-License-Identifier: Apache-2.0
"""Records as text and as data frames.

Three places of this package print a table, each for its own reader. This one has a line per subnet
of a front, however long. `sensitivity_report` fits a few wide columns into the width of a terminal,
for which rich breaks their heads and cells. `front_export` writes Markdown, for a README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_subnet.errors import ObjectiveError
from lightning_subnet.results.record import SearchRecord
from lightning_subnet.space.subnet import Subnet

if TYPE_CHECKING:
    import pandas as pd


def text(record: SearchRecord) -> str:
    """Return a table of the front, one line per subnet."""
    try:
        front = record.front
    except ObjectiveError as error:  # a relative bound whose reference failed
        return f"{record.name}: {len(record.history)} evaluations, no front. {error}"
    failed = int((~record.history.ok).sum()) if len(record.history) else 0
    head = (
        f"{record.name}: {len(record.history)} evaluations, {failed} failed, "
        f"{len(front)} on the front of {record.history.space.size:,} subnets"
    )
    if not len(front):
        return head
    names = record.names_of(front)
    cells = [
        [f"{e.number}", *(f"{e.values.get(n, float('nan')):.6g}" for n in names)] for e in front
    ]
    rows = [["#", *names], *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    subnets = ["subnet", *(choices_text(e.subnet) for e in front)]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        + "  "
        + subnet
        for row, subnet in zip(rows, subnets, strict=True)
    ]
    return "\n".join([head, *table])


def choices_text(subnet: Subnet) -> str:
    """Return the choices of a subnet as text: `"depth=2, ks=[3, 5]"`."""
    return repr(subnet).removeprefix("Subnet(").removesuffix(")")


def frame(record: SearchRecord) -> pd.DataFrame:
    """Return all evaluations; see `SearchResult.to_dataframe`."""
    table = record.history.to_dataframe()
    second = [record.verified.get(e.subnet.key, {}) for e in record.history]
    for name in dict.fromkeys(key for pairs in second for key in pairs):
        table[f"{name}_verified"] = [pairs.get(name, (np.nan, 0.0))[0] for pairs in second]
    on_front = {evaluation.number for evaluation in record.front}
    table["front"] = [number in on_front for number in table.index]
    return table
