# SPDX-License-Identifier: Apache-2.0
"""The demo does what its issue asks of it, when run as its user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lightning_subnet import SearchResult

DEMO = Path(__file__).resolve().parent.parent / "examples" / "digits_search.py"


def test_the_demo_finds_a_front_worth_having_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    def run() -> str:
        done = subprocess.run(
            [sys.executable, DEMO], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    result = SearchResult.load(tmp_path / "demo_output" / "result.json")
    assert len(result.history) == 40
    assert all(e.ok for e in result.history)
    assert len(result.front) >= 5
    assert result.best("val_acc").values["val_acc"] > 0.9
    assert (tmp_path / "demo_output" / "front.png").stat().st_size > 10_000
    assert "40/40" in first
    again = run()
    assert "goes on after 40 evaluations" in again
    assert again.split("digits: 40 evaluations")[1] == first.split("digits: 40 evaluations")[1]
