# SPDX-License-Identifier: Apache-2.0
"""Print what a strategy proposes in every situation: `propose_program.py CLASS SETTINGS_JSON`."""

from __future__ import annotations

import json
import sys

import numpy as np

from lightning_subnet import strategies
from tests.problems import situations

strategy = getattr(strategies, sys.argv[1])(**json.loads(sys.argv[2]))
proposals = {
    name: [
        subnet.to_json()
        for subnet in strategy.propose(
            s.problem, s.history, s.n, np.random.default_rng([7, 1]), s.pending
        )
    ]
    for name, s in situations().items()
}
print(json.dumps(proposals))
