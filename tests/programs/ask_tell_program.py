# SPDX-License-Identifier: Apache-2.0
"""A search over ask and tell that may be killed anywhere: `ask_tell_program.py URL LOG STRATEGY N`.

The log gets a line before and after each step and is synced, so that whoever reads it after the
kill knows what had happened. Commits are slowed down, so that some kills land within an ask or
a tell.
"""

from __future__ import annotations

import os
import sys
import time

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.pool import Pool

from lightning_subnet import SubnetSearch
from lightning_subnet.strategies import NSGA2, RandomSearch
from tests.problems import conditional, cost, objectives_of

BUDGET = 36
BATCH = 8
PAUSE = 0.012  # seconds: long enough for each step to be hit now and then, on a busy machine too


def main(url: str | None, log: str, strategy: str, n: int) -> SubnetSearch:
    with open(log, "a") as file:

        def note(*words: str) -> None:
            file.write(" ".join(words) + "\n")
            file.flush()
            os.fsync(file.fileno())

        note("boot")
        search = SubnetSearch(
            space=conditional(),
            objectives={"f0": "min", "f1": "max", "cost": "min"},
            constraints={"cost": "<= 90%"},
            measures=[cost],
            strategy=NSGA2(population=BATCH)
            if strategy == "nsga2"
            else RandomSearch(batch_size=BATCH),
            budget=BUDGET,
            storage=url,
            name="killed",
            seed=11,
        )
        while True:
            note("ask")
            if not (subnets := search.ask(n)):
                break
            for subnet in subnets:
                note("measure", subnet.key)
                time.sleep(PAUSE if url else 0)
                note("tell", subnet.key)
                if int(subnet.key[:2], 16) % 7 == 0:
                    search.fail(subnet, "it broke")
                else:
                    search.tell(subnet, objectives_of(subnet))
                note("told", subnet.key)
        note("end")
    return search


if __name__ == "__main__":

    @sa.event.listens_for(Engine, "commit")
    def before_commit(*_: object) -> None:
        time.sleep(PAUSE)

    @sa.event.listens_for(Pool, "checkin")
    def after_commit(*_: object) -> None:
        time.sleep(2 * PAUSE)

    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
