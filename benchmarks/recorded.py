# SPDX-License-Identifier: Apache-2.0
"""Our LINAS and NSGA-II beside recorded runs of the published system on the real OFA MobileNetV3.

    python -m benchmarks.search_efficiency --problems ofa-networks ofa-trees
    python -m benchmarks.recorded

Two searches of DyNAS-T with real ImageNet validations, in order, beside ours on the truths of
benchmarks.problems: hypervolume after k validations, in the same square. The truths are models
fitted on rows that these very runs measured, so they know where the recorded runs went better than
elsewhere; "on the truth" is the recorded run with its subnets' top-1 as the truth has it, which
takes noise and the error of the model out of the comparison. The recorded runs did not mask
inactive choices and repeat themselves (7 % of their evaluations); ours do not.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks import truths
from benchmarks.data import RESULTS
from benchmarks.efficiency_runs import curves_of, read, settings_hash, strategy_of
from benchmarks.problems import in_square, ofa
from lightning_subnet.study import pareto

CHECKPOINTS = (20, 50, 100, 150, 200, 250, 350, 500)
LABELS = ("linas", "nsga2")
SAME = 0.1  # points of top-1 by which a repeated measurement differs from the mean of its row


def same_rows(run: np.ndarray, macs: np.ndarray, top1: np.ndarray) -> np.ndarray:
    """Return the measured row (n,) of each evaluation of a run, -1 where there is none."""
    rows = []
    for accuracy, cost in run:
        alike = np.flatnonzero(macs == cost)
        near = alike[np.abs(top1[alike] - accuracy).argmin()] if len(alike) else -1
        rows.append(near if near >= 0 and abs(top1[near] - accuracy) <= SAME else -1)
    return np.array(rows)


def ours(label: str, problem: str) -> np.ndarray | None:
    """Return our curves, (seeds, validations), or None if there are none."""
    frame = read(problem)
    mine = frame[
        (frame.strategy == label) & (frame.settings == settings_hash(strategy_of(label, problem)))
    ]
    if not len(mine):
        return None
    curves = list(curves_of(mine).values())
    return np.stack([curve[: min(map(len, curves))] for curve in curves])


def compared(label: str, truth: str) -> list[dict]:
    """Return one row per checkpoint: the recorded run, on the truth too, and ours."""
    if (mine := ours(label, f"ofa-{truth}")) is None:
        print(f"no runs of {label} on ofa-{truth}: run the first command of the docstring")
        return []
    data, problem = truths.measured(), ofa(truth)
    run = data.runs[label]
    macs = problem.measures[0](data.X)
    rows = same_rows(run, macs, data.top1)
    has_row = rows >= 0
    if not has_row.all():
        print(f"{label}: {len(run) - has_row.sum()} of {len(run)} evaluations have no measured row")
    top1 = np.where(has_row, problem.values(data.X)["top1"][rows], run[:, 0])
    curves = {
        name: pareto.hypervolumes(
            in_square({"top1": column, "macs": run[:, 1]}, problem.objectives, problem.bounds),
            [1.0, 1.0],
        )
        for name, column in (("recorded", run[:, 0]), ("recorded, on the truth", top1))
    }
    return [
        {"strategy": label, "truth": truth, "validations": k, "seeds": len(mine)}
        | {name: round(float(curve[k - 1]), 4) for name, curve in curves.items()}
        | {"ours": round(float(np.median(mine[:, k - 1])), 4)}
        | {"lowest": mine[:, k - 1].min(), "highest": mine[:, k - 1].max()}
        for k in CHECKPOINTS
        if k <= min(len(run), mine.shape[1])
    ]


def statement(frame: pd.DataFrame) -> str:
    """Return a sentence: how far ours is from the recorded run on the same truth."""
    recorded = frame["recorded, on the truth"]
    inside = ((recorded >= frame.lowest) & (recorded <= frame.highest)).sum()
    largest = (frame.ours - recorded).loc[(frame.ours - recorded).abs().idxmax()]
    return (
        f"{frame.strategy.iloc[0]} on {frame.truth.iloc[0]}: recorded within the range of our "
        f"seeds at {inside} of {len(frame)} checkpoints; our median is at most {largest:+.4f} off"
    )


def main() -> None:
    pairs = [(label, truth) for label in LABELS for truth in truths.TRUTHS]
    frame = pd.DataFrame([row for pair in pairs for row in compared(*pair)])
    pd.set_option("display.width", 200)
    print("Hypervolume in the square of top-1 78 to 70 % and 120 to 560 million MACs")
    print(frame.to_string(index=False))
    for _, part in frame.groupby(["strategy", "truth"], sort=False):
        print(statement(part))
    frame.to_csv(RESULTS / "recorded.csv", index=False)


if __name__ == "__main__":
    main()
