# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pandas as pd
import pytest

from lightning_subnet import Evaluation, History, SearchSpace
from lightning_subnet.errors import TellError
from lightning_subnet.study.history import with_verified
from tests.problems import assert_clear, conditional, grid, history_of, mixed, problem_of, record


def some_history() -> History:
    space = conditional()
    history = history_of(problem_of(space), space.sample(6, rng=0), failed=lambda i: i == 2)
    history.add(
        Evaluation(
            6,
            space.smallest,
            {"f0": 1.5, "f1": 2.0, "cost": 1.0},
            {"f0": 0.1},
            seconds=2.5,
            generation=3,
            reused=("f1",),
        )
    )
    return history


def test_an_evaluation_is_frozen_with_its_values() -> None:
    values = {"f0": 1.0}
    evaluation = Evaluation(0, grid().smallest, values)
    values["f0"] = 2.0
    assert evaluation.values == {"f0": 1.0}
    with pytest.raises(TypeError):
        evaluation.values["f0"] = 3.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        evaluation.status = "failed"


@pytest.mark.parametrize("space", [grid(), conditional(), mixed()], ids=repr)
def test_evaluations_survive_json(space: SearchSpace) -> None:
    problem = problem_of(space)
    history = history_of(problem, space.sample(10, rng=1), failed=lambda i: i % 4 == 1)
    for evaluation in [*history, some_history()[6]]:
        home = space if evaluation in history else conditional()
        read = Evaluation.from_json(json.loads(json.dumps(evaluation.to_json())), home)
        assert read == evaluation
        assert isinstance(read.reused, tuple)


def test_history_is_a_sequence_in_order() -> None:
    history = some_history()
    assert len(history) == 7
    assert [e.number for e in history] == list(range(7))
    assert history[-1].seconds == 2.5
    assert isinstance(history[1:3], History)
    assert record(history[1:3]) == record([history[1], history[2]])
    assert "7 evaluations, 1 failed" in repr(history)


def test_subnets_are_found_by_content() -> None:
    history = some_history()
    twin = conditional()  # another instance of the same space
    same = twin.subnet(history[3].subnet.to_json())
    assert same in history
    assert history.get(same) is history[3]
    new = next(s for s in twin if s not in [e.subnet for e in history])
    assert new not in history
    assert history.get(new) is None
    assert SearchSpace(a=[1, 2]).smallest not in history
    assert history[3] in history
    assert "x" not in history


def test_a_subnet_is_in_a_history_once() -> None:
    history = some_history()
    again = dataclasses.replace(history[4], number=7)
    with pytest.raises(TellError) as caught:
        history.add(again)
    assert_clear(caught.value, str(again.subnet), "evaluation 4", "measured once")
    assert len(history) == 7
    assert len(history.indices) == 7


def test_assignments_of_the_same_network_are_one_subnet() -> None:
    space = conditional()
    history = History(space, [Evaluation(0, space.subnet(depth=2, ks=[3, 5, 7, 7]), {"f0": 1.0})])
    with pytest.raises(TellError):
        history.add(Evaluation(1, space.subnet(depth=2, ks=[3, 5, 3, 3]), {"f0": 2.0}))
    stems = mixed()
    history = History(stems, [Evaluation(0, stems.subnet(op="conv", stem=0, depth=1), {})])
    assert stems.subnet(op="conv", stem=1, depth=1) in history


def test_columns_are_nan_where_nothing_was_measured() -> None:
    history = some_history()
    column = history.column("f0")
    assert np.isnan(column[2])
    assert np.isfinite(np.delete(column, 2)).all()
    assert column[6] == 1.5
    assert np.isnan(history.column("never heard of")).all()
    np.testing.assert_array_equal(history.ok, [True, True, False, True, True, True, True])


def test_known_values_of_a_failed_evaluation_do_not_count() -> None:
    space = grid()
    failed = Evaluation(0, space.smallest, {"f0": 1.0}, status="failed", reason="f1 is nan")
    assert np.isnan(History(space, [failed]).column("f0")).all()


def test_indices_and_codes_follow_additions() -> None:
    space = grid()
    history = History(space)
    assert history.indices.shape == (0, 2)
    assert history.codes == set()
    assert history.ok.shape == history.column("f0").shape == (0,)
    for number, subnet in enumerate(space.sample(5, rng=0)):
        history.add(Evaluation(number, subnet, {}))
        np.testing.assert_array_equal(history.indices[-1], subnet.indices)
        assert history.indices.shape == (number + 1, 2)
        assert len(history.codes) == number + 1
    history.codes.clear()
    assert len(history.codes) == 5, "a caller cannot empty the history's own set"


def test_data_frame_has_choices_measures_and_provenance() -> None:
    history = some_history()
    frame = history.to_dataframe()
    assert list(frame.columns) == [
        *("depth", "ks.0", "ks.1", "ks.2", "ks.3"),
        *("f0", "f1", "cost"),
        *("status", "reason", "seconds", "generation", "reused"),
    ]
    assert frame.index.name == "number"
    assert list(frame.index) == list(range(7))
    for number, evaluation in enumerate(history):
        for name in history.space.names:
            cell = frame.loc[number, name]
            if name in evaluation.subnet.active:
                assert cell == evaluation.subnet[name]
            else:
                assert cell is pd.NA
    assert frame.loc[2, "status"] == "failed"
    assert frame.loc[2, "reason"] == "it broke"
    assert np.isnan(frame.loc[2, "f0"])
    assert frame.loc[6, "reused"] == "f1"
    assert frame.loc[6, "generation"] == 3
    assert frame.loc[2, "generation"] is pd.NA, "attached by the user"


def test_data_frame_of_an_empty_history_has_its_columns() -> None:
    frame = History(grid()).to_dataframe()
    assert len(frame) == 0
    assert list(frame.columns)[:2] == ["x.0", "x.1"]
    assert "status" in frame.columns


def test_evaluations_can_be_copied_and_pickled() -> None:
    space = SearchSpace(depth=[1, 2])
    evaluation = Evaluation(
        number=3, subnet=space.largest, values={"a": 1.0}, errors={"a": 0.1}, reused=("a",)
    )
    for again in (copy.deepcopy(evaluation), pickle.loads(pickle.dumps(evaluation))):
        assert again == evaluation
        with pytest.raises(TypeError):
            again.values["a"] = 2.0


def test_second_values_take_the_place_of_the_first_where_a_subnet_did_not_fail() -> None:
    history = some_history()
    pairs = {"f0": (9.0, 0.5)}
    final = with_verified(history, {history[i].subnet.key: pairs for i in (0, 2)})
    assert [e.subnet for e in final] == [e.subnet for e in history]
    assert final[0].values == {**history[0].values, "f0": 9.0}
    assert final[0].errors["f0"] == 0.5
    assert list(final)[1:] == list(history)[1:]  # the third failed, and stays as it was
    assert history[0].values["f0"] != 9.0
