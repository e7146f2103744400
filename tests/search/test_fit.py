# SPDX-License-Identifier: Apache-2.0
"""Searches by a Trainer: interrupted, rehearsed, and in two processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_subnet import SubnetSearch
from lightning_subnet.errors import SearchError
from lightning_subnet.strategies import RandomSearch
from tests.networks import Digits, LitMlp, quiet_trainer

ROOT = Path(__file__).resolve().parents[2]


def search(**settings: Any) -> SubnetSearch:
    default = {"objectives": {"val_acc": "max", "macs": "min"}, "budget": 5, "storage": None}
    default |= {"strategy": RandomSearch(batch_size=4), "trainer": quiet_trainer()}
    return SubnetSearch(**{**default, "calibration_images": 0, **settings})


class Interrupted(LitMlp):
    """Is interrupted in one of its validations, as by Ctrl-C."""

    at = 5  # the third subnet; the first is scored twice, with another one in between

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if self.validated.n == self.at:
            raise KeyboardInterrupt


def test_what_an_interrupted_fit_has_measured_stays_with_the_search() -> None:
    interrupted, model = search(), Interrupted()
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit(model, Digits(), progress=False)
    assert [e.number for e in interrupted.history] == [0, 1]
    assert interrupted.space == model.net.search_space()
    assert len(interrupted.fit(model, Digits(), progress=False).history) == 5


def test_a_fit_that_has_measured_nothing_leaves_the_search_as_it_was() -> None:
    class AtOnce(Interrupted):
        at = 1

    asked = search()
    with pytest.raises(KeyboardInterrupt):
        asked.fit(AtOnce(), Digits(), progress=False)
    assert asked.space is None
    with pytest.raises(SearchError, match="no space"):
        _ = asked.history


def test_a_rehearsal_keeps_nothing(tmp_path: Path) -> None:
    rehearsed = search(
        storage=f"sqlite:///{tmp_path}/s.db", trainer=quiet_trainer(fast_dev_run=True)
    )
    assert len(rehearsed.fit(LitMlp(), Digits(), progress=False).history) == 3
    assert rehearsed.space is None
    assert list(tmp_path.iterdir()) == []


def run(folder: Path, devices: int, mode: str = "") -> list[dict[str, Any]]:
    """Run the program and return the report of each process."""
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
    assert first["again"] == list(range(9))  # resume="must": all of them hold the same study
    for one, two in zip(alone["history"], first["history"], strict=True):
        assert one["subnet"] == two["subnet"]
        assert two["values"]["samples"] == 101  # Lightning's sampler would make it 102
        assert two["values"]["val_acc"] == pytest.approx(one["values"]["val_acc"], abs=1e-6)
        # a metric that each process computes for itself is no measurement
        assert "own_acc" in one["values"]
        assert "own_acc" not in two["values"]


@pytest.mark.slow
def test_an_objective_that_is_not_reduced_is_one_clear_error(tmp_path: Path) -> None:
    first, second = run(tmp_path / "two", 2, "unreduced")
    assert "'own_acc' differs between the processes" in first["error"]
    assert "sync_dist=True" in first["error"]
    assert second["error"].startswith("SearchError: Process 0 ended the search: MeasurementError")


@pytest.mark.slow
def test_a_subnet_that_fails_in_all_processes_is_a_recorded_failure(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    first, second = run(tmp_path / "two", 2, "failing")
    assert first == second
    failed = [e for e in first["history"] if e["status"] == "failed"]
    assert failed
    assert all(e["subnet"]["width"] == 8 for e in failed)
    assert {e["reason"] for e in failed} == {"RuntimeError: process 0: ValueError: no"}


@pytest.mark.slow
def test_the_callback_in_two_processes(tmp_path: Path) -> None:
    first, second = run(tmp_path / "two", 2, "callback")
    assert first == second
    assert len(first["history"]) == 9
    assert first["training_trainer"]
    assert {e["values"]["samples"] for e in first["history"]} == {101}
