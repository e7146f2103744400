# SPDX-License-Identifier: Apache-2.0
"""Members: neighbours, draws without replacement, pools and their nearest member."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import chisquare

from lightning_subnet import Choice, SearchSpace, Subnet
from lightning_subnet.errors import InvalidSubnetError, SpaceError, SpaceExhausted
from lightning_subnet.space import _diagram
from lightning_subnet.space.choices import Choices
from lightning_subnet.space.members import AllMembers, PoolMembers, row_codes
from tests.spaces import (
    Active,
    brute_force,
    by_depth,
    changes,
    error_of,
    flat,
    hamming,
    nested,
    ofa_mobilenet_v3,
    pools,
    property_test,
    spaces,
    text,
)


def texts(subnets: list[Subnet]) -> list[str]:
    return [text(subnet.active) for subnet in subnets]


# Neighbours in a space


@property_test
@given(spaces(), st.integers(1, 3), st.randoms(use_true_random=False))
def test_neighbours_are_all_subnets_so_few_choices_away(
    space: SearchSpace, distance: int, random: Any
) -> None:
    every = brute_force(space)
    start = random.choice(list(every.values()))
    near = space.neighbours(space.subnet(start), distance=distance)
    keys = texts(near)
    X = space.indices(near)
    np.testing.assert_array_equal(space.canonical(X), X)
    away = {key: changes(space, start, active) for key, active in every.items()}
    assert len(set(keys)) == len(keys)
    assert set(keys) == {key for key, d in away.items() if 1 <= d <= distance}
    assert [away[key] for key in keys] == sorted(away[key] for key in keys)


def test_neighbours_by_hand() -> None:
    space = by_depth()
    near = space.neighbours(space.subnet(depth=3, ks=[7, 3, 5, 3]))
    assert [list(s.active.values()) for s in near] == [
        [2, 7, 3],
        [4, 7, 3, 5, 3],  # what comes to exist has its first value
        [3, 3, 3, 5],
        [3, 5, 3, 5],
        [3, 7, 5, 5],
        [3, 7, 7, 5],
        [3, 7, 3, 3],
        [3, 7, 3, 7],
    ]


def test_a_change_forth_and_back_is_not_two_choices_away() -> None:
    space = SearchSpace(
        {"d": [1, 2, 3], **{f"k.{i}": Choice([3, 5], when={"d": [2, 3]}) for i in range(3)}}
    )
    near = texts(space.neighbours(space.subnet(d=3, k=[5, 5, 5]), distance=2))
    assert text({"d": 3, "k.0": 3, "k.1": 3, "k.2": 3}) not in near
    assert text({"d": 2, "k.0": 3, "k.1": 3, "k.2": 3}) not in near
    assert text({"d": 2, "k.0": 3, "k.1": 5, "k.2": 5}) in near


def test_neighbours_of_the_largest_ofa_subnet() -> None:
    space = ofa_mobilenet_v3()
    assert len(space.neighbours(space.largest)) == 2 * 45  # each choice has two other values


def test_no_distance_no_neighbours() -> None:
    assert flat().neighbours(flat().smallest, distance=0) == []


# Draws


@pytest.mark.parametrize("max_rank", [2**62, 0])  # by number, and by rejection as for OFA
@pytest.mark.parametrize("space", [by_depth(), nested()])
def test_samples_are_distinct_members(
    space: SearchSpace, max_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_diagram, "_MAX_RANK", max_rank)
    members = AllMembers(Choices(space.choices))
    for n in (1, 2, space.size // 2, space.size - 1, space.size):
        X = members.sample(n, np.random.default_rng(n))
        assert len(X) == n
        draws = set(texts(space.from_indices(X)))
        assert len(draws) == n
        assert draws <= set(brute_force(space))


@pytest.mark.parametrize("max_rank", [2**62, 0])
@pytest.mark.parametrize("n", [1, 5, 20])
def test_samples_are_uniform(n: int, max_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_diagram, "_MAX_RANK", max_rank)
    space = nested()
    members = AllMembers(Choices(space.choices))
    rng = np.random.default_rng(0)
    codes = [code for _ in range(4000 // n) for code in row_codes(members.sample(n, rng))]
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == space.size
    # Draws without replacement vary less than independent ones: the statistic is scaled for that.
    statistic = chisquare(counts).statistic * (space.size - 1) / (space.size - n)
    assert 6 < statistic < 55  # chi-square with 24 degrees of freedom: p = 0.9999 and 0.0003


@pytest.mark.parametrize("max_rank", [2**62, 0])
def test_each_place_of_a_sample_is_uniform(max_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_diagram, "_MAX_RANK", max_rank)
    space = nested()  # a strategy takes the first few of a sample
    first = [space.sample(10, rng=seed)[0].key for seed in range(2500)]
    counts = np.unique(first, return_counts=True)[1]
    assert len(counts) == space.size
    assert chisquare(counts).pvalue > 0.001


# Pools


@property_test
@given(pools())
def test_a_pool_is_its_members(pool_and_members: tuple[SearchSpace, list[Active]]) -> None:
    pool, members = pool_and_members
    keys = [text(active) for active in members]
    assert pool.is_pool
    assert pool.size == len(keys)
    assert texts(list(pool)) == keys
    for n in range(pool.size + 1):
        draws = texts(pool.sample(n, rng=n))
        assert len(set(draws)) == len(draws) == n
        assert set(draws) <= set(keys)
    assert all(subnet in pool for subnet in pool)


@property_test
@given(pools())
def test_membership_of_a_pool(pool_and_members: tuple[SearchSpace, list[Active]]) -> None:
    pool, members = pool_and_members
    keys = {text(active) for active in members}
    whole = SearchSpace(pool.choices)
    for subnet in whole:
        inside = text(subnet.active) in keys
        assert subnet in whole
        assert (subnet in pool) == inside
        if inside:
            assert pool.subnet(subnet) == subnet
        else:
            with pytest.raises(InvalidSubnetError, match="not among"):
                pool.subnet(subnet)


@property_test
@given(pools(), st.integers(1, 3))
def test_neighbours_in_a_pool_are_members_within_the_hamming_distance(
    pool_and_members: tuple[SearchSpace, list[Active]], distance: int
) -> None:
    pool, members = pool_and_members
    for start in brute_force(pool).values():  # members or not
        near = pool.neighbours(SearchSpace(pool.choices).subnet(start), distance=distance)
        expected = [m for m in members if 1 <= hamming(start, m) <= distance]
        assert texts(near) == [text(m) for m in expected]


@property_test
@given(pools(), st.integers(0, 2**32 - 1))
def test_proposals_go_to_the_nearest_member_that_is_free(
    pool_and_members: tuple[SearchSpace, list[Active]], seed: int
) -> None:
    pool, members = pool_and_members
    rng = np.random.default_rng(seed)
    whole = list(brute_force(pool).values())
    proposals = [whole[i] for i in rng.integers(len(whole), size=8)]
    exclude = [m for m in members if rng.random() < 0.3]

    expected, gone = [], {text(m) for m in exclude}
    for proposal in proposals:
        place = proposal if proposal in members else None
        free = [m for m in members if text(m) not in gone]
        if place is None and free:
            place = min(free, key=lambda m: hamming(m, proposal))  # the first of equals
        if place is not None:
            gone.add(text(place))
            expected.append(text(place))

    space = SearchSpace(pool.choices)
    codes = set(row_codes(space.indices([space.subnet(m) for m in exclude])))
    X = space.indices([space.subnet(p) for p in proposals])
    assert texts(pool.from_indices(pool.nearest(X, codes))) == expected
    assert len(codes) == len(exclude)  # what is passed is not changed


def test_distances_by_hand() -> None:
    space = by_depth()
    members = [space.subnet(depth=2, ks=[3, 3, 3, 3]), space.subnet(depth=4, ks=[7, 7, 7, 7])]
    pool = PoolMembers(Choices(space.choices), space.indices(members))
    (row,) = space.indices([space.subnet(depth=4, ks=[3, 7, 7, 3])])
    # depth 2: the depth, ks.1, and ks.2 and ks.3 that do not exist there; depth 4: ks.0 and ks.3
    assert pool.distances(row).tolist() == [4, 2]


def test_nearest_is_none_when_all_are_taken() -> None:
    space = flat()
    X = space.indices([space.smallest, space.largest])
    pool = space.restricted_to(X)
    (outside,) = space.indices([space.subnet(depth=2, width=8, op="conv")])
    assert pool.nearest(outside[None], set(row_codes(X))).shape == (0, 3)
    np.testing.assert_array_equal(pool.nearest(outside[None], set()), X[:1])
    np.testing.assert_array_equal(pool.nearest(outside[None], set(row_codes(X[:1]))), X[1:])


def test_the_first_of_many_equally_near_members_is_taken() -> None:
    space = SearchSpace({f"x.{i}": range(200) for i in range(2)})
    pool = space.restricted_to(
        np.array([[1 + i, 0] for i in np.random.default_rng(0).permutation(199)])
    )
    (row,) = space.indices([space.smallest])
    exclude: set[bytes] = set()
    for member in pool:
        (nearest,) = pool.nearest(row[None], exclude)
        assert pool.from_indices(nearest[None]) == [member]
        exclude.add(row_codes(nearest[None])[0])


def test_only_a_pool_moves_rows() -> None:
    space = flat()
    X = space.indices(space.sample(5, rng=0))
    np.testing.assert_array_equal(space.nearest(X, set(row_codes(X))), X)


def test_repeated_members_count_once_in_order() -> None:
    space = flat()
    a, b, c = space.sample(3, rng=0)
    pool = space.restricted_to([b, a, b, c, a])
    assert pool.size == 3
    assert list(pool) == [b, a, c]


def test_pools_of_indices_are_brought_into_canonical_form() -> None:
    space = by_depth()
    pool = space.restricted_to(np.array([[0, 1, 2, 2, 2], [0, 1, 2, 0, 1], [2, 0, 0, 0, 0]]))
    assert pool.size == 2
    assert pool.smallest.active == {"depth": 2, "ks.0": 5, "ks.1": 7}


def test_extremes_of_a_pool_are_those_of_the_space_if_listed() -> None:
    space = flat()
    pool = space.restricted_to([space.largest, *space.sample(4, rng=0), space.smallest])
    assert pool.largest == space.largest
    assert pool.smallest == space.smallest


def test_extremes_of_a_pool_without_those_of_the_space() -> None:
    space = SearchSpace(
        {"op": Choice(["a", "b", "c"], ordered=False), "d": [1, 2, 3, 4], "w": [8, 16]}
    )
    rows = [("c", 1, 16), ("a", 3, 8), ("b", 3, 16), ("c", 2, 8)]  # relative sums 1.25 1.25 1.75 1
    pool = space.restricted_to([space.subnet(op=op, d=d, w=w) for op, d, w in rows])
    assert pool.largest == space.subnet(op="b", d=3, w=16)
    assert pool.smallest == space.subnet(op="c", d=2, w=8)


@property_test
@given(pools())
def test_extremes_are_members(pool_and_members: tuple[SearchSpace, list[Active]]) -> None:
    pool, _ = pool_and_members
    assert pool.largest in pool
    assert pool.smallest in pool


def test_pools_within_pools() -> None:
    space = flat()
    a, b, c, d = space.sample(4, rng=0)
    pool = space.restricted_to([a, b, c])
    assert list(pool.restricted_to([c, a])) == [c, a]
    message = error_of(SpaceError, lambda: pool.restricted_to([a, b, d]))
    assert repr(d) in message
    assert "3 subnets of this pool" in message


def test_subnets_outside_a_pool_can_be_encoded_whatever_instance_they_come_from() -> None:
    space = flat()
    pool = space.restricted_to(space.sample(4, rng=0))
    outside = next(s for s in space if s not in pool)
    foreign = flat().subnet(outside)
    assert foreign not in pool
    np.testing.assert_array_equal(pool.encode([foreign]), pool.encode([outside]))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_pool_needs_an_alternative(n: int) -> None:
    space = flat()
    message = error_of(SpaceError, lambda: space.restricted_to([space.smallest] * n))
    assert "at least two distinct" in message
    assert f"not {min(n, 1)}." in message


def test_more_than_there_are_cannot_be_drawn() -> None:
    pool = flat().restricted_to(flat().sample(4, rng=0))
    message = error_of(SpaceExhausted, lambda: pool.sample(5))
    assert "5 distinct subnets" in message
    assert "at most 4" in message
