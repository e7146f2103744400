# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_subnet import Evaluator, FunctionEvaluator, TableEvaluator
from lightning_subnet.errors import InvalidSubnetError, MeasurementError
from tests.problems import (
    NasBench201,
    assert_clear,
    conditional,
    grid,
    mixed,
    search_of,
    values_of,
)


def test_a_function_is_called_with_the_subnet() -> None:
    evaluator = FunctionEvaluator(lambda subnet: {"f0": subnet["x.0"] + subnet["x.1"]})
    assert evaluator.evaluate(grid().largest) == {"f0": 8}
    assert isinstance(evaluator, Evaluator)


def test_fingerprints_are_per_measure_and_off_by_default() -> None:
    assert FunctionEvaluator(lambda s: {}).fingerprint("f0") is None
    named = FunctionEvaluator(lambda s: {}, fingerprint="weights-1")
    assert named.fingerprint("f0") != named.fingerprint("f1")
    assert named.fingerprint("f0") == FunctionEvaluator(print, fingerprint="weights-1").fingerprint(
        "f0"
    )


@pytest.mark.parametrize("returned", [3.0, None, [1, 2], "f0"])
def test_a_function_that_returns_no_mapping_ends_the_search(returned: Any) -> None:
    with pytest.raises(MeasurementError) as caught:
        FunctionEvaluator(lambda subnet: returned).evaluate(grid().largest)
    assert_clear(caught.value, repr(returned), "values by name", '{"error": 0.1}')


def test_an_exception_of_the_function_is_a_failed_evaluation() -> None:
    def sometimes(subnet: Any) -> dict[str, float]:
        if subnet["x.0"] == 0:
            msg = "out of memory\nsecond line"
            raise RuntimeError(msg)
        return {"f0": 1.0, "f1": float(subnet["x.1"])}

    history = search_of(budget=25).run(FunctionEvaluator(sometimes), progress=False).history
    failed = [e for e in history if not e.ok]
    assert len(failed) == 5
    assert {e.reason for e in failed} == {"RuntimeError: out of memory"}
    assert all(e.subnet["x.0"] == 0 and not e.values for e in failed)


# Tables


def test_a_table_of_a_whole_space_is_that_space() -> None:
    for space in (grid(), conditional(), mixed()):
        subnets = list(space)
        values = values_of(space.indices(subnets), 1)[:, 0]
        table = TableEvaluator(space, subnets, {"f0": values})
        assert table.space is space
        assert [table.evaluate(s)["f0"] for s in subnets] == values.tolist()


def test_a_table_of_a_part_searches_a_pool() -> None:
    space = conditional()
    subnets = space.sample(30, rng=0)
    table = TableEvaluator(space, subnets, {"f0": np.arange(30), "f1": -np.arange(30)})
    assert table.space.is_pool
    assert table.space.size == 30
    for strategy in ("random", "nsga2"):
        result = search_of(space=table.space, strategy=strategy, budget=100).run(
            table, progress=False
        )
        assert len(result.history) == 30, "the space is exhausted"
        assert all(e.ok for e in result.history)


def test_a_table_takes_value_indices_in_any_form() -> None:
    space = conditional()
    # The second row sets a kernel that does not exist at depth 2: it is the first row again.
    X = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 2, 2], [2, 0, 0, 1, 1]])
    table = TableEvaluator(space, X, {"f0": [1.0, 1.0, 3.0]})
    assert table.space.size == 2
    assert table.evaluate(space.subnet(depth=2, ks=[5, 5, 7, 3])) == {"f0": 1.0}
    assert TableEvaluator(space, X.astype(np.int8), {"f0": [1, 1, 3]}).space == table.space


def test_one_subnet_with_two_values_is_refused() -> None:
    space = conditional()
    X = np.array([[0, 1, 1, 0, 0], [2, 0, 0, 1, 1], [0, 1, 1, 2, 2]])
    with pytest.raises(MeasurementError) as caught:
        TableEvaluator(space, X, {"f0": [1.0, 3.0, 2.0]})
    assert_clear(caught.value, "Rows 0 and 2", "'f0'", "1.0 and 2.0", "Average")
    nan = float("nan")
    assert TableEvaluator(space, X, {"f0": [nan, 3.0, nan]}).space.size == 2


@pytest.mark.parametrize("column", [[1.0, 2.0], 3.0, [[1.0], [2.0], [3.0]]])
def test_a_column_of_another_length_is_refused(column: Any) -> None:
    with pytest.raises(MeasurementError) as caught:
        TableEvaluator(grid(), grid().sample(3, rng=0), {"f0": column})
    assert_clear(caught.value, "'f0'", "3 subnets", "(3,)")


def test_indices_outside_the_space_are_refused() -> None:
    with pytest.raises(InvalidSubnetError) as caught:
        TableEvaluator(grid(), np.array([[0, 5], [1, 1]]), {"f0": [1, 2]})
    assert_clear(caught.value, "5", "'x.1'", "0..4")


def test_nan_in_a_table_is_a_failed_evaluation() -> None:
    subnets = list(grid())
    values = np.arange(25.0)
    values[3] = np.nan
    table = TableEvaluator(grid(), subnets, {"f0": values, "f1": -np.arange(25.0)})
    result = search_of(budget=25).run(table, progress=False)
    failed = [e for e in result.history if not e.ok]
    assert [e.subnet for e in failed] == [subnets[3]]
    assert "f0 is nan" in failed[0].reason


def test_a_subnet_that_is_not_in_the_table_is_a_failed_evaluation() -> None:
    space = grid()
    table = TableEvaluator(space, space.sample(5, rng=0), {"f0": range(5), "f1": range(5)})
    outside = next(s for s in space if s not in table.space)
    with pytest.raises(KeyError) as caught:
        table.evaluate(outside)
    assert_clear(caught.value, str(outside), "not in the table")
    history = search_of(budget=25).run(table, progress=False).history
    assert sum(e.ok for e in history) == 5
    assert sum("not in the table" in e.reason for e in history) == 20


def test_a_table_of_measured_cells_gives_back_its_rows() -> None:
    nb201 = NasBench201()
    pair = "cifar10/2080ti_1"
    table = nb201.evaluator(pair)
    assert table.space.size == 15_625
    top1, latency = nb201.table(pair)
    rows = [0, 777, 15_624]
    for row, subnet in zip(rows, nb201.space.from_indices(nb201.X[rows]), strict=True):
        assert table.evaluate(subnet) == {"top1": top1[row], "latency_ms": latency[row]}
