# SPDX-License-Identifier: Apache-2.0
"""SearchSpace: enumeration, validation, encodings and JSON, against brute force."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from lightning_subnet import Choice, SearchSpace
from lightning_subnet.errors import InvalidSubnetError, SpaceError, SpaceExhausted
from tests.spaces import (
    brute_force,
    by_depth,
    error_of,
    flat,
    nested,
    ofa_mobilenet_v3,
    ofa_resnet50_stem,
    property_test,
    raw_values,
    spaces,
    text,
)

KNOWN = {
    "design": (by_depth, 9 + 27 + 81),
    "nested": (nested, 25),
    "flat": (flat, 12),
    "resnet50 stem": (ofa_resnet50_stem, 2 * 9 * (9 + 27 + 81)),
}


# Size, enumeration, draws


@pytest.mark.parametrize("name", KNOWN)
def test_known_spaces(name: str) -> None:
    build, size = KNOWN[name]
    space = build()
    assert space.size == size
    assert {text(s.active) for s in space} == set(brute_force(space))
    assert len(list(space)) == size


@property_test
@given(spaces())
def test_enumeration_is_every_distinct_subnet_once(space: SearchSpace) -> None:
    every = brute_force(space)
    members = list(space)
    assert len(members) == space.size == len(every)
    assert {text(s.active) for s in members} == set(every)
    assert members == list(space)
    blocks = np.concatenate(list(space.index_blocks()))
    assert space.from_indices(blocks) == members


def test_enumeration_spans_blocks() -> None:
    space = SearchSpace({f"x.{i}": [0, 1, 2] for i in range(9)})  # 19,683: more than one block
    blocks = list(space.index_blocks())
    assert len(blocks) > 1
    assert len(np.unique(np.concatenate(blocks), axis=0)) == space.size == 3**9


@property_test
@given(spaces())
def test_every_raw_assignment_is_a_subnet(space: SearchSpace) -> None:
    every = brute_force(space)
    for raw in raw_values(space):
        subnet = space.subnet(raw)
        assert text(subnet.active) in every
        assert subnet in space
    assert len({space.subnet(raw) for raw in raw_values(space)}) == space.size


@property_test
@given(spaces())
def test_samples_are_distinct_subnets(space: SearchSpace) -> None:
    every = set(brute_force(space))
    for n in {0, 1, space.size // 2, space.size}:
        draws = [text(s.active) for s in space.sample(n, rng=3)]
        assert len(set(draws)) == len(draws) == n
        assert set(draws) <= every


def test_samples_depend_on_the_seed_alone() -> None:
    for space in (by_depth(), ofa_mobilenet_v3()):
        assert space.sample(20, rng=5) == space.sample(20, np.random.default_rng(5))
        assert space.sample(20, rng=5) != space.sample(20, rng=6)
        assert space.sample(20) != space.sample(20)
        np.testing.assert_array_equal(
            space.sample_indices(20, rng=5), space.indices(space.sample(20, rng=5))
        )


def test_samples_of_a_space_too_large_to_number() -> None:
    space = ofa_mobilenet_v3()
    draws = space.sample(2000, rng=0)
    assert len(set(draws)) == 2000
    assert all(subnet in space for subnet in draws[:50])


# Ends


def test_largest_and_smallest() -> None:
    assert ofa_mobilenet_v3().largest.grouped() == {"d": [4] * 5, "ks": [7] * 20, "e": [6] * 20}
    assert ofa_mobilenet_v3().smallest.grouped() == {"d": [2] * 5, "ks": [3] * 20, "e": [3] * 20}
    assert flat().largest.active == {"depth": 3, "width": 16, "op": "conv"}
    assert flat().smallest.active == {"depth": 1, "width": 8, "op": "conv"}


@property_test
@given(spaces())
def test_ends_are_the_first_and_last_values(space: SearchSpace) -> None:
    last = {n: c.values[-1 if c.ordered else 0] for n, c in space.choices.items()}
    first = {n: c.values[0] for n, c in space.choices.items()}
    assert space.largest == space.subnet(last)
    assert space.smallest == space.subnet(first)


# Encodings


@property_test
@given(spaces())
def test_one_hot_rows_decode_to_their_subnet(space: SearchSpace) -> None:
    columns = []
    for name, choice in space.choices.items():
        repeats = {v for group in choice.same for v in sorted(group, key=choice.values.index)[1:]}
        columns += [(name, value) for value in choice.values if value not in repeats]
    assert space.feature_names() == [f"{name}={value}" for name, value in columns]

    every = list(space)
    features = space.encode(every)
    assert features.shape == (space.size, len(columns))
    assert set(np.unique(features)) <= {0.0, 1.0}
    for subnet, row in zip(every, features, strict=True):
        decoded = [columns[j] for j in np.flatnonzero(row)]
        assert len(decoded) == len(dict(decoded))
        assert text(dict(decoded)) == text(subnet.active)  # and so 0 where nothing exists


@property_test
@given(spaces())
def test_ordinal_rows_decode_to_their_subnet(space: SearchSpace) -> None:
    assert space.feature_names("ordinal") == list(space.names)
    every = list(space)
    for subnet, row in zip(every, space.encode(every, kind="ordinal"), strict=True):
        assert ((row >= 0) & (row <= 1)).all()
        decoded = {
            name: choice.values[round(x * len(choice.values)) - 1]
            for (name, choice), x in zip(space.choices.items(), row, strict=True)
            if x > 0
        }
        assert text(decoded) == text(subnet.active)


def test_encodings_by_hand() -> None:
    space = SearchSpace({"d": [1, 2], "k": Choice([3, 5, 7], when={"d": [2]}, same=[(5, 7)])})
    subnets = [space.subnet(d=1), space.subnet(d=2, k=3), space.subnet(d=2, k=7)]
    assert space.encode(subnets).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    assert space.feature_names() == ["d=1", "d=2", "k=3", "k=5"]
    np.testing.assert_allclose(
        space.encode(subnets, kind="ordinal"), [[1 / 2, 0], [1, 1 / 3], [1, 2 / 3]]
    )


@pytest.mark.parametrize("kind", ["onehot", "ordinal"])
def test_encode_takes_subnets_and_indices_of_any_number(kind: Any) -> None:
    space = nested()
    draws = space.sample(7, rng=0)
    features = space.encode(draws, kind=kind)
    np.testing.assert_array_equal(space.encode(space.indices(draws), kind=kind), features)
    np.testing.assert_array_equal(space.encode(iter(draws), kind=kind), features)
    np.testing.assert_array_equal(space.encode(nested().sample(7, rng=0), kind=kind), features)
    assert space.encode([], kind=kind).shape == (0, len(space.feature_names(kind)))


def test_twenty_thousand_subnets_encode_in_a_moment() -> None:
    space = ofa_mobilenet_v3()
    draws = space.sample(20_000, rng=0)
    start = time.perf_counter()
    assert space.encode(draws).shape == (20_000, 5 * 3 + 20 * 3 + 20 * 3)
    assert time.perf_counter() - start < 5  # takes some hundredths: catches a loop over subnets


# Indices


@property_test
@given(spaces())
def test_indices_and_subnets_are_one_to_one(space: SearchSpace) -> None:
    every = list(space)
    X = space.indices(every)
    assert X.dtype == np.int64
    assert space.from_indices(X) == every
    assert space.from_indices(X.astype(float)) == every
    assert space.from_indices(X.tolist()) == every
    np.testing.assert_array_equal(space.canonical(X), X)
    for subnet, row, exists in zip(every, X, space.active(X), strict=True):
        values = [space.choices[n].values[i] for n, i in zip(space.names, row, strict=True)]
        assert values == list(subnet.values())
        assert [n for n, on in zip(space.names, exists, strict=True) if on] == list(subnet.active)


def test_from_indices_brings_rows_into_canonical_form() -> None:
    (subnet,) = by_depth().from_indices([[0, 1, 2, 2, 2]])
    assert subnet.active == {"depth": 2, "ks.0": 5, "ks.1": 7}
    assert subnet.indices.tolist() == [0, 1, 2, 0, 0]


def test_no_subnets_have_indices_too() -> None:
    assert flat().indices([]).shape == (0, 3)
    assert flat().from_indices(np.zeros((0, 3), dtype=int)) == []


@pytest.mark.parametrize(
    ("X", "parts"),
    [
        ([0, 0, 0], ["(n, 3)", "(3,)"]),
        ([[0, 0]], ["(n, 3)", "(1, 2)"]),
        ([[0, 0, 0], [3, 0, 0]], ["Index 3", "'depth'", "row 1", "0..2"]),
        ([[0, -1, 0]], ["Index -1", "'width'", "row 0", "0..1"]),
        ([[0, 0.5, 0]], ["0.5", "whole numbers"]),
        ([[0, float("nan"), 0]], ["nan", "whole numbers"]),
        ([[0, float("inf"), 0]], ["inf", "0..1"]),
        ([["1", "8", "conv"]], ["conv", "whole numbers", "space.subnet"]),
    ],
)
def test_bad_indices(X: Any, parts: list[str]) -> None:
    message = error_of(InvalidSubnetError, lambda: flat().from_indices(X))
    for part in parts:
        assert part in message


# Reading values


def test_what_does_not_exist_may_be_passed_or_left_out() -> None:
    space = by_depth()
    short = space.subnet({"depth": 2, "ks.0": 3, "ks.1": 5})
    assert space.subnet({"depth": 2, "ks.0": 3, "ks.1": 5, "ks.2": 7}) == short
    assert space.subnet({"depth": 2, "ks": [3, 5, None, None]}) == short
    assert space.subnet({"depth": 2, "ks": [3, 5, "anything", [1]]}) == short


def test_numpy_values_and_keywords_are_read() -> None:
    space = by_depth()
    given_array = space.subnet(depth=np.int64(4), ks=np.array([3, 5, 7, 3]))
    assert given_array == space.subnet(
        {"depth": 4}, **{f"ks.{i}": [3, 5, 7, 3][i] for i in range(4)}
    )


def test_none_is_a_value_where_it_is_listed() -> None:
    space = SearchSpace(a=[None, 1], b=[1, 2])
    assert space.subnet(a=None, b=1)["a"] is None
    assert "missing" in error_of(InvalidSubnetError, lambda: space.subnet(a=None, b=None))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, ["'depth' is missing", "2, 3, 4"]),
        ({"depth": 3, "ks.0": 3, "ks.1": 3}, ["'ks.2' is missing", "3, 5, 7"]),
        ({"depth": 3, "ks": [3, 3, None, 3]}, ["'ks.2' is missing"]),
        ({"depth": 5, "ks": [3] * 4}, ["'depth' cannot be 5", "2, 3, 4"]),
        ({"depth": "3", "ks": [3] * 4}, ["'depth' cannot be '3'", "2, 3, 4"]),
        ({"depth": [3], "ks": [3] * 4}, ["'depth' cannot be [3]", "2, 3, 4"]),
        ({"depth": 2, "ks": [3, 4, 3, 3]}, ["'ks.1' cannot be 4", "3, 5, 7"]),
        ({"depth": float("nan"), "ks": [3] * 4}, ["'depth' cannot be nan"]),
        ({"dept": 3, "ks": [3] * 4}, ["'dept'", "Did you mean 'depth'?"]),
        ({"depth": 3, "kss": [3] * 4}, ["'kss'", "Did you mean 'ks'?"]),
        ({"depth": 3, "ks": [3] * 3}, ["'ks'", "list of 4", "3 values"]),
        ([3, 5], ["[3, 5]", "values by name", "space.subnet({'depth': 2, ...})"]),
    ],
)
def test_bad_subnets(values: Any, parts: list[str]) -> None:
    message = error_of(InvalidSubnetError, lambda: by_depth().subnet(values))
    for part in parts:
        assert part in message


def test_only_the_first_unread_choice_that_exists_is_named() -> None:
    values = {"depth": 2, "ks": [3, 9, 9, 9]}
    assert "'ks.1' cannot be 9" in error_of(InvalidSubnetError, lambda: by_depth().subnet(values))


@pytest.mark.parametrize("bad", [[{"depth": 1}], [(0, 0, 0)], flat().smallest])
def test_what_is_no_subnet_is_refused(bad: Any) -> None:
    message = error_of(InvalidSubnetError, lambda: flat().encode(bad))
    assert "not a Subnet" in message
    assert "space.subnet(" in message


# Membership


def test_membership() -> None:
    space = by_depth()
    assert space.largest in space
    assert by_depth().largest in space
    assert flat().largest not in space
    assert dict(space.largest) not in space
    assert None not in space


def test_a_subnet_that_reads_otherwise_here_is_no_member() -> None:
    names = {"depth": [2, 3, 4], **{f"ks.{i}": [3, 5, 7] for i in range(4)}}
    unconditional, space = SearchSpace(names), by_depth()
    assert unconditional.largest in space  # all choices exist
    assert unconditional.smallest not in space  # ks.2 and ks.3 would not exist
    assert all((s in space) == (s in set(space)) for s in unconditional)


# Equality and JSON


@property_test
@given(spaces())
def test_json_round_trip(space: SearchSpace) -> None:
    for again in (
        SearchSpace.from_json(space.to_json()),
        SearchSpace.from_json(json.loads(json.dumps(space.to_json()))),
        SearchSpace.from_json(json.dumps(space.to_json())),
    ):
        assert again == space
        assert hash(again) == hash(space)
        assert again.names == space.names
        assert again.choices == space.choices
        assert list(again) == list(space)


def test_json_round_trip_of_a_pool() -> None:
    space = nested()
    pool = space.restricted_to(space.sample(6, rng=0))
    again = SearchSpace.from_json(json.dumps(pool.to_json()))
    assert again == pool
    assert again.is_pool
    assert list(again) == list(pool)
    assert again != space
    assert pool != space.restricted_to(space.sample(6, rng=1))


@pytest.mark.parametrize(
    "other",
    [
        SearchSpace(a=[1, 2], b=[1, 2, 3]),
        SearchSpace(a=[1, 2], c=[1, 2]),
        SearchSpace(a=[1, 2], b=Choice([1, 2], ordered=False)),
        SearchSpace(a=[1, 2], b=Choice([1, 2], when={"a": 2})),
        SearchSpace(a=[1, 2], b=[1, "2"]),
        SearchSpace(b=[1, 2], a=[1, 2]),  # the order of the genes
        None,
    ],
)
def test_spaces_that_differ_are_not_equal(other: object) -> None:
    assert SearchSpace(a=[1, 2], b=[1, 2]) != other
    assert SearchSpace(a=[1, 2], b=[1, 2]) == SearchSpace({"a": (1, 2)}, b=Choice([1, 2]))


def test_pools_of_spaces_with_another_gene_order_are_not_equal() -> None:
    X = np.array([[0, 1], [1, 1]])  # the same rows, but other subnets
    one = SearchSpace(a=[1, 2], b=[1, 2]).restricted_to(X)
    other = SearchSpace(b=[1, 2], a=[1, 2]).restricted_to(X)
    assert set(one) != set(other)
    assert one != other


@pytest.mark.parametrize(
    "data",
    [
        "{",
        "[]",
        "3",
        {},
        {"choices": [1, 2]},
        {"choices": {"a": [1, 2]}},
        {"choices": {"a": {"value": [1, 2]}}},
        None,
    ],
)
def test_what_is_no_json_of_a_space_is_refused(data: Any) -> None:
    message = error_of(SpaceError, lambda: SearchSpace.from_json(data))
    assert "not the JSON of a search space" in message
    assert "space.to_json()" in message


def test_repr() -> None:
    assert repr(by_depth()) == "<SearchSpace of 117 subnets over 5 choices: depth, ks[4]>"
    pool = by_depth().restricted_to(by_depth().sample(5, rng=0))
    assert repr(pool) == "<pool of 5 subnets over 5 choices: depth, ks[4]>"


# Bad spaces


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (SearchSpace, ["at least one choice"]),
        (lambda: SearchSpace({}), ["at least one choice"]),
        (lambda: SearchSpace([1, 2]), ["list", "by name"]),
        (lambda: SearchSpace("depth"), ["str", "by name"]),
        (lambda: SearchSpace(a=[1]), ["single subnet", "Subnet(a=1)", "two values or more"]),
        (lambda: SearchSpace(a=Choice([1, 2], same=[(1, 2)])), ["single subnet"]),
        (lambda: SearchSpace(a=[]), ["Choice 'a'", "no values"]),
        (lambda: SearchSpace(a=3), ["Choice 'a'", "not 3"]),
        (lambda: SearchSpace(a=[1, 1]), ["Choice 'a'", "1", "twice"]),
        (lambda: SearchSpace({1: [1, 2]}), ["The name 1", "non-empty strings"]),
        (
            lambda: SearchSpace(depth=[1, 2], k=Choice([3, 5], when={"deth": [1]})),
            ["'deth'", "Did you mean 'depth'?"],
        ),
    ],
)
def test_bad_spaces(build: Callable[[], object], parts: list[str]) -> None:
    message = error_of(SpaceError, build)
    for part in parts:
        assert part in message


def test_an_unknown_encoding_is_refused() -> None:
    message = error_of(SpaceError, lambda: flat().encode([], kind="hot"))
    assert "'hot'" in message
    assert "'onehot' or 'ordinal'" in message


def test_more_than_there_are_cannot_be_drawn() -> None:
    message = error_of(SpaceExhausted, lambda: flat().sample(13))
    assert "13 distinct subnets" in message
    assert "at most 12" in message


def test_what_cannot_be_enumerated_says_so() -> None:
    message = error_of(SpaceError, lambda: ofa_mobilenet_v3().index_blocks())
    assert str(7371**5) in message
    assert "sample()" in message
    with pytest.raises(SpaceError):
        next(iter(ofa_mobilenet_v3()))
