# SPDX-License-Identifier: Apache-2.0
"""Narrowed spaces, held to the enumeration of the whole."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from lightning_subnet import Choice, SearchSpace, SubnetSearch
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.errors import InvalidSubnetError, SearchError, SpaceError, SpaceExhausted
from lightning_subnet.space.members import row_codes
from lightning_subnet.strategies import names, resolve
from lightning_subnet.study.problem import Problem
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import Digits, quiet_trainer
from tests.problems import assert_clear, conditional, grid, history_of, problem_of
from tests.spaces import (
    Active,
    brute_force,
    changes,
    error_of,
    flat,
    nested,
    ofa_mobilenet_v3,
    property_test,
    spaces,
    text,
)


def first_of(space: SearchSpace, name: str, value: object) -> object:
    """Return the first of the values that mean the same network."""
    (group,) = [g for g in space.choices[name].same if value in g] or [(value,)]
    return next(v for v in space.choices[name].values if v in group)


def stays(space: SearchSpace, values: dict[str, list], active: Active) -> bool:
    """Return whether the values of a subnet are kept ones, by meaning."""
    return all(
        value in [first_of(space, name, v) for v in values.get(name, space.choices[name].values)]
        for name, value in active.items()
    )


@st.composite
def narrowed(draw: st.DrawFn) -> tuple[SearchSpace, dict[str, list], SearchSpace, list[Active]]:
    """Draw a space, values that stay, the narrowed space, and its members by enumeration."""
    space = draw(spaces())
    values = {
        name: draw(st.lists(st.sampled_from(choice.values), min_size=1, unique=True))
        for name, choice in space.choices.items()
        if draw(st.booleans())
    }
    members = [a for a in brute_force(space).values() if stays(space, values, a)]
    if len(members) < 2:
        values, members = {}, list(brute_force(space).values())
    return space, values, space.narrowed_to(values), members


@property_test
@given(narrowed())
def test_members_are_those_of_the_whole_with_kept_values(case) -> None:
    space, _, part, members = case
    assert part.size == len(members)
    assert {text(s.active) for s in part} == {text(a) for a in members}
    inside = {text(a) for a in members}
    for active in brute_force(space).values():
        subnet = space.subnet(active)
        assert (subnet in part) == (text(active) in inside)
        if subnet in part:
            assert part.subnet(active) == subnet
            # The same rows: measures of indices read them.
            np.testing.assert_array_equal(part.subnet(active).indices, subnet.indices)
        else:
            with pytest.raises(InvalidSubnetError):
                part.subnet(active)


@property_test
@given(narrowed(), st.integers(0, 2**31))
def test_draws_moves_and_ends_are_members(case, seed: int) -> None:
    _, _, part, members = case
    everything = part.sample(part.size, rng=seed)
    assert len(set(everything)) == len(members)
    assert part.largest in part
    assert part.smallest in part
    start = everything[0]
    near = part.neighbours(start)
    assert all(s in part for s in near)
    # What comes to exist by a change has its first kept value.
    smaller = SearchSpace.from_json(json.dumps({"choices": _reduced(part)})) if near else part
    assert {text(s.active) for s in near} == {
        text(a) for a in members if changes(smaller, start.active, a) == 1
    }


def _reduced(part: SearchSpace) -> dict:
    """Return the choices with the kept values alone, as JSON."""
    choices: dict[str, dict] = {}
    for name, choice in part.choices.items():
        when = {p: [v for v in vs if v in part.values[p]] for p, vs in choice.when.items()}
        same = [g for g in choice.same if g[0] in part.values[name]]
        spec = {"values": list(part.values[name]), "ordered": choice.ordered}
        if all(p in choices and vs for p, vs in when.items()):
            choices[name] = spec | {"when": when, "same": same}
    return choices


@property_test
@given(narrowed(), st.integers(0, 2**31))
def test_any_row_is_brought_in(case, seed: int) -> None:
    space, _, part, _ = case
    rng = np.random.default_rng(seed)
    limits = [len(choice.values) for choice in space.choices.values()]
    X = part.canonical(rng.integers(limits, size=(20, len(limits))))
    assert all(s in part for s in part.from_indices(X))
    inside = part.indices(part.sample(min(part.size, 10), rng=seed))
    np.testing.assert_array_equal(part.canonical(inside), inside)


@property_test
@given(narrowed())
def test_json_and_measures_of_indices(case) -> None:
    space, _, part, members = case
    again = SearchSpace.from_json(json.dumps(part.to_json()))
    assert again == part
    assert [s.active for s in again] == [s.active for s in part]
    subnets = [space.subnet(a) for a in members]
    np.testing.assert_array_equal(part.indices(subnets), space.indices(subnets))
    assert (part == space) == (part.size == space.size and "values" not in part.to_json())


def test_the_size_of_the_super_network_s_space_is_exact() -> None:
    part = ofa_mobilenet_v3().narrowed_to({"d.0": [2], **{f"ks.{i}": [3, 7] for i in range(20)}})
    assert part.size == 6**2 * (6**2 + 6**3 + 6**4) ** 4
    assert all(s in part for s in part.sample(50, rng=0))
    assert part.values["ks.0"] == (3, 7)
    assert len(part.choices) == 45  # those that cannot exist are read as ever
    assert part.sample(1, rng=0)[0].grouped()["ks"][3] == 3


def test_values_move_to_the_nearest_and_by_turns() -> None:
    part = conditional().narrowed_to({"ks.0": [3, 7], "depth": [3]})
    rows = part.canonical(np.array([[2, 2, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]))
    assert rows[:, 0].tolist() == [1, 1, 1]
    assert rows[:, 1].tolist() == [2, 0, 0]
    ops = nested().narrowed_to({"op": ["skip", "pool"]})
    assert {s["op"] for s in ops} == {"skip", "pool"}
    moved = ops.canonical(np.array([[2, 0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0]]))
    assert moved[:, 0].tolist() == [0, 0]  # conv and conv2 are the same network
    ops = SearchSpace(op=Choice(list("abcde"), ordered=False), n=[1, 2]).narrowed_to(
        {"op": ["b", "d"]}
    )
    moved = ops.canonical(np.array([[i, 0] for i in range(5)]))
    assert moved[:, 0].tolist() == [1, 1, 3, 3, 1]


def test_parts_of_parts_and_pools() -> None:
    part = flat().narrowed_to({"depth": [1, 2]}).narrowed_to({"width": [16]})
    assert part.values == {"depth": (1, 2), "width": (16,), "op": ("conv", "pool")}
    pool = flat().restricted_to(flat().sample(8, rng=0))
    few = pool.narrowed_to({"depth": [1, 3]})
    assert few.is_pool
    assert set(few) == {s for s in pool if s["depth"] != 2}
    assert set(part.restricted_to(part.sample(3, rng=0))) <= set(part)
    message = error_of(SpaceError, lambda: part.narrowed_to({"depth": [3]}))
    assert "'depth'" in message
    assert "1, 2" in message
    message = error_of(SpaceError, lambda: part.restricted_to([flat().largest]))
    assert "4 subnets of this space, which was narrowed" in message


def test_bad_values_give_one_clear_error() -> None:
    space = flat()
    message = error_of(SpaceError, lambda: space.narrowed_to({"dept": [1]}))
    assert "Did you mean 'depth'?" in message
    assert "[4]" in error_of(SpaceError, lambda: space.narrowed_to({"depth": [4]}))
    assert "[]" in error_of(SpaceError, lambda: space.narrowed_to({"depth": []}))
    one = {"depth": [1], "width": [8], "op": ["pool"]}
    assert "single subnet" in error_of(SpaceError, lambda: space.narrowed_to(one))


@pytest.mark.parametrize("name", names())
def test_every_strategy_stays_inside(name: str) -> None:
    whole = grid(4, 4)
    part = whole.narrowed_to({"x.0": [1, 3], "x.1": [2], "x.2": [0, 3]})  # 2 * 1 * 2 * 4 = 16
    problem: Problem = problem_of(part)
    history = history_of(problem, part.sample(12, rng=0))
    proposed = resolve(name).propose(problem, history, 50, np.random.default_rng(0))
    assert len(set(proposed)) == 4
    assert all(s in part and s not in history for s in proposed)
    everything = history_of(problem, part)
    with pytest.raises(SpaceExhausted):
        resolve(name).propose(problem, everything, 1, np.random.default_rng(0))
    large = grid(12, 4).narrowed_to({f"x.{i}": [0, 2, 3] for i in range(12)})
    history = history_of(problem_of(large), large.sample(60, rng=0))
    proposed = resolve(name).propose(problem_of(large), history, 20, np.random.default_rng(0))
    assert all(s in large for s in proposed)
    assert len(set(row_codes(large.indices(proposed)))) == 20


class LitMobileNet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = ElasticMobileNetV3.tiny(n_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.reshape(-1, 1, 8, 8))

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))


def fitted(space: SearchSpace, model: Any) -> Any:
    search = SubnetSearch(
        space=space,
        objectives={"loss": "min", "macs": "min"},
        strategy="random",
        budget=5,
        storage=None,
        trainer=quiet_trainer(limit_val_batches=1),
        calibration_images=100,
    )
    return search.fit(model, Digits(), progress=False)


def test_fit_searches_a_part_of_the_model_s_space() -> None:
    torch.manual_seed(0)
    model = LitMobileNet()
    whole = model.net.search_space()
    # d.0 = 3 goes, so ks.2 and e.2 do not exist in any subnet, and activate reads them still.
    part = whole.narrowed_to({"d.0": [2], "ks.0": [5], "e.0": [2, 4]})
    result = fitted(part, model)
    assert all(e.subnet in part and e.ok for e in result.history)
    assert result.history[0].subnet == part.largest
    macs = next(m for m in model.net.exact_measures() if m.name == "macs")
    rows = whole.indices([e.subnet for e in result.history])
    assert [e.values["macs"] for e in result.history] == list(macs(rows))
    best = result.best("loss").subnet
    assert extract(model, best).sliced
    assert sum(p.numel() for p in result.extract(best).parameters()) > 0
    # A smaller space of its own has other indices, which a table of indices would misread.
    others = {name: Choice([5] if name == "ks.0" else c.values, when=c.when)
           for name, c in whole.choices.items()}  # fmt: skip
    with pytest.raises(SearchError) as caught:
        fitted(SearchSpace(others), model)
    assert_clear(caught.value, "'macs'", "narrowed_to")
