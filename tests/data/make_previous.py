# SPDX-License-Identifier: Apache-2.0
"""Write in previous/ the files of an earlier version, and in expected.json what it says of them.

Run with the package of commit 6ab0839, once: a later version proves that it reads the files, so
it must not write them. In a checkout of that commit, to which tests/previous.py was added::

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/data/make_previous.py FOLDER

The files are as that version writes them, but for two things. What `torch.export` notes of the
source lines that an operator came from (`stack_trace`) is left out of the .pt2 files, as it holds
paths of the machine. And the write-ahead log of the database is taken into it, so that it is one
file; it ends in .sqlite, as .gitignore leaves out *.db.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import lightning_subnet
from lightning_subnet import Latency, Measure, SearchResult, Subnet, SubnetSearch
from tests import previous
from tests.previous import LatencyPredictor, LatencyTable, load_exported

_saved = torch.export.save


def save_without_paths(program: torch.export.ExportedProgram, *args: Any, **options: Any) -> None:
    """Save a program without the source lines that its operators came from."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    _saved(program, *args, **options)


def trained() -> previous.Lit:
    """Return the network after a few steps."""
    torch.manual_seed(0)
    model = previous.Lit()
    previous.quiet_trainer(max_epochs=2).fit(model, previous.Images())
    return model


def noisy_latency() -> Measure:
    """Return a latency with standard errors that is another at each call, and fails at times."""
    calls = 0

    def latency(subnets: list[Subnet]) -> list[tuple[float, float]]:
        nonlocal calls
        told = []
        for subnet in subnets:
            if subnet["ks.0"] == subnet["e.0"] + 3 == 5:
                msg = "the device is gone"
                raise RuntimeError(msg)
            calls += 1
            told.append((1.0 + sum(subnet.indices.tolist()) + calls % 5 / 8, 0.0625))
        return told

    return Measure("latency_ms", latency, unit="ms", fingerprint="latency_ms: a made-up device")


def write_studies(url: str, folder: Path, model: previous.Lit) -> SearchResult:
    """Write the studies and the result; return that of `fit`, which knows its network."""
    asked = previous.study("ask", url)
    extra = previous.decoded(previous.conditional(), "21021")[0]
    previous.answered(asked, extra)
    told = 0
    while told < 10:
        told += bool(previous.answered(asked, asked.ask()[0]))
    open_ones = asked.ask(3)
    assert len(open_ones) >= 2, "the generation is open"
    previous.answered(asked, open_ones[1])
    for name in previous.STUDIES:
        if name != "ask":
            previous.study(name, url).run(previous.study_evaluator(name), progress=False)
    fitted = SubnetSearch(
        objectives={"val_loss": "min", "macs": "min"}, strategy="random", budget=9, storage=url,
        name="fit", trainer=previous.quiet_trainer(), calibration_images=24,
    ).fit(model, previous.Images(), progress=False)  # fmt: skip
    result = SubnetSearch(
        objectives={"val_loss": "min", "latency_ms": "min"}, constraints={"macs": "<= 90%"},
        measures=[noisy_latency()], strategy="random", budget=16, storage=url, name="noisy",
        trainer=previous.quiet_trainer(), calibration_images=24, seed=4,
    ).fit(model, previous.Images(), progress=False)  # fmt: skip
    assert result.verified
    assert not result.history.ok.all()
    assert 1 < len(result.front) < len(result.history)
    result.save(folder / "result.json")
    return fitted


def write_costs(folder: Path, model: previous.Lit) -> dict[str, Any]:
    """Write a table and two predictors of latencies; return what they predict."""
    net, quick = model.net, Latency(repeats=15, seconds=0.0, threads=1)
    sample = torch.zeros(1, 1, 8, 8)
    space = net.search_space()
    table = LatencyTable.build(net, sample, latency=quick, calibrate=4, check=4)
    table.save(folder / "latency_table.json")
    subnets = previous.list_of(space, 40)
    told = [1.0 + sum(s.indices.tolist()) / 3 for s in subnets[:24]]
    phone = LatencyPredictor(
        space, subnets[:24], told, errors=[0.125] * 24, device="a phone", predictor="ridge",
        conditions={"governor": "performance"},
    )  # fmt: skip
    phone.save(folder / "latency_predictor.json")
    here = LatencyPredictor.fit(net, quick, n=16, example_input=sample)
    here.save(folder / "latency_predictor_fitted.json")
    asked = subnets[35:]
    return {
        "subnets": [subnet.to_json() for subnet in asked],
        "latency_table": {
            "values": table.predict(asked).tolist(),
            "blocks": len(table.blocks),
            "device": table.device,
            "report": str(table.report),
            "fingerprint": table.measure.fingerprint,
        },
        "latency_predictor": _predicted(phone, asked),
        "latency_predictor_fitted": _predicted(here, asked),
    }


def _predicted(predictor: LatencyPredictor, asked: list[Subnet]) -> dict[str, Any]:
    mean, std = predictor.predict(asked, return_std=True)
    told = {"mean": mean.tolist(), "std": std.tolist(), "device": predictor.device}
    return told | {"fingerprint": predictor.measure.fingerprint}


def write_exported(folder: Path, fitted: SearchResult) -> dict[str, Any]:
    """Write two subnets of the front as files; return what the files say."""
    front = list(fitted.front)
    written = fitted.export(
        folder, formats=("onnx", "torch"), subnets=[front[0], front[-1]],
        example_input=previous.images(4),
    )  # fmt: skip
    assert len(written) == 4
    told: dict[str, Any] = {}
    for exported in written:
        net = load_exported(exported.path)
        told[exported.path.name] = {
            "subnet": net.subnet.to_json() if net.subnet else None,
            "values": net.values,
            "outputs": net(previous.images(5)).tolist(),
        }
    return told


def whole(path: Path) -> None:
    """Take the write-ahead log of a database into it."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("VACUUM")
    connection.close()


def expected_of_studies(path: Path) -> dict[str, Any]:
    """Return what studies say, and how they go on, each in a copy of the database."""
    told: dict[str, Any] = {}
    for name in previous.STUDIES:
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copy(path, f"{scratch}/studies.sqlite")
            url = f"sqlite:///{copy}"
            told[name] = {
                "result": previous.told_by(previous.study(name, url).result()),
                "goes on": previous.goes_on(name, url),
            }
    return told


def main(folder: Path) -> None:
    """Write the files."""
    root = Path(__file__).resolve().parents[2]
    assert Path(lightning_subnet.__file__).is_relative_to(root), "set PYTHONPATH to this checkout"
    warnings.simplefilter("ignore")
    torch.export.save = save_without_paths
    folder.mkdir(parents=True)
    model, database = trained(), folder / "studies.sqlite"
    fitted = write_studies(f"sqlite:///{database}", folder, model)
    expected = {
        "commit": "6ab0839",
        "result": previous.told_by(SearchResult.load(folder / "result.json")),
        "verified": SearchResult.load(folder / "result.json").verified,
        "fit": previous.told_by(fitted),
        "costs": write_costs(folder, model),
        "exported": write_exported(folder / "exported", fitted),
    }
    whole(database)
    expected["studies"] = expected_of_studies(database)
    text = json.dumps(expected, indent=1)
    (folder / "expected.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
