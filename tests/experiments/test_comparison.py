# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import numpy as np
import pytest
from scipy.stats import wilcoxon

from lightning_subnet import FunctionEvaluator, Subnet, SubnetSearch, compare
from lightning_subnet.errors import MeasurementError, ObjectiveError, SearchError, StrategyError
from lightning_subnet.experiments import Comparison
from lightning_subnet.strategies import NSGA2, RandomSearch
from lightning_subnet.study import pareto
from tests.networks import Digits, LitMlp, quiet_trainer
from tests.problems import (
    ROOT,
    Counting,
    assert_clear,
    conditional,
    cost,
    grid,
    objectives_of,
    record,
    search_of,
)

mpl.use("Agg")

BOTH: dict[str, Any] = {"uniform": RandomSearch(batch_size=4), "evolution": NSGA2(population=6)}


def compared(strategies: Any = None, evaluator: Any = None, **more: Any) -> Comparison:
    search = more.pop("search", None) or search_of(space=conditional())
    options = {"budget": 20, "seeds": range(3), **more}
    return compare(strategies or BOTH, search, evaluator=evaluator or Counting(), **options)


def test_every_strategy_runs_with_every_seed() -> None:
    table = compared()
    assert table.labels == ["uniform", "evolution"]
    assert table.seeds == [0, 1, 2]
    assert list(table.results) == [(label, seed) for seed in range(3) for label in BOTH]
    assert all(len(result.history) == 20 for result in table.results.values())


def test_a_run_is_the_search_with_that_strategy_and_seed() -> None:
    table = compared()
    alone = search_of(space=conditional(), strategy=BOTH["evolution"], seed=2, budget=20)
    assert record(table.results["evolution", 2].history) == record(
        alone.run(Counting(), progress=False).history
    )


def test_curves_are_hypervolumes_after_each_evaluation() -> None:
    bounds = {"f0": (0.0, 10.0), "f1": (0.0, 10.0)}
    table = compared(bounds=bounds)
    for label, curves in table.curves.items():
        assert curves.shape == (3, 20)
        assert (np.diff(curves, axis=1) >= 0).all()
        F = table.results[label, 1].minimised() / 10
        for k in (1, 7, 20):
            assert curves[1, k - 1] == pytest.approx(pareto.hypervolume(F[:k], [1, 1]))


def test_bounds_may_be_of_maximised_objectives() -> None:
    search = search_of(space=conditional(), objectives={"f0": "min", "f1": "max"})
    table = compared(search=search, bounds={"f0": (0.0, 10.0), "f1": (10.0, 0.0)})
    final = table.curves["uniform"][0, -1]
    F = table.results["uniform", 0].minimised()
    assert final == pytest.approx(pareto.hypervolume((F - [0, -10]) / 10, [1, 1]))
    assert 0 < final < 1


def test_by_default_the_unit_is_the_range_of_everything_measured() -> None:
    curves = compared().curves
    assert all((c >= 0).all() and (c <= 1.21 + 1e-9).all() for c in curves.values())
    assert max(c.max() for c in curves.values()) > 0.3


def test_failed_and_infeasible_evaluations_add_nothing() -> None:
    def sometimes(subnet: Subnet) -> dict[str, float]:
        if subnet["depth"] == 4:
            msg = "broken"
            raise RuntimeError(msg)
        return Counting().evaluate(subnet)

    table = compared(
        evaluator=FunctionEvaluator(sometimes),
        search=search_of(space=conditional(), constraints={"f1": "<= 4"}),
        bounds={"f0": (0.0, 10.0), "f1": (0.0, 10.0)},
    )
    result = table.results["uniform", 0]
    good = [e for e in result.history if e.ok and e.values["f1"] <= 4]
    F = np.array([[e.values["f0"], e.values["f1"]] for e in good]) / 10
    assert 0 < len(good) < 20
    assert table.curves["uniform"][0, -1] == pytest.approx(pareto.hypervolume(F, [1, 1]))


def test_a_curve_of_an_exhausted_space_stays_where_it_is() -> None:
    table = compared(search=search_of(space=grid()), budget=40)
    for curves in table.curves.values():
        assert curves.shape == (3, 40)
        assert (curves[:, 24:] == curves[:, 24:25]).all()
        np.testing.assert_allclose(curves[:, -1], curves[0, -1])


def test_the_data_frame_has_a_row_an_evaluation() -> None:
    frame = compared().to_dataframe()
    assert len(frame) == 2 * 3 * 20
    assert list(frame.columns[:4]) == ["strategy", "seed", "hypervolume", "number"]
    row = frame[(frame.strategy == "evolution") & (frame.seed == 1) & (frame.number == 19)]
    assert row["hypervolume"].item() == compared().curves["evolution"][1, -1]


def test_the_summary_has_a_row_a_strategy() -> None:
    table = compared()
    summary = table.summary()
    assert summary.index.tolist() == ["uniform", "evolution"]
    assert summary.columns.tolist() == ["hv@4", "hv@8", "hv@20"]
    median = np.median(table.curves["evolution"][:, 7])
    assert summary.loc["evolution", "hv@8"].startswith(f"{median:.3f} (")
    assert table.summary(at=[5]).columns.tolist() == ["hv@5"]


def test_the_plot_has_a_line_a_strategy() -> None:
    import matplotlib.pyplot as plt

    figure, ax = compared().plot_hypervolume()
    assert ax.figure is figure
    assert {line.get_label() for line in ax.get_lines()} == {"uniform", "evolution"}
    assert "evaluations" in ax.get_xlabel()
    plt.close("all")


@pytest.mark.parametrize("m", [1, 3, 4])
def test_any_number_of_objectives(m: int) -> None:
    search = search_of(space=grid(3, 4), objectives={f"f{k}": "min" for k in range(m)})
    table = compared(["random", "u-nsga3", "sms-emoa"], Counting(m), search=search, seeds=[0])
    assert table.labels == ["random", "u-nsga3", "sms-emoa"]
    assert all(np.isfinite(c).all() and c[0, -1] > 0 for c in table.curves.values())


def test_exact_measures_alone_need_no_evaluator() -> None:
    search = search_of(objectives={"cost": "min"}, measures=[cost])
    table = compare(["random"], search, budget=5, seeds=[0])
    assert len(table.results["random", 0].history) == 5


# Resuming and sharing


class Interrupted(Counting):
    """Is interrupted at one of its calls, as by Ctrl-C."""

    def __init__(self, at: int, **options: Any) -> None:
        super().__init__(**options)
        self._at = at

    def evaluate(self, subnet: Subnet) -> Any:
        if len(self.calls) == self._at:
            raise KeyboardInterrupt
        return super().evaluate(subnet)


@pytest.mark.parametrize("fingerprint", [None, "w"])
def test_an_interrupted_comparison_goes_on_and_measures_nothing_twice(
    tmp_path: Path, fingerprint: str | None
) -> None:
    storage = f"sqlite:///{tmp_path}/c.db"
    first = Interrupted(at=50, fingerprint=fingerprint)
    with pytest.raises(KeyboardInterrupt):
        compared(evaluator=first, storage=storage)
    second = Counting(fingerprint=fingerprint)
    table = compared(evaluator=second, storage=storage)
    uninterrupted = Counting(fingerprint=fingerprint)
    whole = compared(evaluator=uninterrupted)
    assert first.calls + second.calls == uninterrupted.calls
    for key, result in table.results.items():
        assert record(result.history) == record(whole.results[key].history)


def test_a_finished_comparison_is_read_back(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/c.db"
    table = compared(storage=storage)
    again = compared(storage=storage, evaluator=Interrupted(at=0))  # it must not be called
    assert again.to_dataframe().equals(table.to_dataframe())


def test_more_strategies_seeds_or_budget_measure_only_what_is_new(tmp_path: Path) -> None:
    storage, counts = f"sqlite:///{tmp_path}/c.db", []
    grown: list[dict[str, Any]] = [
        {"strategies": {"evolution": BOTH["evolution"]}, "seeds": [1]},
        {"seeds": [1]},
        {"seeds": [0, 1]},
        {"seeds": [0, 1], "budget": 25},
        {"seeds": [1], "budget": 10},
    ]
    for more in grown:
        evaluator = Counting()
        table = compared(evaluator=evaluator, storage=storage, **more)
        counts.append(len(evaluator.calls))
    assert counts == [20, 20, 40, 20, 0]
    fresh = compared(seeds=[1], budget=25)
    for key, result in table.results.items():
        assert record(result.history) == record(fresh.results[key].history)
    assert all(c.shape == (1, 10) for c in table.curves.values())


def test_values_of_equal_fingerprint_are_measured_once_for_all_runs(tmp_path: Path) -> None:
    evaluator = Counting(fingerprint="w")
    table = compared(evaluator=evaluator, storage=f"sqlite:///{tmp_path}/c.db")
    measured = {e.subnet for result in table.results.values() for e in result.history}
    assert len(evaluator.calls) == len(set(evaluator.calls)) == len(measured) < 120
    assert all(len(result.history) == 20 for result in table.results.values()), "and all count"


@pytest.mark.parametrize("fingerprint", [None, "w"])
def test_the_order_of_strategies_changes_no_result(fingerprint: str | None) -> None:
    table = compared(evaluator=Counting(fingerprint=fingerprint))
    backwards = compared(
        dict(reversed(BOTH.items())), Counting(fingerprint=fingerprint), seeds=[2, 1, 0]
    )
    assert backwards.labels == table.labels[::-1]
    for key, result in table.results.items():
        other = backwards.results[key].history
        assert [(e.subnet, e.values) for e in result.history] == [
            (e.subnet, e.values) for e in other
        ]
    for label, curve in table.curves.items():
        np.testing.assert_array_equal(backwards.curves[label], curve[::-1])


# Runs that fail


class Singular(RandomSearch):
    """Fails as a predictor does, once there is something to learn from."""

    def propose(self, problem: Any, history: Any, n: int, rng: Any, pending: Any = ()) -> Any:
        if len(history):
            np.linalg.inv(np.zeros((2, 2)))
        return super().propose(problem, history, n, rng, pending)


def test_a_run_that_fails_loses_no_other_run(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/c.db"
    evaluator = Counting()
    three = {**BOTH, "mine": Singular(batch_size=4)}
    with pytest.raises(SearchError) as caught:
        compared(three, evaluator, storage=storage, seeds=[5, 6])
    assert_clear(
        caught.value, "The run of 'mine' with seed 5 failed", "LinAlgError: Singular matrix",
        "2 runs before it are in the storage",
    )  # fmt: skip
    assert isinstance(caught.value.__cause__, np.linalg.LinAlgError)
    assert len(evaluator.calls) == 20 + 20 + 4
    mended = {**BOTH, "mine": RandomSearch(batch_size=4)}
    table = compared(mended, evaluator, storage=storage, seeds=[5, 6])
    assert len(evaluator.calls) == 6 * 20
    fresh = compared(mended, seeds=[5, 6])
    assert (
        table.to_dataframe()
        .drop(columns="seconds")
        .equals(fresh.to_dataframe().drop(columns="seconds"))
    )


def test_errors_of_the_package_keep_their_class_and_say_where() -> None:
    evaluator = FunctionEvaluator(lambda subnet: {"f0": objectives_of(subnet)["f0"]})
    with pytest.raises(MeasurementError) as caught:
        compared(evaluator=evaluator)
    assert_clear(caught.value, "There is no 'f1'")
    (note,) = caught.value.__notes__
    assert_clear(note, "The run of 'uniform' with seed 0 failed", "give storage=")


# Progress


def test_nothing_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    compared(seeds=[0])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("progress", [True, False])
def test_a_terminal_shows_a_bar_for_each_run(progress: bool) -> None:
    program = (
        "from lightning_subnet import compare\n"
        "from tests.problems import Counting, search_of\n"
        "compare(['random', 'nsga2'], search_of(), evaluator=Counting(), budget=5, seeds=[0, 3],"
        f" progress={progress})\n"
    )
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=follower, stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "120", "TERM": "xterm"}, text=True, check=False,
    )  # fmt: skip
    os.close(follower)
    os.set_blocking(leader, False)
    shown = b""
    try:
        while part := os.read(leader, 65536):
            shown += part
    except (BlockingIOError, OSError):  # nothing is left
        pass
    os.close(leader)
    assert done.returncode == 0, done.stderr
    runs = [f"compare/{label}/{seed}" for seed in (0, 3) for label in ("random", "nsga2")]
    assert [name in shown.decode() for name in runs] == [progress] * 4
    assert shown.decode().count("5/5") >= 4 * progress


# Statistics and surfaces


def test_evaluations_to_a_target_are_those_of_the_curves() -> None:
    table = compared(seeds=range(5))
    frame = table.evaluations_to("uniform@15")
    assert frame.index.tolist() == ["uniform", "evolution"]
    target = np.median(table.curves["uniform"][:, 14])
    assert frame.attrs["target"] == target
    for label, row in frame.iterrows():
        firsts = [
            next((i + 1 for i, v in enumerate(curve) if v >= target), np.inf)
            for curve in table.curves[label]
        ]
        assert row["median"] == np.median(firsts)
        assert row["low"] <= row["median"] <= row["high"]
        assert row["reached"] == np.isfinite(firsts).sum()
        assert row["seeds"] == 5
    assert frame.loc["uniform", "reached"] >= 3
    assert table.evaluations_to(target).equals(frame)


@pytest.mark.parametrize("n", [3, 4, 6])
def test_a_strategy_reaches_its_own_median_in_time(n: int) -> None:
    table = compared(seeds=range(n))
    for label in table.labels:
        assert table.evaluations_to(f"{label}@15").loc[label, "median"] <= 15


def test_a_target_that_nobody_reaches_takes_infinitely_many() -> None:
    table = compared()
    frame = table.evaluations_to(1.3)
    assert frame["reached"].tolist() == [0, 0]
    assert np.isinf(frame[["median", "low", "high"]]).all(axis=None)
    assert "inf" in str(frame)
    assert table.summary(target=1.3)["evaluations to 1.3"].tolist() == ["inf", "inf"]


def test_the_summary_may_have_a_target() -> None:
    table = compared()
    summary = table.summary(at=[20], target="uniform@20")
    assert summary.columns.tolist() == ["hv@20", "evaluations to uniform@20"]
    median = table.evaluations_to("uniform@20")["median"]
    assert summary["evaluations to uniform@20"].tolist() == [f"{m:g}" for m in median]


def test_paired_differences_are_by_seed() -> None:
    table = compared(seeds=range(8))
    frame = table.paired(at=[10, 20])
    assert frame[["strategy", "at"]].to_numpy().tolist() == [["evolution", 10], ["evolution", 20]]
    d = table.curves["evolution"][:, 19] - table.curves["uniform"][:, 19]
    last = frame.iloc[1]
    assert last["median"] == np.median(d)
    assert last["mean"] == pytest.approx(d.mean())
    assert (last["better"], last["worse"]) == ((d > 0).sum(), (d < 0).sum())
    assert (
        last["p"]
        == last["p_holm"]
        == pytest.approx(
            wilcoxon(d.round(12)).pvalue  # two differences are equal but for rounding
        )
    )
    other = table.paired("evolution", at=[20]).iloc[0]
    assert other["strategy"] == "uniform"
    assert (other["median"], other["p"]) == (-last["median"], last["p"])
    assert (other["low"], other["high"]) == (-last["high"], -last["low"])


def test_a_strategy_does_not_differ_from_itself() -> None:
    same = {name: RandomSearch(batch_size=4) for name in ("one", "two", "three")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = compared(same, seeds=[0, 1]).paired()
    assert frame["at"].tolist() == [20, 20]
    columns = ["median", "low", "high", "mean", "better", "worse"]
    assert (frame[columns] == 0).all(axis=None)
    assert (frame[["p", "p_holm"]] == 1).all(axis=None)


def test_by_default_pairs_are_looked_at_where_the_budget_goes() -> None:
    budgets = {40: [40], 50: [50], 60: [50, 60], 110: [50, 100, 110]}
    for budget, expected in budgets.items():
        table = compared(seeds=[0, 1], budget=budget)
        assert table.paired()["at"].tolist() == expected


def test_surfaces_are_what_so_many_seeds_attain_in_the_users_units() -> None:
    search = search_of(space=conditional(), objectives={"f0": "min", "f1": "max"})
    table = compared(search=search, seeds=range(4))
    frame = table.attainment([0.5, 1.0], at=12)
    assert frame.columns.tolist() == ["strategy", "level", "f0", "f1"]
    for row in frame.itertuples():
        runs = [table.results[row.strategy, seed].history[:12] for seed in range(4)]
        having = [
            any(e.values["f0"] <= row.f0 and e.values["f1"] >= row.f1 for e in run) for run in runs
        ]
        assert sum(having) >= 4 * row.level
        better = [
            any(e.values["f0"] < row.f0 and e.values["f1"] > row.f1 for e in run) for run in runs
        ]
        assert sum(better) < 4 * row.level, "it is a bound"
    assert set(frame["strategy"]) == set(BOTH)
    assert set(frame["level"]) == {0.5, 1.0}


def test_infeasible_evaluations_attain_nothing() -> None:
    search = search_of(space=conditional(), constraints={"f1": "<= 2"})
    frame = compared(search=search).attainment()
    assert len(frame) > 0
    assert (frame["f1"] <= 2).all()


def test_surfaces_are_for_two_objectives() -> None:
    search = search_of(space=grid(3, 4), objectives={f"f{k}": "min" for k in range(3)})
    table = compared(evaluator=Counting(3), search=search, seeds=[0])
    for call in (table.attainment, table.plot_attainment):
        with pytest.raises(SearchError) as caught:
            call()
        assert_clear(caught.value, "two objectives", "has 3")


# Pictures


def test_the_drawn_curve_is_the_median_and_has_its_name_beside_it() -> None:
    table = compared(budget=12)
    _, ax = table.plot_hypervolume()
    for line in ax.get_lines():
        np.testing.assert_allclose(
            line.get_ydata(), np.median(table.curves[line.get_label()], axis=0)
        )
    named = {text.get_text(): text for text in ax.texts}
    assert set(named) == {"uniform", "evolution"}
    assert all(named[x.get_label()].get_color() == x.get_color() for x in ax.get_lines())


def test_names_of_equal_curves_do_not_overlap() -> None:
    same = {f"random {i}": RandomSearch(batch_size=4) for i in range(9)}
    figure, ax = compared(same, seeds=[0], budget=8).plot_hypervolume()
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.get_lines()}
    assert len(looks) == 9
    assert all(box.y0 > 0 and box.x1 < figure.bbox.x1 for box in boxes), "inside of the picture"


def test_a_bootstrap_band_and_a_true_front() -> None:
    table = compared(bounds={"f0": (0.0, 10.0), "f1": (0.0, 10.0)})
    best = max(curve.max() for curve in table.curves.values())
    _, ax = table.plot_hypervolume(band="bootstrap", true=best)
    assert ax.get_yscale() == "log"
    assert "bootstrap" in ax.get_title()
    (line,) = [line for line in ax.get_lines() if line.get_label() == "uniform"]
    expected = 1 - np.median(table.curves["uniform"], axis=0) / best
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_the_drawn_surface_goes_through_its_corners() -> None:
    search = search_of(space=conditional(), objectives={"f0": "min", "f1": "max"})
    table = compared(search=search, seeds=range(4))
    frame = table.attainment([0.5])
    figure, ax = table.plot_attainment()
    figure.canvas.draw()
    for line in ax.get_lines():
        corners = frame.loc[frame["strategy"] == line.get_label(), ["f1", "f0"]]
        drawn = {(round(x, 9), round(y, 9)) for x, y in zip(*line.get_data(), strict=True)}
        assert {(round(x, 9), round(y, 9)) for x, y in corners.to_numpy()} <= drawn
    assert ax.get_xlabel() == "f1 (more is better)"
    assert ax.get_ylabel() == "f0 (less is better)"
    assert "25%, 50%, 75% of 4 seeds after 20 evaluations" in ax.get_title()


# Over a model and bad input


def test_over_a_model_no_subnet_is_validated_twice() -> None:
    L.seed_everything(0, verbose=False)
    model = LitMlp()
    search = SubnetSearch(
        objectives={"val_acc": "max", "macs": "min"}, storage=None, trainer=quiet_trainer()
    )
    strategies = {"uniform": RandomSearch(batch_size=4), "evolution": NSGA2(population=4)}
    table = compare(strategies, search, model=model, datamodule=Digits(), budget=8, seeds=range(2))
    assert all(len(result.history) == 8 for result in table.results.values())
    distinct = {e.subnet for result in table.results.values() for e in result.history}
    # The first of all is scored twice, with another score in between.
    assert model.validated.n - 2 == len(distinct) <= 12
    values: dict[Subnet, set[float]] = {}
    for result in table.results.values():
        for e in result.history:
            values.setdefault(e.subnet, set()).add(e.values["val_acc"])
    assert all(len(same) == 1 for same in values.values())


def test_one_strategy_under_two_settings_needs_labels() -> None:
    with pytest.raises(SearchError) as caught:
        compared([NSGA2(population=5), NSGA2(population=9)])
    assert_clear(caught.value, "2 strategies under 1 labels", "{'label': strategy, ...}")


@pytest.mark.parametrize(
    ("given", "error", "part"),
    [
        ({"seeds": []}, SearchError, "0 seeds"),
        ({"strategies": []}, SearchError, "0 strategies"),
        ({"strategies": ["random", "nsga"]}, StrategyError, "Did you mean 'nsga2'?"),
        ({"budget": 0}, SearchError, "evaluations=0"),
        ({"seeds": [-1]}, SearchError, "seed=-1"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], error: Any, part: str) -> None:
    evaluator = Counting()
    options: dict[str, Any] = {"budget": 5, "seeds": [0], "strategies": ["random"], **given}
    strategies = options.pop("strategies")
    with pytest.raises(error) as caught:
        compare(strategies, search_of(), evaluator=evaluator, **options)
    assert_clear(caught.value, part)
    assert not evaluator.calls


def test_something_must_measure() -> None:
    for options in ({}, {"evaluator": Counting(), "model": object()}):
        with pytest.raises(SearchError) as caught:
            compare(["random"], search_of(), **options)
        assert_clear(caught.value, "evaluator=", "model=")


def test_bounds_of_every_objective_are_needed() -> None:
    with pytest.raises(SearchError) as caught:
        _ = compared(bounds={"f0": (0, 1)}).curves
    assert_clear(caught.value, "bounds= has no 'f1'", "(best, worst)")


def test_nothing_feasible_is_said() -> None:
    table = compared(search=search_of(space=conditional(), constraints={"f0": "<= -1"}))
    with pytest.raises(SearchError) as caught:
        table.summary()
    assert_clear(caught.value, "No run has a feasible evaluation")


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda t: t.summary(at=[0]), ["at=[0]", "1..20"]),
        (lambda t: t.paired(at=[21]), ["at=[21]", "1..20"]),
        (lambda t: t.paired(at=[2.5]), ["at=[2.5]"]),
        (lambda t: t.attainment(at=30), ["at=[30]", "1..20"]),
        (lambda t: t.paired("unifrom"), ["baseline='unifrom'", "Did you mean 'uniform'?"]),
        (lambda t: t.paired(confidence=2), ["confidence=2"]),
        (lambda t: t.evaluations_to("uniform"), ["'strategy@evaluations'"]),
        (lambda t: t.evaluations_to(0.5, confidence=95), ["confidence=95", "0.95"]),
        (lambda t: t.plot_hypervolume(band="iqr"), ["band='iqr'", "'quartiles' or 'bootstrap'"]),
        (lambda t: t.plot_hypervolume(true=0), ["true=0", "positive"]),
        (lambda t: t.attainment([25]), ["levels=", "25"]),
    ],
)
def test_bad_questions_are_refused(call: Any, parts: list[str]) -> None:
    with pytest.raises((SearchError, ObjectiveError)) as caught:
        call(compared(seeds=[0]))
    assert_clear(caught.value, *parts)


def test_one_strategy_has_no_pairs() -> None:
    with pytest.raises(SearchError) as caught:
        compared({"alone": RandomSearch(batch_size=4)}, seeds=[0]).paired()
    assert_clear(caught.value, "two strategies", "'alone'")
