# SPDX-License-Identifier: Apache-2.0
"""Spaces that several test files use, an oracle that enumerates them, and hypothesis strategies."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hypothesis import settings, strategies as st

from lightning_subnet import Choice, SearchSpace, SubnetError
from tests.problems import conditional as by_depth  # noqa: F401 - the tests of floor 0 take it from here

property_test = settings(max_examples=60, deadline=None)

Active = dict[str, Any]


# Known spaces


def ofa_mobilenet_v3() -> SearchSpace:
    """Return OFA's MobileNetV3: 5 stages of 2 to 4 layers, (9^2 + 9^3 + 9^4)^5 = 7371^5 subnets."""
    deep_enough = {2: [3, 4], 3: [4]}
    layers = [
        {f"d.{layer // 4}": deep_enough[layer % 4]} if layer % 4 > 1 else {} for layer in range(20)
    ]
    return SearchSpace(
        {
            **{f"d.{stage}": [2, 3, 4] for stage in range(5)},
            **{f"ks.{layer}": Choice([3, 5, 7], when=when) for layer, when in enumerate(layers)},
            **{f"e.{layer}": Choice([3, 4, 6], when=when) for layer, when in enumerate(layers)},
        }
    )


def ofa_resnet50_stem() -> SearchSpace:
    """Return the stem and first stage of OFA's ResNet50: 2 * 3^2 * (3^2 + 3^3 + 3^4) = 2106.

    The stem has an extra convolution at depth 2 only, so its depths 0 and 1 mean the same network.
    """
    return SearchSpace(
        {
            "d.0": Choice([0, 1, 2], same=[(0, 1)]),
            "d.1": [0, 1, 2],
            "e.0": [0.2, 0.25, 0.35],
            "e.1": [0.2, 0.25, 0.35],
            "e.2": Choice([0.2, 0.25, 0.35], when={"d.1": [1, 2]}),
            "e.3": Choice([0.2, 0.25, 0.35], when={"d.1": [2]}),
            "w.0": [0.65, 0.8, 1.0],
            "w.1": [0.65, 0.8, 1.0],
        }
    )


def nested() -> SearchSpace:
    """Return choices under choices under choices, with two parents and equal values: 25 subnets.

    skip 1; pool 2; conv or conv2 (the same network) with bias False 3 * 2 widths = 6, with bias
    True and norm "none" 6, with "batch" 3 * 2 + "momentum" doubling where k > 3: (2 + 4 + 4) = 10.
    """
    return SearchSpace(
        {
            "op": Choice(
                ["skip", "pool", "conv", "conv2"], ordered=False, same=[("conv", "conv2")]
            ),
            "stride": Choice([1, 2], when={"op": "pool"}),
            "k": Choice([3, 5, 7], when={"op": ["conv2"]}),
            "bias": Choice([False, True], when={"op": ["conv"]}),
            "norm": Choice(["none", "batch"], ordered=False, when={"bias": [True]}),
            "momentum": Choice([0.1, 0.01], ordered=True, when={"norm": ["batch"], "k": [5, 7]}),
            "wide": Choice([None, 2.0], when={"op": ["conv", "conv2"]}),
        }
    )


def flat() -> SearchSpace:
    """Return three independent choices: 3 * 2 * 2 = 12 subnets."""
    return SearchSpace(depth=[1, 2, 3], width=[8, 16], op=Choice(["conv", "pool"], ordered=False))


# The oracle: no line of the package but the data of the choices


def meaning(choices: Mapping[str, Choice], raw: Mapping[str, Any]) -> Active:
    """Return which choices exist under raw values, with the first of values that mean the same."""

    def first(name: str, value: Any) -> Any:
        (group,) = [g for g in choices[name].same if value in g] or [(value,)]
        return next(v for v in choices[name].values if v in group)

    active: Active = {}
    for name, choice in choices.items():
        if all(
            parent in active and active[parent] in [first(parent, v) for v in allowed]
            for parent, allowed in choice.when.items()
        ):
            active[name] = first(name, raw[name])
    return active


def raw_values(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """Yield every combination of values, existing or not, equal in meaning or not."""
    names = list(space.choices)
    for values in itertools.product(*(choice.values for choice in space.choices.values())):
        yield dict(zip(names, values, strict=True))


def text(active: Mapping[str, Any]) -> str:
    """Return a hashable form of values."""
    return json.dumps(dict(active), sort_keys=True)


def brute_force(space: SearchSpace) -> dict[str, Active]:
    """Return every distinct subnet of a space (of a pool: of the space it was made from)."""
    found = (meaning(space.choices, raw) for raw in raw_values(space))
    return {text(active): active for active in found}


def changes(space: SearchSpace, before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Return in how many choices `after` differs; a new choice counts unless at its first value."""
    return sum(value != before.get(n, space.choices[n].values[0]) for n, value in after.items())


def hamming(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Return in how many choices two subnets differ; one that exists in one of them counts."""
    missing = object()
    return sum(one.get(n, missing) != other.get(n, missing) for n in {*one, *other})


# Random spaces

_ALPHABETS = (
    [1, 2, 3, 4],
    [0.5, 1.5, -2.25, 1e-9],
    ["conv", "pool", "skip", "3"],
    [False, True, None, "None"],
)
_NAMES = ("depth", "ks.0", "ks.1", "op", "ks.2")


@st.composite
def choice_of(draw: st.DrawFn, earlier: Mapping[str, Choice], *, least: int = 1) -> Choice:
    """Draw a choice that may exist under some of the earlier ones only."""
    values = draw(st.permutations(draw(st.sampled_from(_ALPHABETS))))
    values = values[: draw(st.integers(least, 4))]
    when = {}
    for parent in draw(st.lists(st.sampled_from(sorted(earlier) or [""]), max_size=3, unique=True)):
        if parent:
            allowed = st.lists(st.sampled_from(earlier[parent].values), min_size=1, unique=True)
            when[parent] = draw(allowed)
    same = []
    if len(values) > max(least, 1) and draw(st.booleans()):
        group = st.lists(st.sampled_from(values), min_size=2, max_size=len(values), unique=True)
        same = [draw(group.filter(lambda g: len(values) - len(g) + 1 >= least))]
    return Choice(values, ordered=draw(st.booleans()), when=when, same=same)


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Draw a space of 1 to 5 choices: nested conditions, several parents, equal values."""
    count = draw(st.integers(1, len(_NAMES)))
    names = draw(st.permutations(_NAMES))[:count]
    choices: dict[str, Choice] = {}
    for name in names:
        choices[name] = draw(choice_of(choices, least=1 if choices else 2))
    return SearchSpace(choices)


@st.composite
def pools(draw: st.DrawFn) -> tuple[SearchSpace, list[Active]]:
    """Draw a pool, and its members in order."""
    space = draw(spaces())
    members = st.sampled_from(list(brute_force(space).values()))
    chosen = draw(st.lists(members, min_size=2, max_size=12, unique_by=text))
    return space.restricted_to([space.subnet(active) for active in chosen]), chosen


# Bad input


def error_of(kind: type[SubnetError], call: Callable[[], object]) -> str:
    """Return the message of the error that a call raises: one to three lines of prose."""
    try:
        call()
    except kind as error:
        message = str(error)
        assert 1 <= len(message.splitlines()) <= 3
        assert len(message) <= 300, message
        assert message[-1] in ".?)}", message
        return message
    raise AssertionError(f"no {kind.__name__} was raised")
