# SPDX-License-Identifier: Apache-2.0
"""The example with a BERT of transformers, run as its users run it, with less training."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest

import tests.zoo.networks  # noqa: F401 - it names the operators that transformers asks for

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LIGHTNING_SUBNET_DATA", ROOT / "../shared/data")).resolve()


def test_a_bert_is_trained_made_elastic_and_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (DATA / "tinyshakespeare.txt").is_file():
        pytest.skip(f"no text in {DATA}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_SUBNET_DATA", str(DATA))
    monkeypatch.setattr(sys, "argv", ["transformers_bert.py", "--smoke"])
    runpy.run_path(str(ROOT / "examples" / "transformers_bert.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "BertForMaskedLM: 12 elastic choices" in text
    sizes = [float(x) for x in re.findall(r"loss [\d.]+, ([\d.]+) M parameters", text)]
    assert len(sizes) == 2
    assert sizes[1] < sizes[0]
    assert text.count("a BertForMaskedLM") == 2
    assert (tmp_path / "bert_output" / "winner.pt").is_file()
