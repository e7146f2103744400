# SPDX-License-Identifier: Apache-2.0
"""A search that is killed again and again makes the evaluations of one that is left alone."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lightning_subnet.study.storage import Storage
from tests.problems import ROOT, conditional, record
from tests.programs import ask_tell_program

pytestmark = pytest.mark.slow  # a storm of kills; the contract of a strategy resumes without them

CASES = [("nsga2", 1), ("nsga2", 3), ("random", 1), ("random", 3)]
KILLS = 10  # of each case
_PATIENCE = 120.0  # seconds until a program that does nothing is given up


@dataclass
class Killed:
    """What became of a search that was killed again and again."""

    history: list[dict[str, Any]] = field(default_factory=list)
    log: list[list[str]] = field(default_factory=list)
    lives: list[int] = field(default_factory=list)  # the length of the log when each life ended
    landed: list[str] = field(default_factory=list)  # what each killed life was doing
    committed: list[list[str]] = field(default_factory=list)  # keys in the database after each kill


def kill_and_resume(folder: Path, strategy: str, n: int) -> Killed:
    """Run the program, kill it KILLS times, then let it finish."""
    url, log, database = f"sqlite:///{folder}/search.db", folder / "log", folder / "search.db"
    command = [
        sys.executable,
        "-m",
        "tests.programs.ask_tell_program",
        url,
        str(log),
        strategy,
        str(n),
    ]
    moments = random.Random(f"{strategy}{n}")
    first, last = ask_tell_program.BATCH, ask_tell_program.BUDGET - 3
    openings = set(range(first, last, first))  # numbers of evaluations that end a generation
    others = moments.sample(sorted(set(range(last)) - openings), KILLS - len(openings))
    targets = sorted([*openings, *others])
    seen = Killed()
    log.touch()

    def notes(word: bytes = b"") -> int:
        return (b"\n" + log.read_bytes()).count(b"\n" + word) - (0 if word else 1)

    def wait_for(process: subprocess.Popen[bytes], word: bytes, count: int) -> None:
        end = time.monotonic() + _PATIENCE
        while process.poll() is None and notes(word) < count:
            assert time.monotonic() < end, "the program does nothing"
            time.sleep(0.002)

    while True:
        booted = notes(b"boot") + 1
        process = subprocess.Popen(command, cwd=ROOT)
        if targets:
            # Once it runs and so much has been measured, somewhere within a step or two.
            target = targets.pop(0)
            unnoted = len(seen.committed[-1]) - notes(b"told") if seen.committed else 0
            wait_for(process, b"boot", booted)
            wait_for(process, b"told", target - unnoted)
            if target in openings:
                wait_for(process, b"", notes() + 1)
                time.sleep(moments.uniform(0, 3 * ask_tell_program.PAUSE))
            else:
                wait_for(process, b"", notes() + moments.randint(0, 3))
                time.sleep(moments.uniform(0, 5 * ask_tell_program.PAUSE))
            process.send_signal(signal.SIGKILL)
        status = process.wait(timeout=_PATIENCE)
        lines = log.read_text().splitlines()
        seen.lives.append(len(lines))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        seen.landed.append(lines[-1].split()[0])
        seen.committed.append(keys_in(database))
    seen.log = [line.split() for line in lines]
    study = Storage(url).find_study("killed")
    assert study is not None
    seen.history = record(study.evaluations(conditional()))
    return seen


def keys_in(database: Path) -> list[str]:
    if not database.exists():
        return []
    connection = sqlite3.connect(database)
    try:
        return [row[0] for row in connection.execute("SELECT key FROM subnet_evaluation")]
    except sqlite3.OperationalError:
        return []  # killed before the tables were there
    finally:
        connection.close()


def told_before(seen: Killed, end: int) -> set[str]:
    """Return the keys whose tell had returned, of the first lines of the log."""
    return {words[1] for words in seen.log[:end] if words[0] == "told"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Killed]:
    folders = [tmp_path_factory.mktemp(f"{strategy}{n}") for strategy, n in CASES]
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(kill_and_resume, folders, *zip(*CASES, strict=True))
        return dict(zip(CASES, done, strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[dict[str, Any]]]:
    log = tmp_path_factory.mktemp("alone") / "log"
    return {
        (strategy, n): record(ask_tell_program.main(None, str(log), strategy, n).history)
        for strategy, n in CASES
    }


def test_kills_landed_in_every_step(runs: dict[tuple[str, int], Killed]) -> None:
    landed = [step for seen in runs.values() for step in seen.landed]
    assert len(landed) >= 30
    assert {"ask", "measure", "tell"} <= set(landed), landed
    cut_short = [
        key
        for seen in runs.values()
        for key in set(seen.committed[-1]) - told_before(seen, seen.lives[-2])
    ]
    assert cut_short, "no kill came between the commit of a tell and its return"


@pytest.mark.parametrize("case", CASES)
def test_evaluations_are_those_of_an_uninterrupted_run(
    case: tuple[str, int], runs: dict[tuple[str, int], Killed], alone: Any
) -> None:
    assert len(alone[case]) == ask_tell_program.BUDGET
    assert {e["status"] for e in alone[case]} == {"ok", "failed"}
    assert runs[case].history == alone[case]


@pytest.mark.parametrize("strategy", ["nsga2", "random"])
def test_asking_for_several_at_once_changes_nothing(strategy: str, alone: Any) -> None:
    assert alone[strategy, 1] == alone[strategy, 3]


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_was_told_is_measured_again(
    case: tuple[str, int], runs: dict[tuple[str, int], Killed]
) -> None:
    told: set[str] = set()
    for words in runs[case].log:
        if words[0] == "measure":
            assert words[1] not in told
        elif words[0] == "told":
            assert words[1] not in told
            told.add(words[1])
    # A tell that was killed after its commit counts as told as well.
    seen = runs[case]
    for end, committed in zip(seen.lives, seen.committed, strict=False):
        later = {words[1] for words in seen.log[end:] if words[0] == "measure"}
        assert not later & set(committed)


@pytest.mark.parametrize("case", CASES)
def test_what_was_told_is_in_the_database_after_the_kill(
    case: tuple[str, int], runs: dict[tuple[str, int], Killed]
) -> None:
    seen = runs[case]
    for kills, (end, committed) in enumerate(
        zip(seen.lives, seen.committed, strict=False), start=1
    ):
        told = told_before(seen, end)
        assert told <= set(committed)
        assert len(set(committed)) == len(committed)
        assert len(set(committed) - told) <= kills, "at most one tell a life was cut short"
