# SPDX-License-Identifier: Apache-2.0
"""Searches in two processes, against the same search in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, devices: int, mode: str = "") -> list[dict[str, Any]]:
    """Run the program and return what each process has told."""
    folder.mkdir()
    program = ROOT / "tests/programs/ddp_search_program.py"
    done = subprocess.run(
        [sys.executable, str(program), str(devices), str(folder), *([mode] if mode else [])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "prepared").read_text() == "x"  # by one process
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(devices)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one") / "run", 1)[0]


def test_two_processes_find_what_one_finds(alone: dict[str, Any], tmp_path: Path) -> None:
    first, second = run(tmp_path / "two", 2)
    assert first == second
    assert first["front"] == alone["front"]
    assert len(first["history"]) == 9
    for one, two in zip(alone["history"], first["history"], strict=True):
        assert one["subnet"] == two["subnet"]
        assert two["values"]["samples"] == 101  # Lightning's sampler would make it 102
        assert two["values"]["val_acc"] == pytest.approx(one["values"]["val_acc"], abs=1e-6)
        # a metric that each process computes for itself is no measurement
        assert "own_acc" in one["values"]
        assert "own_acc" not in two["values"]


def test_an_objective_that_is_not_reduced_is_one_clear_error(tmp_path: Path) -> None:
    first, second = run(tmp_path / "two", 2, "unreduced")
    assert "'own_acc' differs between the processes" in first["error"]
    assert "sync_dist=True" in first["error"]
    assert second["error"].startswith("SearchError: Process 0 ended the search: MeasurementError")


def test_a_subnet_that_fails_in_all_processes_is_a_recorded_failure(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    first, second = run(tmp_path / "two", 2, "failing")
    assert first == second
    failed = [e for e in first["history"] if e["status"] == "failed"]
    assert failed
    assert all(e["subnet"]["width"] == 8 for e in failed)
    assert {e["reason"] for e in failed} == {"RuntimeError: process 0: ValueError: no"}


def test_the_callback_in_two_processes(tmp_path: Path) -> None:
    first, second = run(tmp_path / "two", 2, "callback")
    assert first == second
    assert len(first["history"]) == 9
    assert first["training_trainer"]
    assert {e["values"]["samples"] for e in first["history"]} == {101}
