# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_subnet import Measure, SearchSpace, measure
from lightning_subnet.search import Profile
from tests.problems import conditional, cost, grid, mixed, problem_of, search_of


def profile_of(space: SearchSpace, constraints: Any = None, exact: Any = (cost,)) -> Profile:
    return Profile.of(problem_of(space, constraints=constraints, exact=exact))


@pytest.mark.parametrize("space", [grid(), conditional(), mixed()], ids=repr)
def test_a_small_space_is_looked_at_whole(space: SearchSpace) -> None:
    profile = profile_of(space, {"cost": "<= 4"})
    values = np.array([cost(s.indices[None])[0] for s in space])
    assert profile.complete
    assert profile.size == profile.examined == space.size == len(values)
    assert profile.feasible == pytest.approx((values <= 4).mean())
    costs = profile.ranges["cost"]
    assert (costs.least, costs.greatest) == (values.min(), values.max())
    assert costs.median == np.median(values)
    assert costs.largest == cost(space.largest.indices[None])[0]
    assert profile.satisfiable
    assert profile.nearest_values["cost"] <= 4


def test_the_nearest_of_an_infeasible_space_is_named() -> None:
    profile = profile_of(conditional(), {"cost": "<= 0.5"})
    assert not profile.satisfiable
    assert profile.feasible == 0
    assert profile.nearest == conditional().smallest
    assert profile.nearest_values == {"cost": 1.0}
    text = str(profile)
    for part in (
        "117 subnets",
        "all of them",
        "cost <= 0.5",
        "0.0%",
        "cost = 1 at",
        "Subnet(depth=2",
    ):
        assert part in text


def test_relative_bounds_are_shown_as_numbers_and_measured_ones_as_open() -> None:
    profile = profile_of(grid(), {"cost": "<= 50%", "f0": ">= 90%"})
    assert profile.constraints == ("cost <= 4.5",)
    assert profile.unchecked == ("f0 >= 90%",)
    assert "Only a measurement can tell: f0 >= 90%" in str(profile)
    assert profile.feasible == pytest.approx(10 / 25)


def test_without_constraints_everything_is_feasible() -> None:
    profile = profile_of(grid())
    assert profile.feasible == 1
    assert profile.satisfiable
    assert "feasible" not in str(profile)


def test_a_large_space_is_sampled_and_descended() -> None:
    # One subnet of 4**30 is feasible: no sample finds it, the descent does.
    space = grid(30, 4)
    hidden = space.sample(1, rng=99)[0]

    @measure("cost", exact=True, takes="indices")
    def away(X: np.ndarray) -> np.ndarray:
        return 1.0 + np.abs(X - hidden.indices).sum(axis=1)

    profile = profile_of(space, {"cost": "<= 1"}, [away])
    assert not profile.complete
    assert profile.size == 4**30
    assert profile.examined < 30_000
    assert profile.satisfiable
    assert profile.nearest == hidden
    assert profile.nearest_values == {"cost": 1.0}
    infeasible = profile_of(space, {"cost": "<= 0.5"}, [away])
    assert not infeasible.satisfiable
    assert infeasible.nearest == hidden


def test_a_measure_that_is_not_vectorised_is_called_on_few_subnets() -> None:
    called = 0

    def slow(subnets: list[Any]) -> list[float]:
        nonlocal called
        called += len(subnets)
        return [1.0 + sum(s.indices) for s in subnets]

    profile = profile_of(grid(10, 4), {"cost": "<= 20"}, [Measure("cost", slow, exact=True)])
    assert not profile.complete
    assert profile.satisfiable
    assert called < 1000


def test_a_pool_is_looked_at_whole() -> None:
    pool = grid(4, 4).restricted_to(grid(4, 4).sample(20, rng=0))
    profile = profile_of(pool, {"cost": "<= 7"})
    assert profile.complete
    assert profile.examined == profile.size == 20
    assert profile.nearest in pool


def test_several_measures_and_bounds() -> None:
    @measure("width", exact=True)
    def width(subnets: Any) -> Any:
        return [subnet["x.0"] for subnet in subnets]

    profile = profile_of(grid(), {"cost": "<= 3", "width": ">= 4"}, [cost, width])
    assert not profile.satisfiable
    assert set(profile.ranges) == {"cost", "width"}
    # Violations are relative and add up. Width 2 misses by 2/4 where cost 3 holds; width 3 and
    # cost 4 miss by 1/4 + 1/3, width 4 and cost 5 by 2/3.
    assert profile.nearest == grid().subnet(x=[2, 0])
    assert profile.nearest_values == {"cost": 3.0, "width": 2.0}


def test_profiles_do_not_depend_on_chance() -> None:
    search = search_of(space=grid(30, 4), measures=[cost], constraints={"cost": "<= 20"})
    assert search.profile() == search.profile()
