# SPDX-License-Identifier: Apache-2.0
"""Costs that are the same for every subnet: a warning that says so, and none in normal use."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
from torch import nn

from lightning_subnet import Measure, SearchSpace, Subnet
from lightning_subnet.costs.resolve import resolve
from lightning_subnet.costs.varying import check_varies
from lightning_subnet.errors import CostWarning
from lightning_subnet.study.objectives import parse_constraints, parse_objectives
from lightning_subnet.study.problem import Problem
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import Digits, ElasticMlp, LitMlp, search
from tests.problems import assert_clear

SPACE = SearchSpace(depth=[1, 2, 3], width=[8, 16, 32], sharpen=[1, 2])


def problem(*measures: Measure, constraints: Any = None, space: SearchSpace = SPACE) -> Problem:
    objectives = {"loss": "min"} | {m.name: "min" for m in measures if constraints is None}
    return Problem.of(
        space, parse_objectives(objectives), parse_constraints(constraints or {}), measures
    )


def counted(fn: Any, name: str = "cost") -> tuple[Measure, list[Subnet]]:
    calls: list[Subnet] = []

    def values(subnets: list[Subnet]) -> list[float]:
        calls.extend(subnets)
        return [fn(subnet) for subnet in subnets]

    return Measure(name, values, exact=True), calls


def test_one_value_for_all_subnets_is_told() -> None:
    measure, _ = counted(lambda subnet: 5.0)
    with pytest.warns(CostWarning) as caught:
        check_varies(problem(measure))
    assert len(caught) == 1
    assert_clear(caught[0].message, "the same 'cost' (5)", "check_elastic", "CostWarning")
    with pytest.warns(CostWarning, match="the same 'cost'"):
        check_varies(problem(measure, constraints={"cost": "<= 80%"}))


def fails(subnet: Subnet) -> float:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("fn", "most"),
    [
        (lambda s: s["depth"], 2),  # the ends differ, and no other is measured
        (lambda s: (s["depth"] - 2) ** 2, 7),  # the ends have one value, and others do not
        (lambda s: float("nan"), 2),
        (fails, 2),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_differs_or_fails_is_no_warning_and_costs_little(fn: Any, most: int) -> None:
    measure, calls = counted(fn)
    check_varies(problem(measure))
    assert len(calls) <= most
    check_varies(problem(Measure("cost", fails)))  # is not exact
    check_varies(Problem.of(SPACE, parse_objectives({"loss": "min"}), (), [measure]))
    assert len(calls) <= most


class Whole(ElasticMlp):
    """Its subnets cannot be had alone: a copy keeps all weights."""

    def extract(self, subnet: Subnet) -> nn.Module:
        plain = copy.deepcopy(self)
        plain.activate(subnet)
        return plain


def test_parameters_of_copies_that_keep_all_weights_are_told() -> None:
    net = Whole()
    bound = resolve(net, ["params", "size_mb"])
    with pytest.warns(CostWarning) as caught:
        check_varies(problem(*bound.values(), space=net.search_space()))
    assert [str(w.message).split("'")[1] for w in caught] == ["params", "size_mb"]
    assert_clear(caught[0].message, "frozen copy that keeps all weights", "extract(subnet)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny = ElasticMobileNetV3.tiny()
        bound = resolve(tiny, ["macs", "params"])
        check_varies(problem(*bound.values(), space=tiny.search_space()))


def test_fit_tells_it_before_the_budget_is_spent() -> None:
    model = LitMlp()
    model.net = Whole()
    objectives = {"val_acc": "max", "macs": "min"}
    with pytest.warns(CostWarning, match="the same 'params'"):
        search(objectives=objectives | {"params": "min"}).fit(model, Digits())
    with warnings.catch_warnings():
        warnings.simplefilter("error", CostWarning)
        search(objectives=objectives).fit(model, Digits())
