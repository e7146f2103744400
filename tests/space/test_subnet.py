# SPDX-License-Identifier: Apache-2.0
"""Subnet: a mapping that compares by content, in every process, and survives any copy."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from lightning_subnet import Choice, SearchSpace, Subnet
from tests.spaces import by_depth, flat, nested, ofa_mobilenet_v3, property_test, spaces, text

ROOT = Path(__file__).resolve().parents[2]


# What it holds


def test_a_subnet_is_a_mapping_of_every_choice() -> None:
    subnet = by_depth().subnet(depth=3, ks=[7, 5, 3, 7])
    assert isinstance(subnet, Mapping)
    assert list(subnet) == ["depth", "ks.0", "ks.1", "ks.2", "ks.3"]
    assert len(subnet) == 5
    assert dict(subnet) == {"depth": 3, "ks.0": 7, "ks.1": 5, "ks.2": 3, "ks.3": 3}
    assert "ks.3" in subnet
    assert "ks.4" not in subnet
    assert subnet.get("ks.4") is None
    assert subnet.indices.tolist() == [1, 2, 1, 0, 0]


def test_what_does_not_exist_is_absent_from_active_and_json() -> None:
    subnet = by_depth().subnet(depth=3, ks=[7, 5, 3, 7])
    assert subnet.active == {"depth": 3, "ks.0": 7, "ks.1": 5, "ks.2": 3}
    assert subnet.to_json() == subnet.active


def test_active_is_a_copy() -> None:
    subnet = flat().smallest
    subnet.active["depth"] = 99
    assert subnet.active["depth"] == 1


def test_an_unknown_name_is_a_key_error_with_a_suggestion() -> None:
    with pytest.raises(KeyError, match=r"'ks\.9' is not a choice.*Did you mean 'ks\."):
        by_depth().smallest["ks.9"]


def test_repr_shows_groups_and_what_does_not_exist() -> None:
    space = by_depth()
    assert repr(space.subnet(depth=2, ks=[7, 5, 3, 7])) == "Subnet(depth=2, ks=[7, 5, -, -])"
    assert repr(nested().smallest) == (
        "Subnet(op='skip', stride=-, k=-, bias=-, norm=-, momentum=-, wide=-)"
    )


def test_values_are_the_plain_ones_that_were_given() -> None:
    space = SearchSpace(a=[np.int64(3), np.int64(5)], b=[True, None], c=["x", 2.5])
    assert [type(v) for v in space.smallest.values()] == [int, bool, str]
    assert space.largest["b"] is None


# Groups and JSON


def test_grouped_is_in_the_order_of_the_numbers() -> None:
    space = SearchSpace({"k.1": [1, 2], "d": [5, 6], "k.0": [3, 4]})
    subnet = space.subnet({"k.0": 3, "k.1": 2, "d": 6})
    assert subnet.grouped() == {"k": [3, 2], "d": 6}
    assert space.subnet(subnet.grouped()) == subnet


@property_test
@given(spaces())
def test_every_form_reads_back_as_the_same_subnet(space: SearchSpace) -> None:
    for subnet in space.sample(min(space.size, 10), rng=0):
        assert space.subnet(subnet) == subnet
        assert space.subnet(dict(subnet)) == subnet
        assert space.subnet(subnet.active) == subnet
        assert space.subnet(subnet.grouped()) == subnet
        assert space.subnet(json.loads(json.dumps(subnet.to_json()))) == subnet
        assert space.subnet(json.loads(json.dumps(subnet.grouped()))) == subnet
        assert space.from_indices(subnet.indices[None]) == [subnet]
        np.testing.assert_array_equal(space.canonical(subnet.indices[None])[0], subnet.indices)


# Equality


@property_test
@given(spaces())
def test_equality_is_that_of_content_and_agrees_with_the_hash(space: SearchSpace) -> None:
    again = SearchSpace.from_json(space.to_json())  # another instance of the same space
    mine, theirs = list(space), list(again)
    assert mine == theirs
    assert [hash(s) for s in mine] == [hash(s) for s in theirs]
    assert len(set(mine) | set(theirs)) == space.size
    for a in mine[:8]:
        for b in theirs[:8]:
            equal = text(a.active) == text(b.active)
            assert (a == b) == (b == a) == equal
            assert (a.key == b.key) == equal
            assert (a != b) != equal


def test_equality_across_different_spaces_is_by_content() -> None:
    one = SearchSpace(depth=[1, 2], width=[8, 16])
    other = SearchSpace({"width": [4, 8, 16], "depth": Choice([2, 1], ordered=False)})
    assert one.subnet(depth=2, width=8) == other.subnet(depth=2, width=8)
    assert hash(one.subnet(depth=2, width=8)) == hash(other.subnet(depth=2, width=8))
    assert one.subnet(depth=2, width=8) != other.subnet(depth=1, width=8)


def test_a_choice_that_does_not_exist_is_not_its_first_value() -> None:
    always = SearchSpace({"d": [1, 2], "k": [3, 5]})
    sometimes = SearchSpace({"d": [1, 2], "k": Choice([3, 5], when={"d": [2]})})
    assert always.smallest != sometimes.smallest
    assert always.largest == sometimes.largest


def test_a_subnet_is_no_dict_and_no_key() -> None:
    subnet = flat().smallest
    assert subnet != dict(subnet)
    assert subnet != subnet.key
    assert subnet is not None


# Other processes

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tests.spaces import nested, ofa_mobilenet_v3
out = []
for space in (nested(), ofa_mobilenet_v3()):
    draws = space.sample(20, rng=7)
    out.append([space.fingerprint, hash(space), space.names])
    out.append([[s.key, hash(s), s.to_json()] for s in draws])
    out.append(sorted(hash(s) for s in set(draws)))
    out.append([s.key for s in space.neighbours(space.largest)])
print(json.dumps(out))
"""


@pytest.mark.parametrize("seed", ["1", "4242"])
def test_keys_hashes_and_draws_are_the_same_in_another_process(seed: str) -> None:
    expected = []
    for space in (nested(), ofa_mobilenet_v3()):
        draws = space.sample(20, rng=7)
        expected.append([space.fingerprint, hash(space), list(space.names)])
        expected.append([[s.key, hash(s), s.to_json()] for s in draws])
        expected.append(sorted(hash(s) for s in set(draws)))
        expected.append([s.key for s in space.neighbours(space.largest)])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT)],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == expected


def test_keys_never_change() -> None:
    # Stored databases hold these: a new value here makes every old study unreadable.
    subnet = by_depth().subnet(depth=3, ks=[7, 5, 3, 7])
    assert subnet.key == "d115b4d2c778cb7f057d6d6016bd4b0b"


# Copies


@property_test
@given(spaces())
def test_copies_are_equal_and_complete(space: SearchSpace) -> None:
    for subnet in space.sample(min(space.size, 5), rng=0):
        for twin in (
            pickle.loads(pickle.dumps(subnet)),
            copy.copy(subnet),
            copy.deepcopy(subnet),
        ):
            assert type(twin) is Subnet
            assert twin == subnet
            assert hash(twin) == hash(subnet)
            assert twin.grouped() == subnet.grouped()
            assert twin in space


def test_pickled_subnets_share_their_choices() -> None:
    space = ofa_mobilenet_v3()
    pickled = pickle.dumps(space.sample(100, rng=0))
    assert len(pickled) < 25_000  # 90 bytes of indices each, and the choices once
    assert len({id(subnet.choices) for subnet in pickle.loads(pickled)}) == 1


def test_a_pickled_space_goes_on_with_its_subnets() -> None:
    space = nested()
    twin, subnets = pickle.loads(pickle.dumps((space, space.sample(5, rng=0))))
    assert twin == space
    assert subnets == space.sample(5, rng=0)
    np.testing.assert_array_equal(twin.encode(subnets), space.encode(subnets))
