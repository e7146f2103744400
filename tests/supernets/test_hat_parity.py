# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORIGINAL = ROOT / ".venv" / "oracles" / "hat"
SOURCE = "https://github.com/mit-han-lab/hardware-aware-transformers"


@functools.cache
def rows_of(n: int) -> dict[str, list[dict[str, Any]]]:
    """Compare n subnets of each variant in a process of its own, once."""
    if not (ORIGINAL / "fairseq").is_dir():
        pytest.skip(f"HAT's code is not in {ORIGINAL}: git clone --depth 1 {SOURCE} {ORIGINAL}")
    program = [sys.executable, "-m", "tests.programs.hat_parity_program", str(ORIGINAL), str(n)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("n", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["shared", "separate", "tied", "widths", "norm_first"])
def test_same_weights_and_subnet_give_the_logits_and_the_tokens_of_hat(
    variant: str, n: int
) -> None:
    rows = rows_of(n)[variant]
    assert len({row["subnet"] for row in rows}) == n
    assert min(row["spread"] for row in rows) > 0.1  # logits that say something
    for row in rows:
        assert row["difference"] <= 1e-5 * max(1.0, row["scale"]), row
        assert row["decoding"], row
