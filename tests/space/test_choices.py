# SPDX-License-Identifier: Apache-2.0
"""Choices: validation, dependencies, canonical form and groups."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lightning_subnet import Choice, SearchSpace
from lightning_subnet._json import digest
from lightning_subnet.errors import ElasticityWarning, InvalidSubnetError, SpaceError
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


# The order of values


def warnings_of(call: Callable[[], object]) -> list[str]:
    """Return the warnings about order that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.category is ElasticityWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("values", "last", "better"),
    [
        ([64, 32, 16], "16", "[16, 32, 64]"),
        ([3, 7, 5], "5", "[3, 5, 7]"),
        ([1.0, 0.5], "0.5", "[0.5, 1.0]"),
        ([2, 1.5], "1.5", "[1.5, 2]"),
        ([-1, -2], "-2", "[-2, -1]"),
        (range(8, 0, -2), "2", "[2, 4, 6, 8]"),
        (np.array([8, 4]), "4", "[4, 8]"),
        ((8, 4), "4", "[4, 8]"),
        ([None, 8, 4], "4", "[None, 4, 8]"),
        (Choice([8, 4]), "4", "[4, 8]"),
        (Choice([2, 0, 1], same=[(2, 0)]), "1", "[0, 1, 2]"),
        (list({32: "wide", 16: "thin"}), "16", "[16, 32]"),
    ],
    ids=str,
)
def test_numbers_that_do_not_ascend_are_warned_of(values: Any, last: str, better: str) -> None:
    (text,) = warnings_of(lambda: SearchSpace(depth=[1, 2], width=values))
    assert "'width'" in text
    assert "'depth'" not in text
    assert f"the largest subnet has {last} there" in text
    assert f"Write {better}, or Choice(..., ordered=False)" in text
    assert "Choice(..., ordered=True) says that the order is meant" in text


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3],
        [-2, 0.5, 1],
        [16],
        ["large", "small"],
        ["7", "5"],
        [True, False],
        [False, 3, 5],
        [2, 4, None],
        [3, 5, "full"],
        Choice([8, 4], ordered=False),
        Choice([8, 4], ordered=True),
        Choice([1, 0, 2], same=[(1, 0)]),
    ],
    ids=str,
)
def test_other_orders_are_what_they_are(values: Any) -> None:
    assert warnings_of(lambda: SearchSpace(depth=[1, 2], width=values)) == []


def test_one_warning_names_all_choices() -> None:
    wide = Choice([8, 4])  # the same for two names
    (text,) = warnings_of(
        lambda: SearchSpace({"a": wide, "depth": [1, 2], "b": wide, "w.0": [2, 1], "w.1": [2, 1]})
    )
    assert text.startswith("The values of 'a', [8, 4], do not ascend")
    assert "So it is with 'b', 'w.0', 'w.1'." in text


def test_what_is_made_of_a_space_repeats_no_warning() -> None:
    def spaces() -> None:
        space = SearchSpace(width=[8, 4, 2], stride=Choice([4, 2, 1], ordered=True))
        assert space.largest == space.subnet(width=2, stride=1)
        assert SearchSpace(space.choices) == space
        assert SearchSpace({**space.choices, "depth": [1, 2]}).size == 18
        assert copy.deepcopy(space) == space
        assert pickle.loads(pickle.dumps(space)) == space
        for part in (space.narrowed_to({"width": [8, 4]}), space.restricted_to(space.sample(3, 0))):
            assert copy.copy(part) == part
            assert SearchSpace.from_json(part.to_json()) == part

    assert len(warnings_of(spaces)) == 1


def test_a_stored_space_opens_without_a_warning_and_is_the_same() -> None:
    stored = {
        "choices": {"width": {"values": [8, 4, 2]}, "op": {"values": [2, 1], "ordered": False}}
    }
    spaces: list[SearchSpace] = []
    assert warnings_of(lambda: spaces.append(SearchSpace.from_json(stored))) == []
    assert spaces[0].to_json() == stored
    choice = Choice([8, 4, 2])
    assert choice == Choice([8, 4, 2], ordered=True)
    assert choice.ordered is True
    assert choice.to_json() == Choice([8, 4, 2], ordered=True).to_json() == {"values": [8, 4, 2]}
    assert repr(choice) == repr(Choice([8, 4, 2], ordered=True))
