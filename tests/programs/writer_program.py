# SPDX-License-Identifier: Apache-2.0
"""Write rows into a study: `writer_program.py URL STUDY FIRST COUNT`, after a line came on stdin.

Row i is the i-th subnet of the grid with the value i. Prints the numbers that the rows were given.
"""

from __future__ import annotations

import json
import sys

from lightning_subnet import Evaluation
from lightning_subnet.study.storage import Storage
from tests.problems import grid

url, name, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
space = grid(4, 7)  # 2,401 subnets
subnets = list(space)[first : first + count]
sys.stdin.readline()  # all writers start together, so that they create the file at once too
study = Storage(url).create_study(name, {"seed": 0}, space, {})
numbers = [
    study.add_evaluation(Evaluation(0, subnet, {"f0": float(i)}), {"f0": f"shared:{i % 3}"}).number
    for i, subnet in enumerate(subnets, start=first)
]
print(json.dumps(numbers))
