# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from lightning_subnet import Choice, SearchSpace
from lightning_subnet.errors import SearchError
from lightning_subnet.supernets import ElasticMobileNetV3, ElasticResNet
from lightning_subnet.training import ProgressiveShrinking

OFA = {"ks.*": 5, "d.*": (2, 3), "e.*": (2, 3)}


def test_the_phases_of_once_for_all() -> None:
    net = ElasticMobileNetV3.small(depths=(2, 3, 4))
    space, schedule = net.search_space(), ProgressiveShrinking(OFA, warmup=4)
    schedule.check(space)
    expected = [  # epoch, then what kernels, depths and expansions may be
        (0, (7,), (4,), (6,)),
        (3, (7,), (4,), (6,)),
        (4, (3, 5, 7), (4,), (6,)),
        (9, (3, 5, 7), (3, 4), (6,)),
        (11, (3, 5, 7), (2, 3, 4), (6,)),
        (14, (3, 5, 7), (2, 3, 4), (4, 6)),
        (16, (3, 5, 7), (2, 3, 4), (3, 4, 6)),
        (1000, (3, 5, 7), (2, 3, 4), (3, 4, 6)),
    ]
    for epoch, *values in expected:
        part = schedule.opened(space, schedule.phase(epoch=epoch))
        if epoch < 4:
            assert part is None
            continue
        assert part is not None
        assert [part.values[name] for name in ("ks.3", "d.1", "e.5")] == values
        assert part.largest == space.largest
        assert part.smallest["d.1"] == values[1][0]
    assert part is not None
    assert part.size == space.size
    assert [phase.number for phase in schedule.phases] == [0, 1, 2, 3, 4, 5]


def test_steps_count_steps_and_epochs_epochs() -> None:
    by_step = ProgressiveShrinking(OFA, unit="steps")
    assert [by_step.phase(step=t, epoch=99).number for t in (0, 4, 5, 7, 10, 12)] == [
        1, 1, 2, 3, 4, 5,
    ]  # fmt: skip
    by_epoch = ProgressiveShrinking(OFA)
    assert by_epoch.phase(step=99, epoch=4).number == 1
    second = by_epoch.phase(epoch=5)
    assert by_epoch.begins(second, step=70, epoch=5, batch_idx=0)
    assert not by_epoch.begins(second, step=71, epoch=5, batch_idx=1)
    assert not by_epoch.begins(second, step=99, epoch=6, batch_idx=0)
    assert by_step.begins(by_step.phase(step=5), step=5, epoch=0, batch_idx=3)


def test_groups_free_choices_and_several_patterns_at_once() -> None:
    net = ElasticResNet.tiny(n_classes=10, resolutions=(4, 6, 8))
    space = net.search_space()
    schedule = ProgressiveShrinking({"d": 2, ("e.*", "w.[01]"): 2, "*": 1}, free="r")
    schedule.check(space)
    first, second, third = (schedule.opened(space, phase) for phase in schedule.phases)
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.values["r"] == (4, 6, 8)
    assert first.values["d.0"] == (0, 1, 2)
    assert (first.values["e.0"], first.values["w.0"]) == ((1.0,), (1.0,))
    assert (second.values["w.1"], second.values["w.2"]) == ((0.5, 1.0), (1.0,))
    assert third.size == space.size
    before = schedule.opened(space, schedule.before(schedule.phases[0]))
    assert before is not None
    assert before.size == 3  # the resolutions


def test_values_open_from_the_largest_and_categories_from_the_first() -> None:
    space = SearchSpace(
        {
            "depth": [1, 2, 3, 4, 5],
            "kind": Choice(["a", "b", "c"], ordered=False),
            "extra": Choice([1, 2], when={"depth": [1]}),  # not in the largest
        }
    )
    schedule = ProgressiveShrinking({"depth": (1, 1, 1), "kind": (1, 1), "extra": 1}, unit="steps")
    schedule.check(space)
    opened = [schedule.opened(space, phase) for phase in schedule.phases]
    assert [part.values["depth"] for part in opened if part] == [
        (3, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5),
    ]  # fmt: skip
    assert [part.values["kind"] for part in opened if part] == [
        ("a",), ("a",), ("a",), ("a", "b"), ("a", "b", "c"), ("a", "b", "c"),
    ]  # fmt: skip
    assert [part.values["extra"] for part in opened if part][-2:] == [(2,), (1, 2)]


def test_a_pool_opens_its_members() -> None:
    space = ElasticMobileNetV3.tiny(n_classes=10).search_space()
    pool = space.restricted_to([*space.sample(400, rng=0), space.largest, space.smallest])
    schedule = ProgressiveShrinking({"ks.*": 1, "*": 1})
    schedule.check(pool)
    assert schedule.opened(pool, schedule.phases[0]) is None  # no other has all else at its most
    last = schedule.opened(pool, schedule.phases[1])
    assert last is not None
    assert last.size == pool.size


@pytest.mark.parametrize(
    ("phases", "options", "message"),
    [
        ({}, {}, "has no phase"),
        (["ks.*"], {}, "has no phase"),
        (
            {"ks.*": 0},
            {},
            r"phases\['ks\.\*'\]=0 must be .* from 1. It is .* of epochs",
        ),
        ({"ks.*": (2, -1)}, {}, "=-1 must be"),
        ({"ks.*": 1.5}, {}, "=1.5 must be"),
        ({"ks.*": ()}, {}, "is empty"),
        ({"ks.*": True}, {}, "=True must be"),
        ({3: 1}, {}, "not a pattern"),
        ({"": 1}, {}, "not a pattern"),
        ({"ks.*": 1}, {"unit": "epoch"}, "Did you mean 'epochs'"),
        ({"ks.*": 1}, {"warmup": -1}, "warmup=-1 must be a whole number from 0"),
        ({"ks.*": 1}, {"sort": "k.*"}, "Did you mean 'ks.\\*'"),
    ],
)
def test_bad_schedules_are_refused(phases: object, options: dict, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        ProgressiveShrinking(phases, **options)


@pytest.mark.parametrize(
    ("phases", "options", "message"),
    [
        ({"kernel.*": 1, "*": 1}, {}, "'kernel.\\*' matches no choice. The choices are 'd.\\*'"),
        ({"ksz.*": 1, "*": 1}, {}, "Did you mean 'ks.\\*'"),
        ({"*": 1}, {"free": "res"}, "'res' matches no choice"),
        ({"*": 1, "ks.*": 1}, {}, "All choices that 'ks.\\*' matches"),
        ({"ks.*": 1, "d.*": 1}, {}, "No phase opens 'e.0'"),
    ],
)
def test_schedules_that_do_not_fit_the_space_are_refused(
    phases: dict, options: dict, message: str
) -> None:
    space = ElasticMobileNetV3.tiny(n_classes=10).search_space()
    with pytest.raises(SearchError, match=message):
        ProgressiveShrinking(phases, **options).check(space)
