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
ORACLES = ROOT / ".venv" / "oracles"
N_SUBNETS = [3, pytest.param(20, marks=pytest.mark.slow)]


Differences = dict[str, list[dict[str, Any]]]


@functools.cache
def differences(network: str, n: int) -> Differences:
    """Run the comparison of n subnets in a process of its own, once."""
    if not (ORACLES / "ofa").is_dir() or not (ORACLES / "torchvision").is_dir():
        pytest.skip(f"the ofa package is not in {ORACLES}; `make install` puts it there")
    program = [sys.executable, "-m", "tests.programs.ofa_parity_program", str(ORACLES), str(n)]
    done = subprocess.run(
        [*program, network], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: Differences = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("n", N_SUBNETS)
@pytest.mark.parametrize("layout", ["current", "released"])
@pytest.mark.parametrize(
    ("network", "size"),
    [
        ("mobilenet_v3", "1.0"),
        ("mobilenet_v3", "1.2"),
        pytest.param("resnet", "resnet", marks=pytest.mark.slow),
    ],
)
def test_same_weights_and_subnet_give_the_logits_of_the_original(
    network: str, size: str, layout: str, n: int
) -> None:
    rows = [row for row in differences(network, n)[size] if row["layout"] == layout]
    assert len({row["subnet"] for row in rows}) == (
        3 if (network, layout) == ("resnet", "released") else n
    )
    assert min(row["spread"] for row in rows) > 0.01  # logits that say something
    for row in rows:
        assert max(row["active"], row["extracted"]) <= 1e-5 * max(1.0, row["scale"]), row
