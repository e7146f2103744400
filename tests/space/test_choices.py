# SPDX-License-Identifier: Apache-2.0
"""Choices: validation, dependencies, canonical form and groups."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lightning_subnet import Choice, SearchSpace
from lightning_subnet._json import digest
from lightning_subnet.errors import InvalidSubnetError, SpaceError
from lightning_subnet.space.choices import Choices, plain
from tests.spaces import (
    brute_force,
    error_of,
    meaning,
    nested,
    property_test,
    raw_values,
    spaces,
    text,
)


def all_rows(space: SearchSpace) -> np.ndarray:
    """Return every raw index row of a space, in the order of `raw_values`."""
    shape = [len(choice.values) for choice in space.choices.values()]
    return np.array(list(np.ndindex(*shape)))


# One choice


def test_numpy_values_become_plain() -> None:
    choice = Choice(np.array([3, 5]), when={"x": np.array([1.5])}, same=[np.array([3, 5])])
    assert choice.values == (3, 5)
    assert [type(v) for v in choice.values] == [int, int]
    assert choice.when == {"x": (1.5,)}
    assert choice.same == ((3, 5),)


@pytest.mark.parametrize(
    ("value", "scalar"),
    [(np.float32(0.5), 0.5), (np.bool_(True), True), (np.str_("a"), "a"), (None, None)],
)
def test_plain_unpacks_numpy_scalars(value: object, scalar: object) -> None:
    assert plain(value) == scalar
    assert type(plain(value)) is type(scalar)


def test_a_single_value_of_when_needs_no_list() -> None:
    assert Choice([1, 2], when={"op": "conv"}).when == {"op": ("conv",)}
    assert Choice([1, 2], when={"depth": 3}).when == {"depth": (3,)}


def test_the_first_of_equal_values_represents_them() -> None:
    choice = Choice(["a", "b", "c", "d", "e"], same=[("d", "b"), ("e", "a")])
    assert [choice.representative(i) for i in range(5)] == [0, 1, 2, 1, 0]


def test_json_leaves_out_defaults() -> None:
    assert Choice([1, 2]).to_json() == {"values": [1, 2]}
    assert Choice(["a", "b"], ordered=False, when={"d": 1}, same=[("a", "b")]).to_json() == {
        "values": ["a", "b"],
        "ordered": False,
        "when": {"d": [1]},
        "same": [["a", "b"]],
    }


def test_a_choice_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Choice([1, 2]).values = (3,)


def test_the_largest_number_of_values_is_checked_at_once() -> None:
    assert len(Choice(range(2**16)).values) == 65536
    assert "65537" in error_of(SpaceError, lambda: Choice(range(2**16 + 1)))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"values": []}, ["no values", "list of values"]),
        ({"values": "abc"}, ["'abc'", "list"]),
        ({"values": b"abc"}, ["b'abc'", "list"]),
        ({"values": 7}, ["7", "list"]),
        ({"values": None}, ["None", "list"]),
        ({"values": {3}}, ["{3}", "list"]),  # the order of a set of texts changes by process
        ({"values": {"values": [1, 2]}}, ["{'values': [1, 2]}", "list"]),
        ({"values": [3, 5, 3]}, ["3", "twice", "[3, 5, 3]"]),
        ({"values": [1, True]}, ["True", "twice"]),
        ({"values": [1.0, float("nan")]}, ["nan", "finite"]),
        ({"values": [1.0, float("inf")]}, ["inf", "finite"]),
        ({"values": [1, np.float64("-inf")]}, ["-inf", "finite"]),
        ({"values": [[1, 2], [3, 4]]}, ["[1, 2]", "list", "str, int, float, bool or None"]),
        ({"values": [1 + 2j]}, ["(1+2j)", "complex"]),
        ({"values": [1, 2], "when": {"d": [object]}}, ["object", "type"]),
        ({"values": [1, 2], "when": "depth"}, ["when='depth'", "when={'depth': [3, 4]}"]),
        ({"values": [1, 2], "when": 5}, ["when=5", "when={'depth': [3, 4]}"]),
        ({"values": [0, 1, 2], "same": (0, 1)}, ["same=(0, 1)", "same=[(0, 1)]"]),
        ({"values": [0, 1, 2], "same": 0}, ["same=0", "same=[(0, 1)]"]),
        ({"values": ["a", "b"], "same": "ab"}, ["same='ab'", "same=[(0, 1)]"]),
        ({"values": [0, 1, 2], "same": [(0, 3)]}, ["(0, 3)", "[0, 1, 2]"]),
        ({"values": [0, 1, 2], "same": [(0, 1), (1, 2)]}, ["[(0, 1), (1, 2)]", "each once"]),
        ({"values": [0, 1, 2], "same": [(0, 0)]}, ["[(0, 0)]", "each once"]),
        ({"values": [0, 1], "same": [([0], 1)]}, ["[0]", "list"]),
    ],
)
def test_bad_choices(arguments: dict[str, Any], parts: list[str]) -> None:
    message = error_of(SpaceError, lambda: Choice(**arguments))
    for part in parts:
        assert part in message


# Conditions between choices


@pytest.mark.parametrize(
    ("choices", "parts"),
    [
        ({}, ["at least one choice", 'SearchSpace({"depth": [2, 3, 4]})']),
        ({"": Choice([1, 2])}, ["''", "non-empty strings"]),
        ({3: Choice([1, 2])}, ["3", "non-empty strings"]),
        (
            {"depth": Choice([1, 2]), "k": Choice([3, 5], when={"dept": [2]})},
            ["'k'", "'dept'", "Did you mean 'depth'?", "choices: 'depth', 'k'"],
        ),
        (
            {"k": Choice([3, 5], when={"depth": [2]}), "depth": Choice([1, 2])},
            ["'k'", "'depth'", "put 'depth' before 'k'"],
        ),
        ({"k": Choice([3, 5], when={"k": [3]})}, ["'k'", "does not stand before"]),
        (
            {"depth": Choice([1, 2]), "k": Choice([3, 5], when={"depth": [2, 3]})},
            ["'k'", "'depth'", "[2, 3]", "[1, 2]"],
        ),
        (
            {"depth": Choice([1, 2]), "k": Choice([3, 5], when={"depth": []})},
            ["'k'", "[]", "[1, 2]", "one or more"],
        ),
    ],
)
def test_bad_dependencies(choices: dict[Any, Choice], parts: list[str]) -> None:
    message = error_of(SpaceError, lambda: Choices(choices))
    for part in parts:
        assert part in message


@property_test
@given(spaces())
def test_existence_and_canonical_form_against_the_oracle(space: SearchSpace) -> None:
    choices = Choices(space.choices)
    X = all_rows(space)
    canonical, active = choices.canonical(X), choices.active(X)
    for raw, row, exists in zip(raw_values(space), canonical, active, strict=True):
        expected = meaning(space.choices, raw)
        assert {n for n, on in zip(choices.names, exists, strict=True) if on} == set(expected)
        for name, index in zip(choices.names, row, strict=True):
            value = choices.values[choices.position[name]][index]
            assert value == expected.get(name, space.choices[name].values[0])
    assert len(np.unique(canonical, axis=0)) == len(brute_force(space))


@property_test
@given(spaces())
def test_canonical_form_is_idempotent_and_keeps_what_exists(space: SearchSpace) -> None:
    choices = Choices(space.choices)
    X = all_rows(space)
    before = X.copy()
    once = choices.canonical(X)
    np.testing.assert_array_equal(choices.canonical(once), once)
    np.testing.assert_array_equal(choices.active(once), choices.active(X))
    np.testing.assert_array_equal(X, before)


def test_dependencies_count_equal_values_of_the_parent() -> None:
    space = nested()  # k exists under "conv2", bias under "conv": the same network
    subnet = space.subnet(op="conv2", k=5, bias=True, norm="none", wide=None)
    assert subnet.active == {"op": "conv", "k": 5, "bias": True, "norm": "none", "wide": None}


# Groups


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["d", "ks.0", "ks.1"], {"d": (0,), "ks": (1, 2)}),
        (["ks.1", "d", "ks.0"], {"ks": (2, 0), "d": (1,)}),
        (["ks.0"], {"ks": (0,)}),
        (["ks.1", "ks.3"], {"ks.1": (0,), "ks.3": (1,)}),
        (["ks", "ks.0"], {"ks": (0,), "ks.0": (1,)}),
        (["a.b.0", "a.b.1", "a.c"], {"a.b": (0, 1), "a.c": (2,)}),
        (["ks.00", "ks.1"], {"ks.00": (0,), "ks.1": (1,)}),
        ([".0", "x.", "y.²"], {".0": (0,), "x.": (1,), "y.²": (2,)}),
        ([f"k.{i}" for i in range(12)], {"k": tuple(range(12))}),  # by number, not by text
    ],
)
def test_groups(names: list[str], groups: dict[str, tuple[int, ...]]) -> None:
    choices = Choices({name: Choice([1, 2]) for name in names})
    assert choices.groups == groups
    for group, at in groups.items():
        assert choices.is_list(group) == (names[at[0]] != group)


def test_flatten_takes_grouped_and_flat_values() -> None:
    choices = Choices({name: Choice([1, 2]) for name in ("d", "k.0", "k.1")})
    flat = {"d": 1, "k.0": 2, "k.1": 1}
    assert choices.flatten({"d": 1, "k": [2, 1]}) == flat
    assert choices.flatten({"d": 1, "k": np.array([2, 1])}) == flat
    assert choices.flatten(flat) == flat
    assert choices.flatten({"k": (1, 1)}) == {"k.0": 1, "k.1": 1}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"dept": 1}, ["'dept'", "Did you mean 'depth'?", "choices: 'depth', 'k'"]),
        ({"k.2": 1}, ["'k.2'", "Did you mean 'k."]),
        ({"zzzz": 1}, ["'zzzz'", "choices: 'depth', 'k'"]),
        ({"k": [1]}, ["'k'", "list of 2", "1 values"]),
        ({"k": [1, 2, 1]}, ["'k'", "list of 2", "3 values"]),
        ({"k": 1}, ["'k'", "list of 2", "not 1"]),
        ({"k": "12"}, ["'k'", "list of 2", "'12'"]),
    ],
)
def test_flatten_refuses(values: dict[str, Any], parts: list[str]) -> None:
    choices = Choices({name: Choice([1, 2]) for name in ("depth", "k.0", "k.1")})
    message = error_of(InvalidSubnetError, lambda: choices.flatten(values))
    for part in parts:
        assert part in message


# Copies and hashes


def test_choices_survive_pickling_and_copying() -> None:
    choices = Choices(nested().choices)
    for other in (
        pickle.loads(pickle.dumps(choices)),
        copy.copy(choices),
        copy.deepcopy(choices),
    ):
        assert other.by_name == choices.by_name
        assert other.fingerprint == choices.fingerprint


def test_digest_depends_on_content_not_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": 1}) != digest({"a": "1"})


@property_test
@given(st.lists(spaces(), min_size=2, max_size=2))
def test_fingerprints_tell_spaces_apart(pair: list[SearchSpace]) -> None:
    one, other = (Choices(space.choices) for space in pair)
    assert (one.fingerprint == other.fingerprint) == (text(one.to_json()) == text(other.to_json()))
