# SPDX-License-Identifier: Apache-2.0
"""The matrix: families of super-networks by what holds of each, as a table in Markdown.

    python -m benchmarks.families [--real] [--only NAME ...] [--shipped 5] [--converted 2]

The families are the small models of tests/families, written in the style of their projects; with
--real also those of the packages ofa, whittle and timm, as far as these are installed. Of each,
five subnets are scored on validation samples: the largest, the smallest and random ones.
- isolated: the largest difference of their scores in three orders, which must be 0;
- statistics: how far evaluation is from normalising by the batch, once statistics are renewed on
  that batch, and before (relative; running variances are divided by N - 1, those of a batch by N);
- extracted: the largest difference of outputs from those that were scored, relative to their scale;
- ONNX: the same between the ONNX file, in ONNX Runtime, and the extracted subnet;
- MACs: those of the measure, which must be those of torch's counter in the extracted subnet; of the
  smallest and the largest subnet;
- params: the same with the number of distinct weights; and the share of the super-network's weights
  that the smallest subnet has.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch

from tests.families.checks import N_SUBNETS, PROPERTIES, Cell, Checked
from tests.families.family import Family
from tests.families.real import installed
from tests.families.registry import FAMILIES, LIMITS


def row(family: Family, shipped: int, converted: int) -> dict[str, Cell]:
    """Return the cells of a family."""
    checked = Checked(family, shipped=shipped, converted=converted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {key: checked.cell(key) for key in PROPERTIES}


def text(family: str, key: str, cell: Cell) -> str:
    """Return a cell as text; what does not hold is in bold, and a known limit has its reason."""
    if cell.ok:
        return cell.value
    limit = LIMITS.get((family, key))
    return f"**{cell.value}**" if limit is None else f"no: {limit.reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true", help="also the packages that are installed")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of families")
    parser.add_argument("--shipped", type=int, default=N_SUBNETS, help="subnets that are extracted")
    parser.add_argument("--converted", type=int, default=2, help="subnets that are converted")
    arguments = parser.parse_args()
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    families = {**FAMILIES, **(installed() if arguments.real else {})}
    print(f"| family | {' | '.join(PROPERTIES.values())} |")
    print("|" + " --- |" * (1 + len(PROPERTIES)))
    for name, family in families.items():
        if any(part.lower() in name.lower() for part in arguments.only):
            cells = row(family, arguments.shipped, arguments.converted)
            values = (text(name, key, cell) for key, cell in cells.items())
            print(f"| {name} | {' | '.join(values)} |", flush=True)


if __name__ == "__main__":
    main()
