# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORACLES = ROOT / ".venv" / "oracles"
N = 20


@pytest.fixture(scope="module")
def differences() -> dict[str, list[dict[str, Any]]]:
    if not (ORACLES / "ofa").is_dir() or not (ORACLES / "torchvision").is_dir():
        pytest.skip(f"the ofa package is not in {ORACLES}; `make install` puts it there")
    program = [sys.executable, "-m", "tests.programs.ofa_parity_program", str(ORACLES), str(N)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("layout", ["current", "released"])
@pytest.mark.parametrize("width", ["1.0", "1.2"])
def test_same_weights_and_subnet_give_the_logits_of_the_original(
    differences: dict[str, list[dict[str, Any]]], width: str, layout: str
) -> None:
    rows = [row for row in differences[width] if row["layout"] == layout]
    assert len({row["subnet"] for row in rows}) == N
    assert min(row["spread"] for row in rows) > 0.01  # logits that say something
    for row in rows:
        assert max(row["active"], row["extracted"]) <= 1e-5 * max(1.0, row["scale"]), row
