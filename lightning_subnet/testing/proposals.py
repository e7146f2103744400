# SPDX-License-Identifier: Apache-2.0
"""Proposals of a strategy in every situation, here or in a process of its own.

`python -m lightning_subnet.testing.proposals MODULE CLASS SETTINGS_JSON` prints them.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np

from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.testing.problems import Situation, situations


def propose(strategy: Strategy, s: Situation, seed: int = 1) -> list[Subnet]:
    """Return the proposals of a strategy in a situation."""
    return strategy.propose(s.problem, s.history, s.n, np.random.default_rng([7, seed]), s.pending)


def in_every_situation(strategy: Strategy) -> dict[str, Any]:
    """Return the proposals of a strategy by name of the situation, as JSON-able data."""
    return {
        name: [subnet.to_json() for subnet in propose(strategy, s)]
        for name, s in situations().items()
    }


if __name__ == "__main__":
    module, name, settings = sys.argv[1:]
    cls = getattr(importlib.import_module(module), name)
    print(json.dumps(in_every_situation(cls(**json.loads(settings)))))
