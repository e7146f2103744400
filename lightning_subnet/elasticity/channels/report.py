# SPDX-License-Identifier: Apache-2.0
"""The report of what became elastic in a network, and of what did not and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_SHOWN = 12  # reasons of refusal in the table


@dataclass(frozen=True)
class ElasticRow:
    """One group of units, or one block that may be left out.

    Attributes:
        name: The choice; of a group that was refused, the layer.
        kind: "width", "heads", "stream" or "depth".
        units: Number of units; of a block 1.
        values: The numbers of units that subnets have; nothing if it was refused.
        layers: The layers whose weights have the units.
        params: The share of the network's parameters that have them.
        macs: The share of the MACs of the example.
        verified: Whether slices were proved to be what the network gives without these units.
        reason: Why it is not elastic; an empty string if it is.
    """

    name: str
    kind: str
    units: int
    values: tuple[Any, ...]
    layers: tuple[str, ...]
    params: float
    macs: float
    verified: bool
    reason: str = ""


@dataclass(frozen=True)
class ElasticReport:
    """What became elastic in a network; `print` shows it as a table.

    Attributes:
        network: The class of the network.
        rows: The groups and blocks.
        smallest_macs: The share of the MACs that the smallest subnet has; None if unknown.
    """

    network: str
    rows: tuple[ElasticRow, ...]
    smallest_macs: float | None = None

    @property
    def elastic(self) -> tuple[ElasticRow, ...]:
        """The rows that are choices of the space."""
        return tuple(row for row in self.rows if not row.reason)

    @property
    def refused(self) -> tuple[ElasticRow, ...]:
        """The rows that are not, each with its reason."""
        return tuple(row for row in self.rows if row.reason)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dicts, as `pandas.DataFrame` takes them."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        """Return the table."""
        table = [("choice", "units", "values", "MACs", "params", "proved")]
        for row in self.elastic:
            values = ", ".join(map(str, row.values))
            proved = "yes" if row.verified else "no"
            table.append(
                (row.name, str(row.units), values, _percent(row.macs), _percent(row.params), proved)
            )
        lines = [f"{self.network}: {len(self.elastic)} elastic choices", *_aligned(table)]
        if self.smallest_macs is not None:
            lines.append(f"The smallest subnet has {self.smallest_macs:.0%} of the MACs.")
        by_reason: dict[str, list[str]] = {}
        for row in self.refused:
            by_reason.setdefault(row.reason, []).append(row.name)
        if by_reason:
            lines.append("Not elastic:")
        for reason, names in [*by_reason.items()][:_SHOWN]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {names[0]}{more}: {reason}")
        if len(by_reason) > _SHOWN:
            lines.append(f"  ... {len(by_reason) - _SHOWN} more reasons in .refused")
        return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
