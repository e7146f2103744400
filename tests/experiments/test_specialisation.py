# SPDX-License-Identifier: Apache-2.0
"""One super-network searched for several settings: shared validations, warm starts, resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_subnet import Latency, measure
from lightning_subnet.errors import SearchError, SubnetError
from lightning_subnet.experiments import specialise
from lightning_subnet.strategies import NSGA2
from lightning_subnet.study.storage import Storage
from tests.networks import Digits, LitMlp, quiet_trainer
from tests.problems import assert_clear, record

QUICK: dict[str, Any] = {"repeats": 15, "seconds": 0.01}


def run(model: LitMlp, storage: Any, budget: int = 6, **changes: Any) -> dict[str, Any]:
    settings = {
        "settings": {"one": Latency(**QUICK), "eight": Latency(batch_size=8, **QUICK)},
        "objectives": {"val_acc": "max", "latency_ms": "min"},
        "strategy": NSGA2(population=3),
        "storage": storage,
        "trainer": quiet_trainer(),
        "verify_front": False,
        "progress": False,
    }
    return specialise(model, Digits(), budget=budget, **{**settings, **changes})


def test_a_subnet_is_validated_once_over_all_settings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LitMlp()
    url = f"sqlite:///{tmp_path}/s.db"
    results = run(model, url, scout="macs")
    assert list(results) == ["macs", "one", "eight"]
    different = {e.subnet for result in results.values() for e in result.history}
    total = sum(len(result.history) for result in results.values())
    assert total == 18
    assert len(different) < total, "warm starts overlap"
    # The first of all is scored twice, with another score in between.
    assert model.validated.n - 2 == len(different)
    accuracy: dict[Any, float] = {}
    for result in results.values():
        for e in result.history:
            assert accuracy.setdefault(e.subnet, e.values["val_acc"]) == e.values["val_acc"]
    assert "latency_ms" not in results["macs"].history[0].values
    # Evaluation 0 is the largest; then come fronts of the searches before.
    assert results["one"].history[1].subnet in {e.subnet for e in results["macs"].front} | {
        e.subnet for e in results["one"].history[:1]
    }
    eight = results["eight"].history
    earlier = {e.subnet for label in ("macs", "one") for e in results[label].front}
    assert eight[1].subnet in earlier
    assert "val_acc" in eight[1].reused
    assert "latency_ms" not in eight[1].reused
    assert Storage(url).study_names() == [f"specialise/{label}" for label in results]
    # The same call again measures nothing; a larger budget goes on.
    validations = model.validated.n
    again = run(model, url, scout="macs")
    assert model.validated.n == validations
    for label, result in again.items():
        assert record(result.history) == record(results[label].history)
    more = run(model, url, scout="macs", budget=8)
    for label, result in more.items():
        assert record(result.history[:6]) == record(results[label].history)
        assert len(result.history) == 8


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LitMlp()
    url = f"sqlite:///{tmp_path}/s.db"

    @measure("latency_ms")
    def slow(subnets: Any) -> Any:
        if broken:
            raise KeyboardInterrupt
        return [float(s["width"]) for s in subnets]

    broken = True
    settings = {"one": measure("latency_ms")(lambda subnets: [1.0] * len(subnets)), "two": slow}
    with pytest.raises(KeyboardInterrupt):
        run(model, url, settings=settings)
    broken = False
    validations = model.validated.n
    results = run(model, url, settings=settings)
    assert len(results["two"].history) == 6
    fresh = {e.subnet for e in results["two"].history} - {e.subnet for e in results["one"].history}
    # What was validated when the measure was interrupted was not recorded, and is repeated.
    assert model.validated.n - validations <= len(fresh) + 1


def test_settings_are_labelled_by_what_they_are() -> None:
    results = run(LitMlp(), None, 2, settings=[Latency(**QUICK), Latency(batch_size=2, **QUICK)],
                strategy="random")  # fmt: skip
    assert list(results) == ["cpu-batch1-threads1", "cpu-batch2-threads1"]


def bad(**changes: Any) -> Callable[[], Any]:
    return lambda: run(LitMlp(), None, **changes)


BAD = [
    (bad(settings=[]), ("empty",)),
    (bad(settings=[Latency(), Latency()]), ("cpu-batch1-threads1", "labels")),
    (bad(settings={"a": Latency}), ("'a'", "not a measure")),
    (bad(settings=3), ("is 3", "not a measure")),
    (bad(settings=None), ("is None", "not a measure")),
    (bad(settings=Latency), ("Latency", "not a measure")),
    (bad(settings=[{"a": 1}]), ("{'a': 1}", "not a measure")),
    (bad(settings={"a": Latency(name="ms")}), ("'ms'", "'latency_ms'", "one name")),
    (bad(settings={"a": Latency(), "b": Latency(name="ms")}), ("'ms'", "one name")),
    (bad(scout="val_acc"), ("'val_acc'", "already")),
    (bad(strategy="nsga"), ("nsga2",)),
]


@pytest.mark.parametrize(("call", "parts"), BAD)
def test_bad_settings_fail_before_anything_is_measured(
    call: Callable[[], Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises((SearchError, SubnetError)) as caught:
        call()
    assert_clear(caught.value, *parts)
