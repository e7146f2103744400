# SPDX-License-Identifier: Apache-2.0
"""The examples, run as their users run them, with less training and smaller budgets."""

from __future__ import annotations

import importlib
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from lightning_subnet import SearchResult
from lightning_subnet.training import Source, TrainerEvaluator

pytestmark = pytest.mark.slow  # examples, run as they are

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DATA = Path(os.environ.get("LIGHTNING_SUBNET_DATA", ROOT / "../shared/data")).resolve()
BUDGET = 24
KILLS = 3


def small_demo(folder: Path) -> Path:
    """Write the demo with an eighth of the training and a smaller budget; return its path."""
    text = (EXAMPLES / "digits_search.py").read_text()
    for old, new in {
        "max_epochs=16": "max_epochs=2",
        "seconds=1": "seconds=0.05, repeats=15",
        "budget=72": f"budget={BUDGET}",
        "<= 60%": "<= 90%",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "demo.py"
    path.write_text(text)
    return path


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "LIGHTNING_SUBNET_DATA": str(DATA)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluations(database: Path) -> int:
    try:
        with sqlite3.connect(database) as connection:
            (count,) = connection.execute("SELECT count(*) FROM subnet_evaluation").fetchone()
            return count
    except sqlite3.OperationalError:  # not there yet
        return 0


def test_the_demo_and_that_it_can_be_killed_at_any_moment(tmp_path: Path) -> None:
    demo, output = small_demo(tmp_path), tmp_path / "demo_output"
    first = run(demo, cwd=tmp_path)
    assert f"{BUDGET}/{BUDGET}" in first
    assert "net.sliced=True" in first
    result = SearchResult.load(output / "result.json")
    assert len(result.history) == BUDGET
    assert all(e.ok for e in result.history)
    assert result.verified.keys() >= {e.subnet.key for e in result.front}
    assert (output / "front.png").stat().st_size > 10_000
    plain = torch.load(output / "best.pt", weights_only=False)
    assert plain(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    again = run(demo, cwd=tmp_path)
    assert f"goes on after {BUDGET} evaluations" in again
    assert again.split("\n\nLargest")[1] == first.split("\n\nLargest")[1]

    # The same search again, killed three times. Latency is noise, and proposals follow it; so the
    # values of the first run are given to it, and nothing else: accuracy is validated anew.
    other = tmp_path / "other"
    (other / "demo_output").mkdir(parents=True)
    database = other / "demo_output" / "search.db"
    shutil.copy(output / "supernet.pt", other / "demo_output")
    with sqlite3.connect(output / "search.db") as connection:
        connection.execute("VACUUM INTO ?", (str(database),))
    with sqlite3.connect(database) as connection:
        for table in ("subnet_evaluation", "subnet_generation", "subnet_study"):
            connection.execute(f"DELETE FROM {table}")
        connection.execute("DELETE FROM subnet_value WHERE fingerprint LIKE 'val_acc%'")
    chance = random.Random(0)
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, str(demo)],
            cwd=other,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while evaluations(database) < (kill + 1) * BUDGET // (KILLS + 1):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert 0 < evaluations(database) < BUDGET
    run(demo, cwd=other)
    killed = SearchResult.load(other / "demo_output" / "result.json")
    for one, two in zip(result.history, killed.history, strict=True):
        assert (one.subnet, one.values, one.generation) == (two.subnet, two.values, two.generation)
        assert two.reused == ("latency_ms",)


def test_strategies_are_compared_on_a_trained_network(tmp_path: Path) -> None:
    text = (EXAMPLES / "compare_algorithms.py").read_text()
    whole = "EPOCHS, SEEDS, BUDGET = 100, 10, 100"
    assert whole in text
    example = tmp_path / "example.py"
    example.write_text(text.replace(whole, "EPOCHS, SEEDS, BUDGET = 5, 2, 25"))
    told = run(example, cwd=tmp_path)
    names = ["random", "nsga2", "hybrid", "neighbours"]
    for title in ("hv@5", "Evaluations to random@25", "Ahead of random"):
        assert title in told
    assert all(told.count(f"{name} ") >= 2 for name in names)
    for name in ("compare_curves", "compare_attainment"):
        assert (tmp_path / "demo_output" / f"{name}.png").stat().st_size > 10_000
    with sqlite3.connect(tmp_path / "demo_output" / "compare.db") as connection:
        studies = connection.execute("SELECT name FROM subnet_study").fetchall()
        made = connection.execute("SELECT key FROM subnet_evaluation").fetchall()
        measured = connection.execute("SELECT key FROM subnet_value").fetchall()
    assert {name for (name,) in studies} == {
        f"mlp/{name}/{seed}" for name in names for seed in (0, 1)
    }
    assert len(made) == 4 * 2 * 25
    assert len(measured) == len(set(made)) < len(made), "no subnet is validated twice"
    assert run(example, cwd=tmp_path) == told, "a second call reads it back"


def test_two_settings_are_searched_and_each_front_is_measured_under_the_other(
    tmp_path: Path,
) -> None:
    example = EXAMPLES / "hardware_specialisation.py"
    told = run(example, "--smoke", cwd=tmp_path)
    output = tmp_path / "demo_output" / "smoke"
    assert (output / "hardware_fronts.png").stat().st_size > 10_000
    table = [line for line in told.splitlines() if re.search(r"\d\.\d{3} \(\d", line)]
    assert len(table) == 2, told
    shares = [[float(x) for x in re.findall(r"(\d\.\d{3}) \(", line)] for line in table]
    assert all(len(row) == 2 and all(0 <= share <= 1 for share in row) for row in shares)
    assert told.count("of the square\n") == told.count("time at equal accuracy (") == 2
    with sqlite3.connect(output / "hardware.db") as connection:
        studies = connection.execute("SELECT name FROM subnet_study").fetchall()
        made = connection.execute("SELECT key FROM subnet_evaluation").fetchall()
        accuracies = connection.execute(
            "SELECT key FROM subnet_value WHERE fingerprint LIKE 'val_acc%'"
        ).fetchall()
    assert len(studies) == 2 * 2, "two seeds, two settings"
    assert len(accuracies) == len(set(made)) < len(made), "settings and seeds share accuracies"


@pytest.mark.skipif(not (DATA / "cifar10_resnet").is_dir(), reason=f"no ResNet-56 in {DATA}")
def test_a_network_that_nobody_trained_as_a_super_network(tmp_path: Path) -> None:
    told = run(EXAMPLES / "bring_your_own.py", "--smoke", cwd=tmp_path)
    result = SearchResult.load(tmp_path / "byo_output" / "result.json")
    assert len(result.history) == 10
    assert result.history.space.size == 2**24
    whole = result.history[0].values
    assert whole["val_acc"] > 0.88  # 93.39 % on all of the test images
    skipping = [e for e in result.history if e.subnet != result.history.space.largest]
    assert all(e.values["latency_ms"] < whole["latency_ms"] for e in skipping)
    assert "The whole network: 24 of 24 blocks" in told

    # The winner, trained on: of images that the search did not see.
    assert "Of 475 images that the search did not see" in told
    shares = dict(re.findall(r"  (the w.*): (\d+\.\d)%", told))
    whole_, winner, after = (float(shares[name]) for name in (
        "the whole network", "the winner", "the winner after fine-tuning"
    ))  # fmt: skip
    assert whole_ > 90
    assert after > winner > 50
    kept = int(re.findall(r"latency: (\d+) of 24 blocks", told)[0])
    state = torch.load(tmp_path / "byo_output" / "best.pt", weights_only=True)
    assert len({name.split(".conv")[0] for name in state if ".conv" in name}) == 3 + kept < 27


@pytest.mark.skipif(not (DATA / "cifar10_small.npz").is_file(), reason=f"no CIFAR-10 in {DATA}")
def test_an_image_classifier_is_searched_for_its_accuracy_and_its_macs(tmp_path: Path) -> None:
    told = run(EXAMPLES / "images.py", "--smoke", cwd=tmp_path)
    output = tmp_path / "images_output" / "smoke"
    result = SearchResult.load(output / "result.json")
    assert len(result.history) == 13
    assert all(e.ok for e in result.history)
    assert all(0 <= e.values["val_acc"] <= 1 for e in result.history)
    macs = [e.values["macs"] for e in result.history]
    assert max(macs) == macs[0]
    smallest = result.history[macs.index(min(macs))]
    assert smallest.values["latency_ms"] < result.history[0].values["latency_ms"]
    plain = torch.load(output / "best.pt", weights_only=False)
    assert plain(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert len(re.findall(r"in the search, \d+\.\d% of 100 other images", told)) == 2
    assert (output / "front.png").stat().st_size > 10_000
    again = run(EXAMPLES / "images.py", "--smoke", cwd=tmp_path)
    assert "goes on after 13 evaluations" in again
    assert again[again.index("\nLargest") :] == told[told.index("\nLargest") :]


def test_images_are_shifted_and_mirrored_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    augmented = importlib.import_module("images").augmented
    torch.manual_seed(0)
    x, y = torch.rand(200, 3, 32, 32), torch.arange(200)
    changed, classes = augmented(list(zip(x, y, strict=True)))
    assert torch.equal(classes, y)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    seen = set()
    for i in range(200):
        fits = [
            (down, right, mirrored)
            for down in range(9)
            for right in range(9)
            for mirrored in (False, True)
            if torch.equal(
                changed[i].flip(-1) if mirrored else changed[i],
                padded[i, :, down : down + 32, right : right + 32],
            )
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len({(down, right) for down, right, _ in seen}) > 60  # of 81
    assert {mirrored for *_, mirrored in seen} == {False, True}


@pytest.fixture
def byo(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not (DATA / "cifar10_resnet").is_dir():
        pytest.skip(f"no ResNet-56 in {DATA}")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("bring_your_own")


def test_training_images_are_cropped_on_black_and_mirrored_before_they_are_normalised(
    byo: Any,
) -> None:
    torch.manual_seed(0)
    x, y = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8), torch.arange(200)
    changed, classes = byo.as_trained(list(zip(x, y, strict=True)))
    assert torch.equal(classes, y)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    black = torch.zeros(3, 40, 40)
    seen = set()
    for i in range(200):
        padded = black.clone()
        padded[:, 4:36, 4:36] = x[i] / 255
        whole = (padded - mean) / std
        fits = [
            (down, right, mirrored)
            for down in range(9)
            for right in range(9)
            for mirrored in (False, True)
            if torch.allclose(
                changed[i].flip(-1) if mirrored else changed[i],
                whole[:, down : down + 32, right : right + 32],
                atol=1e-6,
            )
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len({(down, right) for down, right, _ in seen}) > 60  # of 81
    assert {mirrored for *_, mirrored in seen} == {False, True}


def test_every_search_recalibrates_on_the_same_crops(byo: Any) -> None:
    model = byo.LitClassifier(byo.searchable(byo.pretrained(DATA)))

    def calibration(seed: int, collate: Any) -> str:
        data = byo.Cifar10(100, DATA)
        loader = data.train_dataloader
        data.train_dataloader = lambda: DataLoader(
            loader().dataset, batch_size=128, shuffle=True, collate_fn=collate
        )
        torch.manual_seed(seed)  # a search draws its batches under a seed of its own
        with TrainerEvaluator(model, Source(data, calibration_images=256)) as evaluator:
            return evaluator.provenance["calibration"]

    def plain(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return byo.normalised(x), y

    first = calibration(1, byo.as_trained)
    assert calibration(2, byo.as_trained) == first
    assert calibration(1, plain) != first


def test_a_translator_is_searched_for_its_bleu_and_its_latency(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("sentencepiece")
    if not (DATA / "multi30k").is_dir():
        pytest.skip(f"no Multi30k in {DATA}")
    told = run(EXAMPLES / "translate.py", "--smoke", cwd=tmp_path)
    result = SearchResult.load(tmp_path / "translate_output" / "result.json")
    assert len(result.history) == 13
    assert all(e.ok for e in result.history)
    assert all(0 <= e.values["val_bleu"] <= 100 for e in result.history)
    space = result.history.space
    smallest = next(e for e in result.history if e.subnet["dec_depth"] == 1)
    assert result.history[0].subnet == space.largest
    assert smallest.values["latency_ms"] < result.history[0].values["latency_ms"]
    assert "BLEU in the search" in told
    assert (tmp_path / "translate_output" / "front.png").stat().st_size > 10_000


def test_a_language_model_is_searched_for_its_perplexity_and_its_macs(tmp_path: Path) -> None:
    if not (DATA / "tinyshakespeare.txt").is_file():
        pytest.skip(f"no tinyshakespeare in {DATA}")
    told = run(EXAMPLES / "language_model.py", "--smoke", cwd=tmp_path)
    result = SearchResult.load(tmp_path / "language_output" / "result.json")
    assert len(result.history) == 13
    assert all(1 < e.values["perplexity"] < 65 for e in result.history)  # 65 characters
    assert max(e.values["macs"] for e in result.history) == result.history[0].values["macs"]
    assert "\nROMEO:" in told
    assert (tmp_path / "language_output" / "front.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["bring_your_own", "images", "language_model", "translate"])
def test_without_its_data_an_example_says_so_and_does_nothing(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--smoke"],
        cwd=tmp_path,
        env={**os.environ, "LIGHTNING_SUBNET_DATA": str(tmp_path / "nowhere")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "set LIGHTNING_SUBNET_DATA. Nothing was done." in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pretrained_network_is_made_elastic_and_its_winner_is_a_file(tmp_path: Path) -> None:
    if not (DATA / "cifar10_resnet").is_dir():
        pytest.skip(f"no ResNet-20 in {DATA}")
    text = run(EXAMPLES / "compress_pretrained.py", "--smoke", cwd=tmp_path)
    assert "ResNet: 16 elastic choices" in text
    times = [float(x) for x in re.findall(r"the (?:whole network|winner): .* ([\d.]+) ms", text)]
    assert len(times) == 2
    assert times[1] <= times[0]
    for name in ("network.onnx", "winner.onnx", "front.png", "result.json"):
        assert (tmp_path / "compress_output" / name).stat().st_size > 1000, name
