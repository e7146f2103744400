# SPDX-License-Identifier: Apache-2.0
"""What strategies propose, predictors predict and trainings draw is what it was, to the subnet.

tests/data/proposals.json was recorded with commit 6ab0839, on x86-64 with the libraries of that
day. What needs no model is the same everywhere. What strategies with predictors propose rests on
floating-point sums, which another processor or another version of scikit-learn, torch or BoTorch
may round otherwise, and where two subnets are nearly as good, the other one may come then. The
values were made so that this is rare. If tests of model-based strategies alone fail on another
machine, run them with the package of that commit there before looking for a mistake.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_subnet import predictors, strategies
from tests import previous

# What is asked of strategies here is small: some of them say so, and it is no matter of this file.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RECORDED: dict[str, Any] = json.loads((previous.DATA / "proposals.json").read_text("utf-8"))


LONG = ("bayesian, by name", "weaknas, mlp")  # seconds each

CASES = [
    pytest.param(*case, seed, marks=[pytest.mark.slow] if seed or case[0] in LONG else [])
    for case in previous.cases()
    for seed in previous.seeds_of(case[0])
]


@pytest.mark.parametrize(("label", "problem", "seed"), CASES)
def test_a_strategy_proposes_what_it_did(label: str, problem: str, seed: int) -> None:
    generations = previous.proposals(label, problem, seed)
    expected = RECORDED["proposals"][f"{label} | {problem} | {seed}"]
    for generation, (now, then) in enumerate(zip(generations, expected, strict=False)):
        assert now.split() == then.split(), f"generation {generation}"
    assert len(generations) == len(expected)


def test_all_is_recorded_and_all_that_is_recorded_is_compared() -> None:
    cases = [(*case, seed) for case in previous.cases() for seed in previous.seeds_of(case[0])]
    assert set(RECORDED["proposals"]) == {" | ".join(map(str, case)) for case in cases}
    assert set(strategies.names()) >= set(previous.SMALL) == set(previous.DEFAULT)
    names = {key.split(" | ")[0] for key in RECORDED["predictions"]}
    assert set(predictors.names()) >= names
    assert len(names) == 9
    assert all(len(generations) > 1 for generations in RECORDED["proposals"].values())


@pytest.mark.parametrize("key", RECORDED["predictions"])
def test_a_predictor_predicts_what_it_did(key: str) -> None:
    found = previous.predicted(*key.split(" | "))
    expected = RECORDED["predictions"][key]
    for part in ("mean", "std"):
        assert found[part] == pytest.approx(expected[part], rel=1e-6)


@pytest.mark.parametrize("problem", RECORDED["reductions"])
def test_a_space_is_reduced_as_it_was(problem: str) -> None:
    assert previous.reduced(problem) == RECORDED["reductions"][problem]


@pytest.mark.parametrize("label", RECORDED["trained"])
def test_a_training_draws_the_subnets_that_it_did(label: str) -> None:
    assert previous.trained(label) == RECORDED["trained"][label]


@pytest.mark.parametrize(("rank", "n_ranks"), previous.RANKS)
def test_a_process_of_several_trains_the_subnets_that_it_did(rank: int, n_ranks: int) -> None:
    found = previous.trained_by_rank(rank, n_ranks)
    assert found == RECORDED["trained by rank"][f"{rank} of {n_ranks}"]
