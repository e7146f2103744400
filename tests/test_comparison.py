# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import numpy as np
import pytest

from lightning_subnet import (
    Comparison,
    FunctionEvaluator,
    Subnet,
    SubnetSearch,
    compare,
    pareto,
)
from lightning_subnet.errors import SearchError, StrategyError
from lightning_subnet.strategies import NSGA2, RandomSearch
from tests.networks import Digits, LitMlp, quiet_trainer
from tests.problems import Counting, assert_clear, conditional, cost, grid, record, search_of

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


def test_an_interrupted_comparison_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/c.db"

    class Once(Counting):
        def evaluate(self, subnet: Subnet) -> Any:
            if len(self.calls) == 50:
                raise KeyboardInterrupt
            return super().evaluate(subnet)

    first = Once()
    with pytest.raises(KeyboardInterrupt):
        compared(evaluator=first, storage=storage)
    second = Counting()
    table = compared(evaluator=second, storage=storage)
    assert len(first.calls) + len(second.calls) == 2 * 3 * 20
    whole = compared()
    for key, result in table.results.items():
        assert record(result.history) == record(whole.results[key].history)


def test_values_of_equal_fingerprint_are_measured_once_for_all_runs(tmp_path: Path) -> None:
    evaluator = Counting(fingerprint="w")
    table = compared(evaluator=evaluator, storage=f"sqlite:///{tmp_path}/c.db")
    measured = {e.subnet for result in table.results.values() for e in result.history}
    assert len(evaluator.calls) == len(set(evaluator.calls)) == len(measured) < 120
    assert all(len(result.history) == 20 for result in table.results.values()), "and all count"


# Bad input


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
    assert model.validations == len(distinct) <= 12
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
