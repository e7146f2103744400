# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks count with: curves, squares, exact measures, and rows on disk."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import benchmarks
from benchmarks import calibration, resnet56, search_efficiency, supernets, training
from benchmarks.curves import from_text, to_text
from benchmarks.data import data_folder
from benchmarks.efficiency_runs import settings_hash, strategy_of
from benchmarks.problems import in_square
from benchmarks.search_efficiency import Run, search
from lightning_subnet import recalibrate
from lightning_subnet.errors import SearchError
from lightning_subnet.study import pareto


def has_data() -> bool:
    try:
        return data_folder().is_dir()
    except SearchError:
        return False


needs_data = pytest.mark.skipif(not has_data(), reason="no measured data: LIGHTNING_SUBNET_DATA")


def test_every_benchmark_can_be_imported() -> None:
    names = [f"benchmarks.{m.name}" for m in pkgutil.iter_modules(benchmarks.__path__)]
    assert len(names) > 10
    for name in names:
        importlib.import_module(name)


def test_a_curve_survives_its_text() -> None:
    curve = pareto.hypervolumes(np.random.default_rng(0).uniform(size=(200, 2)), [1, 1])
    again = from_text(to_text(curve), len(curve))
    np.testing.assert_allclose(again, curve, atol=5.1e-6)
    assert from_text("", 3).tolist() == [0, 0, 0]


def test_the_square_flips_what_is_maximised() -> None:
    columns = {"top1": np.array([78.0, 70.0]), "macs": np.array([5.6, 1.2])}
    bounds = {"top1": (78.0, 70.0), "macs": (1.2, 5.6)}
    unit = in_square(columns, {"top1": "max", "macs": "min"}, bounds)
    assert unit.tolist() == [[0, 1], [1, 0]]


@needs_data
def test_exact_flops_are_those_of_the_table() -> None:
    problem = search_efficiency.problem_of("macro")
    X = problem.space.sample_indices(200, 0)
    (flops,) = problem.measures
    np.testing.assert_array_equal(flops.evaluate(problem.space, X)[0], problem.values(X)["flops"])
    subnet = problem.space.from_indices(X[:1])[0]
    assert problem.evaluator.evaluate(subnet) == {k: v[0] for k, v in problem.values(X).items()}


@needs_data
def test_a_pool_problem_answers_for_its_members_only() -> None:
    problem = search_efficiency.problem_of("hwgpt-a100")
    assert problem.space.size == 10_000
    unit = problem.unit(problem.space.sample_indices(10_000, 0))
    assert pareto.hypervolume(unit, [1.0, 1.0]) == pytest.approx(problem.true_hypervolume)


@needs_data
def test_a_run_that_was_stopped_goes_on_and_gives_the_same_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_efficiency, "SCRATCH", tmp_path / "one")
    whole = search(Run("macro", "nsga2", 3, 120))
    monkeypatch.setattr(search_efficiency, "SCRATCH", tmp_path / "two")
    search(Run("macro", "nsga2", 3, 70))
    assert search(Run("macro", "nsga2", 3, 120)) == whole
    assert whole["validations"] == 120


def test_rows_of_equal_keys_are_replaced_and_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_efficiency, "SCRATCH", tmp_path)
    path = tmp_path / "rows.csv"
    for seed, value in ((2, "a"), (10, "b"), (1, "c"), (2, "d")):
        row = pd.DataFrame([{"settings": "007", "seed": seed, "hv@50": "0.10", "value": value}])
        search_efficiency.write(path, row, ["settings", "seed"])
    assert path.read_text().splitlines()[1:] == ["007,1,0.10,c", "007,2,0.10,d", "007,10,0.10,b"]


def test_statistics_are_renewed_on_ever_more_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SIZES", (4, 8, 16, 32))
    monkeypatch.setattr(calibration, "BATCH", 8)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4),
    )  # fmt: skip
    images = torch.randn(40, 3, 8, 8)
    states = {
        n: {name: value.clone() for name, value in net.state_dict().items()}
        for n, _ in calibration.statistics(net, images)
    }
    assert [*states] == [4, 8, 16, 32]
    for n, state in states.items():
        recalibrate(net, images[:n].split(8))
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(state[name], value)


@needs_data
def test_blocks_of_the_resnet56_are_skipped_as_the_labels_say() -> None:
    case = calibration.case_of("resnet56")
    for label, subnet in case.subnets.items():
        skipped = 0 if label == calibration.WHOLE else int(label.split()[0])
        assert sum(subnet.values()) == 24 - skipped
    assert len({subnet.key for subnet in case.subnets.values()}) == 16
    assert case.known.mean() == pytest.approx(0.9339, abs=0.01)  # of all test images: its authors


@needs_data
@pytest.mark.slow
def test_the_whole_resnet56_scores_in_fit_as_its_own_statistics_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resnet56, "SCRATCH", tmp_path)
    model, data = resnet56.model_and_data()
    data.setup("fit")
    x, y = data.val.tensors
    with torch.no_grad():
        answers = torch.cat([model.eval()(part).argmax(1) for part in x.split(250)])
    own = (answers == y).float().mean().item()
    result = resnet56.fit("macs", "random", 0, 1, (model, data))
    assert result.history[0].subnet == result.history.space.largest
    assert result.history[0].values["val_acc"] == pytest.approx(own, abs=0.003)


def test_hypervolumes_of_another_recalibration_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_csv(resnet56.OUT, dtype=str, keep_default_na=False)
    assert set(frame.recalibrated) <= {"256 plain", resnet56.RECALIBRATED}
    frame = frame[frame.strategy == "hybrid"].head(1)
    frame["settings"] = settings_hash(strategy_of("hybrid", "resnet56"))
    monkeypatch.setattr(resnet56, "OUT", tmp_path / "rows.csv")
    for recalibrated, shown in ((resnet56.RECALIBRATED, True), ("256 plain", False)):
        frame.assign(recalibrated=recalibrated).to_csv(resnet56.OUT, index=False)
        resnet56.report(100)
        assert ("hybrid" in capsys.readouterr().out) is shown


def test_settings_are_part_of_a_run() -> None:
    hashes = {settings_hash(strategy_of(label, "macro")) for label in ("random", "nsga2", "linas")}
    assert len(hashes) == 3
    assert settings_hash(strategy_of("linas", "macro")) != settings_hash(
        type(strategy_of("linas", "macro"))(population=20)
    )


def test_the_rules_of_training_pass_equally_many_samples() -> None:
    found = training.rules(0, 64, 5)
    for sampling, images, epochs in found.values():
        per_step = sampling.n_random + 2 * (sampling.rule == "sandwich")
        assert per_step * epochs == 4 * 5  # passes through the training data
        assert images / epochs in {64 / 5, 16 / 5, 64 / 20}
    steps = {label: epochs / images for label, (_, images, epochs) in found.items()}
    assert steps["sandwich + distillation"] == steps["four random"]
    assert steps["sandwich + distillation, 16 images"] == steps["one random"]


@needs_data
@pytest.mark.slow
@pytest.mark.filterwarnings("error:Found .* in eval mode", "ignore:.*LeafSpec")
def test_super_networks_are_compared_with_their_subnets_and_nothing_is_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supernets, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(supernets, "ALONE", alone := tmp_path / "alone.csv")
    monkeypatch.setattr(supernets, "RULES", rules := tmp_path / "rules.csv")
    keys = supernets.KEYS.values()
    monkeypatch.setattr(supernets, "KEYS", dict(zip([rules, alone], keys, strict=True)))
    monkeypatch.setattr(search_efficiency, "SCRATCH", tmp_path)
    monkeypatch.setattr(supernets, "VALIDATED", 100)
    supernets.alone(supernets.TURNS, 0, 1, 200, 13)
    whole = alone.read_text()
    frame = pd.read_csv(alone)
    assert frame.place.tolist() == [0, 1, 2, 3, 4]
    assert frame.macs.is_monotonic_increasing
    assert frame.searched.is_monotonic_increasing, "a front"
    assert frame[["shared", "alone"]].apply(lambda c: c.between(0, 1)).all(axis=None)
    assert pd.read_csv(rules).training.tolist() == ["turns + distillation + labels, 32 images"]
    assert pd.read_csv(rules).steps.tolist() == [2 * (200 // 32)], "two epochs of 32 images"

    lines = whole.splitlines(keepends=True)
    alone.write_text("".join([*lines[:2], *lines[3:]]))  # one row is lost, and made again
    supernets.alone(supernets.TURNS, 0, 1, 200, 13)
    again = pd.read_csv(alone)
    same = ["place", "macs", "searched", "shared", "alone"]
    pd.testing.assert_frame_equal(again[same], frame[same])
    supernets.report(200, 1)
    told = capsys.readouterr().out
    assert "shared - alone" in told
    assert "Accuracy by rule" in told
