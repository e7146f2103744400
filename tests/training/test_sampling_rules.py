# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from lightning_subnet import Measure, SearchSpace
from lightning_subnet.errors import ObjectiveError, SearchError
from lightning_subnet.supernets import ElasticMobileNetV3
from lightning_subnet.training.sampling_rules import Strata, check_rule, step_subnets, uniform

SPACE = SearchSpace(depth=[1, 2, 3], width=[8, 16, 32], kernel=[3, 5, 7])


def macs_of(net: ElasticMobileNetV3) -> Measure:
    return next(m for m in net.exact_measures() if m.name == "macs")


def test_the_sandwich_has_the_ends_of_what_is_open() -> None:
    part = SPACE.narrowed_to({"depth": [2, 3]})
    draw = uniform(part, seed=1)
    for step in range(20):
        subnets = step_subnets("sandwich", SPACE.largest, part, draw, step=step)
        assert subnets[:2] == [SPACE.largest, part.smallest]
        assert all(subnet in part for subnet in subnets)
        assert len(set(subnets)) == len(subnets) >= 2
        assert subnets == step_subnets("sandwich", SPACE.largest, part, draw, step=step)
    assert step_subnets("sandwich", SPACE.largest, None, draw, step=0) == [SPACE.largest]


def test_ranks_share_the_sandwich() -> None:
    draw = uniform(SPACE, seed=1)

    def of(rank: int, n: int, step: int) -> object:
        (subnet,) = step_subnets("ranks", SPACE.largest, SPACE, draw, step=step, ranks=(rank, n))
        return subnet

    for step in range(10):
        five = [of(rank, 5, step) for rank in range(5)]
        assert (five[0], five[-1]) == (SPACE.largest, SPACE.smallest)
        assert five[1:4] == draw(3, step)
        assert of(0, 2, step) == SPACE.largest
        assert of(1, 2, step) == (draw(1, step // 2)[0] if step % 2 else SPACE.smallest)
    small = SearchSpace(a=[1, 2])  # fewer subnets than processes
    few = {
        step_subnets("ranks", small.largest, small, uniform(small, 0), step=3, ranks=(r, 6))[0]
        for r in range(6)
    }
    assert few == {small.largest, small.smallest}


def test_turns_share_the_sandwich_over_steps() -> None:
    part = SPACE.narrowed_to({"depth": [1, 2]})  # the largest of all is not among its draws
    draw = uniform(part, seed=1)
    steps = [step_subnets("turns", SPACE.largest, part, draw, step=t, n_random=3) for t in range(8)]
    drawn = [draw(1, number)[0] for number in range(6)]
    others = [part.smallest, *drawn[:3], part.smallest, *drawn[3:]]
    assert steps == [[SPACE.largest, other] for other in others]
    assert step_subnets("turns", SPACE.largest, None, draw, step=0) == [SPACE.largest]


@pytest.mark.parametrize(
    ("rule", "n_random", "ranks"), [("turns", 2, (0, 1)), ("ranks", 1, (1, 2))]
)
def test_turns_take_from_every_band_equally_often(
    rule: str, n_random: int, ranks: tuple[int, int]
) -> None:
    cost = Measure("cost", lambda X: X.sum(1), exact=True, takes="indices")
    strata = Strata(SPACE, cost, seed=0, n_bands=7)
    turns, drawn = 21, []
    for step in range(turns * (n_random + 1)):
        subnets = step_subnets(
            rule, SPACE.largest, SPACE, strata.draw, step=step, n_random=n_random, ranks=ranks
        )
        drawn += [subnets[-1]] if step % (n_random + 1) else []
    bands = np.bincount(strata.band(strata.cost(SPACE.indices(drawn))), minlength=7)
    assert bands.tolist() == [turns * n_random // 7] * 7


def test_strata_see_every_band_equally_often_where_uniform_draws_do_not() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space, macs = net.search_space(), macs_of(net)
    assert space.size > 20_000  # so that paths are drawn
    strata, draw = Strata(space, macs, seed=3), uniform(space, 3)
    drawn = [s for t in range(80) for s in strata.draw(2, t)]
    plain = [s for t in range(80) for s in draw(2, t)]
    bands, flat = (
        np.bincount(strata.band(strata.cost(space.indices(s))), minlength=8) for s in (drawn, plain)
    )
    assert bands.tolist() == [20] * 8
    assert flat[0] + flat[-1] < 8  # of 160
    assert flat[2:5].sum() > 120
    assert len(set(drawn)) > 120  # not the same few of each band


def test_strata_of_a_small_space_are_uniform_within_a_band() -> None:
    cost = Measure("cost", lambda X: X.sum(1), exact=True, takes="indices")
    strata = Strata(SPACE, cost, seed=0, n_bands=7)  # sums 0 to 6: 1, 3, 6, 7, 6, 3, 1 subnets
    drawn = [s for t in range(1400) for s in strata.draw(1, t)]
    sums = SPACE.indices(drawn).sum(1)
    assert np.bincount(sums).tolist() == [200] * 7
    middle = [s for s, total in zip(drawn, sums, strict=True) if total == 3]
    counts = [middle.count(s) for s in set(middle)]
    assert len(counts) == 7
    assert sum((c - 200 / 7) ** 2 / (200 / 7) for c in counts) < 22.5  # chi-squared, 6 df, 0.1 %


def test_strata_depend_on_seed_and_step_only() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    one, other = (Strata(net.search_space(), macs_of(net), seed=5) for _ in range(2))
    later = one.draw(3, 17)
    for step in (4, 17, 2):
        other.draw(3, step)
    assert other.draw(3, 17) == later
    assert Strata(net.search_space(), macs_of(net), seed=6).draw(3, 17) != later


def test_strata_stay_in_the_open_part_and_in_a_pool() -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    space = net.search_space()
    part = space.narrowed_to({name: [4] for name in space.names if name.startswith("e.")})
    pool = space.restricted_to(space.sample(30, rng=0))
    for subspace in (part, pool):
        strata = Strata(subspace, macs_of(net), seed=0)
        assert all(s in subspace for t in range(30) for s in strata.draw(3, t))


def test_a_band_without_subnets_gives_the_nearest_and_equal_costs_all() -> None:
    cost = Measure("cost", lambda X: 10.0 ** X.sum(1), exact=True, takes="indices")
    drawn = {s for t in range(40) for s in Strata(SPACE, cost).draw(1, t)}
    assert {int(total) for total in SPACE.indices(list(drawn)).sum(1)} >= {5, 6}
    same = Measure("same", lambda X: np.ones(len(X)), exact=True, takes="indices")
    assert len({s for t in range(150) for s in Strata(SPACE, same).draw(2, t)}) == SPACE.size


def test_measures_that_cannot_stratify_are_refused() -> None:
    noisy = Measure("latency_ms", lambda X: X.sum(1), takes="indices")
    with pytest.raises(ObjectiveError, match="'latency_ms', which is not exact"):
        Strata(SPACE, noisy)
    traced = Measure("macs", lambda subnets: [float(s["width"]) for s in subnets], exact=True)
    assert len(Strata(SPACE, traced).draw(2, 0)) == 2  # 27 subnets are counted one by one
    net = ElasticMobileNetV3.tiny(n_classes=10)
    with pytest.raises(ObjectiveError, match="counted one subnet at a time"):
        Strata(net.search_space(), traced)


@pytest.mark.parametrize(
    ("rule", "n_random", "message"),
    [
        ("sandwhich", 2, "Did you mean 'sandwich'"),
        ("sandwich", 0, "n_random=0 must be a whole number from 1. At least one"),
        ("random", 1.5, "At least one"),
        ("random", True, "At least one"),
        ("ranks", 2, "n_random=2 does not go with rule='ranks'"),
    ],
)
def test_bad_rules_are_refused(rule: str, n_random: object, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        check_rule(rule, n_random)
