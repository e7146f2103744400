# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest

from lightning_subnet._torch.structures import flatten, kind, unflatten


@dataclass
class Plain:
    a: Any
    b: Any = 2


@dataclass(frozen=True, slots=True)
class Frozen:
    a: Any
    rest: tuple[Any, ...]


@dataclass
class Derived:
    a: Any
    b: Any = field(init=False)

    def __post_init__(self) -> None:
        self.b, self.note = self.a * 2, 9


class Items(dict[str, Any]): ...


class Ordered(OrderedDict[str, Any]): ...


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "leaves"),
    [
        (3, [3]),
        ({"a": [1, (2,)]}, [1, 2]),
        (Plain(1), [1, 2]),
        ([Plain(Frozen(1, (2, 3)))], [1, 2, 3, 2]),
        (Derived(1), [1, 2, 9]),
        (Items(x=1, y=Plain(2)), [1, 2, 2]),
        (Ordered(y=1, x=[2]), [1, 2]),
        (Pair(1, Plain(5, 6)), [1, 5, 6]),
    ],
)
def test_a_structure_is_the_same_when_it_is_put_together_again(
    value: Any, leaves: list[Any]
) -> None:
    parts, spec = flatten(value)
    assert parts == leaves
    again = unflatten(parts, spec)
    assert type(again) is type(value)
    assert again == value
    assert getattr(again, "note", None) == getattr(value, "note", None)
    assert flatten(again)[0] == parts
    assert flatten(again)[1] == spec
    if parts != [3]:
        assert kind(spec) == type(value).__name__


def test_a_class_itself_and_other_objects_are_leaves() -> None:
    thing = object()
    assert flatten([Plain, thing])[0] == [Plain, thing]
