# SPDX-License-Identifier: Apache-2.0
"""What `tests/data` was recorded with: spaces, values, strategies, studies and a network.

The files there were written by an earlier version of the package, so nothing here may change: a
study is resumed, and its proposals are the recorded ones, only with the same settings and values.
Only public names of the package are used. Values are whole numbers over 512, which are exact and
rarely equal, so that what a strategy thinks best does not hang on the last bit of a sum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import (
    Budget,
    Choice,
    Evaluation,
    FunctionEvaluator,
    Measure,
    SearchResult,
    SearchSpace,
    Subnet,
    SubnetSampling,
    SubnetSearch,
    measure,
    predictors,
    strategies,
)
from lightning_subnet.supernets import ElasticMobileNetV3

try:  # where these were in the version that wrote the files, which runs this module too
    from lightning_subnet import (
        LatencyPredictor,
        LatencyTable,
        ProgressiveShrinking,
        load_exported,
        reduce_space,
    )
except ImportError:
    from lightning_subnet.costs import LatencyPredictor, LatencyTable
    from lightning_subnet.experiments import reduce_space
    from lightning_subnet.export import load_exported
    from lightning_subnet.training import ProgressiveShrinking

__all__ = ["LatencyPredictor", "LatencyTable", "load_exported"]  # for the tests and scripts

DATA = Path(__file__).parent / "data"
PREVIOUS = DATA / "previous"
SEEDS = (0, 1)


# Spaces


def conditional() -> SearchSpace:
    """Return 117 subnets of 243 assignments: later layers exist in deep subnets only."""
    return SearchSpace(
        {
            "depth": [2, 3, 4],
            "ks.0": [3, 5, 7],
            "ks.1": [3, 5, 7],
            "ks.2": Choice([3, 5, 7], when={"depth": [3, 4]}),
            "ks.3": Choice([3, 5, 7], when={"depth": [4]}),
        }
    )


def mixed() -> SearchSpace:
    """Return 378 subnets, with a choice without order and two values that mean the same."""
    return SearchSpace(
        {
            "op": Choice(["conv", "skip", "pool"], ordered=False),
            "stem": Choice([0, 1, 2], same=[(0, 1)]),
            "depth": [1, 2, 3],
            "width": Choice([8, 16, 32, 64], when={"depth": [2, 3]}),
            "rate": [0.5, 1.0, 2.0],
            "heads": Choice([2, 4, 8], when={"op": ["conv", "pool"]}),
        }
    )


def cells() -> SearchSpace:
    """Return 1024 subnets of choices without order."""
    names = ["none", "skip", "conv", "pool"]
    return SearchSpace({f"op.{i}": Choice(names, ordered=False) for i in range(5)})


def grid(n_choices: int = 5) -> SearchSpace:
    """Return a space of 4 ** n_choices subnets."""
    return SearchSpace({f"x.{i}": [0, 1, 2, 3] for i in range(n_choices)})


def pool() -> SearchSpace:
    """Return 90 of the 1024 subnets of a grid, by a rule."""
    rows = np.array(list(np.ndindex(4, 4, 4, 4, 4)))
    weights = np.array([1, 3, 5, 7, 9])
    return grid().restricted_to(rows[(rows @ weights) % 11 == 4][:90])


# Values

_WEIGHTS = np.array(
    [
        [577, 359, 487, 293, 449, 271, 199, 641, 173, 673, 109, 83],
        [167, 461, 263, 593, 211, 491, 307, 113, 677, 79, 653, 367],
        [311, 101, 643, 197, 683, 71, 457, 499, 269, 353, 587, 179],
    ]
)


def numbers(X: np.ndarray) -> dict[str, np.ndarray]:
    """Return the values of index rows (n, n_choices), (n,) each, by name."""
    first, second, third = _WEIGHTS[:, : X.shape[1]]
    pairs = X[:, :-1] * X[:, 1:]
    error = 40_000 - X @ (4 * first) + (X**2) @ (first // 3) - pairs @ (second[1:] // 5)
    slow = X @ second + (X**2) @ (second // 2) + pairs @ (third[1:] // 4)
    size = 20_000 + X @ third - np.abs(X - 1) @ (3 * first)
    return {"error": error / 512, "speed": (40_000 - slow) / 512, "size": size / 512}


@measure("cost", unit="M", exact=True, takes="indices")
def cost(X: np.ndarray) -> np.ndarray:
    """Return an exact cost of index rows."""
    weights = _WEIGHTS[:, : X.shape[1]]
    return (512 + X @ weights[1] + (X**2) @ (weights[2] // 3)) / 512


def fails(row: np.ndarray) -> bool:
    """Return whether the measurement of a subnet fails; about one in eleven does."""
    return int(row @ (3 * np.arange(len(row)) + 1)) % 11 == 5


def values_of(subnet: Subnet, names: Iterable[str]) -> dict[str, Any]:
    """Return what is measured of a subnet, of `size` with a standard error."""
    row = subnet.indices
    if fails(row):
        msg = "out of memory"
        raise RuntimeError(msg)
    told = {name: float(column[0]) for name, column in numbers(row[None]).items()}
    return {name: (told[name], 0.25) if name == "size" else told[name] for name in names}


# Problems: the settings of a search, by name

PROBLEMS: dict[str, Callable[[], dict[str, Any]]] = {
    "conditional": lambda: {
        "space": conditional(),
        "objectives": {"error": "min", "speed": "max"},
    },
    "mixed": lambda: {
        "space": mixed(),
        "objectives": {"error": "min", "cost": "min"},
        "constraints": {"cost": "<= 80%", "error": "<= 130%"},
        "measures": [cost],
    },
    "cells": lambda: {
        "space": cells(),
        "objectives": {"error": "min", "speed": "max", "size": "min"},
    },
    "single": lambda: {"space": grid(), "objectives": {"error": "min"}},
    "pool": lambda: {"space": pool(), "objectives": {"error": "min", "speed": "max"}},
    "wide": lambda: {
        "space": grid(12),
        "objectives": {"error": "min", "cost": "min"},
        "measures": [cost],
    },
}


def evaluator_of(settings: Mapping[str, Any], fingerprint: str | None = None) -> FunctionEvaluator:
    """Return what measures all that the search does not compute."""
    computed = {m.name for m in settings.get("measures", ())}
    names = {*settings["objectives"], *settings.get("constraints", ())} - computed
    wanted = sorted(names)
    return FunctionEvaluator(lambda subnet: values_of(subnet, wanted), fingerprint=fingerprint)


# Strategies: class and settings, what budget shows them, and on which problems

SMALL = {
    "random": ("RandomSearch", {"batch_size": 8}, 20),
    "nsga2": ("NSGA2", {"population": 8}, 32),
    "u-nsga3": ("UNSGA3", {"population": 8}, 32),
    "sms-emoa": ("SMSEMOA", {"population": 8}, 32),
    "linas": ("LINAS", {"population": 8, "predictions": 160}, 32),
    "weaknas": ("WeakNAS", {"batch_size": 6, "top": 12, "pool": 60}, 24),
    "nsganetv2": (
        "NSGANetV2",
        {"batch_size": 4, "first": 12, "inner_population": 12, "generations": 5,
         "predictor": "rbf"},
        24,
    ),
    "local-search": ("LocalSearch", {"batch_size": 4}, 24),
    "full": ("FullSearch", {"samples": 12, "batch_size": 6, "predictions": 200}, 30),
    "hybrid": ("Hybrid", {"batch_size": 5, "first": 10}, 25),
    "bayesian": ("Bayesian", {"batch_size": 2, "first": 10, "samples": 16, "scored": 60,
                              "rounds": 2}, 14),
}  # fmt: skip
"""By name of a strategy: on all problems."""

_BANDS = {"batch_size": 4, "top": 20, "pool": 60, "bands": 4, "predictor": "ridge"}
_WEAK = {"batch_size": 6, "top": 12, "pool": 60}
_NSGANET = {"batch_size": 4, "first": 12, "inner_population": 12, "generations": 5}
_LINAS = {"population": 8, "predictions": 160}
_INNER = {"batch_size": 5, "first": 10, "inner_population": 12, "generations": 3}
SPECIAL: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...]]] = {
    "random, stratified": ("RandomSearch", {"stratify_by": "cost", "batch_size": 6}, 18,
                           ("mixed", "wide")),
    "nsga2, mutating": ("NSGA2", {"population": 6, "crossover": 0.4, "mutation": 0.4}, 24,
                        ("conditional", "wide")),
    "linas, svr": ("LINAS", {**_LINAS, "predictor": "svr"}, 24, ("conditional", "single")),
    "linas, forest": ("LINAS", {**_LINAS, "predictor": "extra-trees"}, 24, ("mixed",)),
    "linas, exact": ("LINAS", {**_LINAS, "exact": True}, 24, ("mixed", "wide")),
    "weaknas, front": ("WeakNAS", {**_BANDS, "reading": "front"}, 24,
                       ("conditional", "mixed", "cells")),
    "weaknas, bands": ("WeakNAS", {**_BANDS, "reading": "bands"}, 24,
                       ("conditional", "mixed", "cells")),
    "weaknas, mlp": ("WeakNAS", {**_WEAK, "predictor": "mlp"}, 12, ("single",)),
    "weaknas, forest": ("WeakNAS", {**_WEAK, "predictor": "forest"}, 12, ("single",)),
    "nsganetv2, switching": ("NSGANetV2", _NSGANET, 16, ("wide", "single")),
    "nsganetv2, carts": ("NSGANetV2", {**_NSGANET, "predictor": "carts"}, 16, ("cells",)),
    "nsganetv2, gp": ("NSGANetV2", {**_NSGANET, "predictor": "gp"}, 16, ("pool",)),
    "full, exact": ("FullSearch", {"samples": 12, "batch_size": 6, "predictions": 200,
                                   "exact": True, "predictor": "svr"}, 24, ("wide",)),
    "hybrid, auto": ("Hybrid", {**_INNER, "predictor": "auto"}, 20, ("conditional", "wide")),
    "hybrid, gp": ("Hybrid", {**_INNER, "predictor": "gp"}, 20, ("mixed",)),
    "hybrid, stack": ("Hybrid", {**_INNER, "predictor": "stack"}, 20, ("cells", "wide")),
    "hybrid, boosting": ("Hybrid", {**_INNER, "predictor": "boosting"}, 20, ("single",)),
}  # fmt: skip
"""Other settings than those of `SMALL`, on the named problems."""

DEFAULT = {"random": 60, "nsga2": 110, "u-nsga3": 110, "sms-emoa": 110, "linas": 60,
           "weaknas": 110, "nsganetv2": 112, "local-search": 30, "full": 130, "hybrid": 32,
           "bayesian": 25}  # fmt: skip
"""The budgets of the strategies as they are by name, on the problem `wide`."""


def cases() -> list[tuple[str, str]]:
    """Return all recorded pairs of a strategy and a problem."""
    pairs = [(label, problem) for label in SMALL for problem in PROBLEMS]
    pairs += [(label, problem) for label, (*_, on) in SPECIAL.items() for problem in on]
    return pairs + [(f"{name}, by name", "wide") for name in DEFAULT]


def seeds_of(label: str) -> tuple[int, ...]:
    """Return the recorded seeds; one alone where a network of four times 1000 units is trained."""
    return SEEDS[:1] if label == "weaknas, mlp" else SEEDS


def strategy_of(label: str) -> tuple[Any, int]:
    """Return a recorded strategy, as `strategy=` takes it, and its budget."""
    if label.endswith(", by name"):
        name = label.removesuffix(", by name")
        return name, DEFAULT[name]
    cls, settings, budget = (SMALL[label] if label in SMALL else SPECIAL[label])[:3]
    return getattr(strategies, cls)(**settings), budget


def coded(space: SearchSpace, subnets: Iterable[Subnet]) -> str:
    """Return subnets as text: a digit per choice, the index of its value."""
    return " ".join("".join(map(str, row)) for row in space.indices(subnets).tolist())


def decoded(space: SearchSpace, text: str) -> list[Subnet]:
    """Return the subnets that `coded` has written."""
    return space.from_indices(np.array([[int(digit) for digit in row] for row in text.split()]))


def proposals(label: str, problem: str, seed: int) -> list[str]:
    """Return what a strategy proposes, by generation."""
    settings = PROBLEMS[problem]()
    strategy, budget = strategy_of(label)
    search = SubnetSearch(**settings, strategy=strategy, budget=budget, storage=None, seed=seed)
    history = search.run(evaluator_of(settings), progress=False).history
    generations: dict[int, list[Subnet]] = {}
    for evaluation in history:
        assert evaluation.generation is not None
        generations.setdefault(evaluation.generation, []).append(evaluation.subnet)
    return [coded(settings["space"], generations[number]) for number in sorted(generations)]


def reduced(problem: str) -> dict[str, list[Any]]:
    """Return the values that are left of a space which a search has reduced."""
    settings = PROBLEMS[problem]() | {"strategy": strategies.NSGA2(population=10)}
    search = SubnetSearch(**settings, budget=40, storage=None)
    result = search.run(evaluator_of(settings), progress=False)
    part = reduce_space(result, samples=600, predictor="ridge", min_share=0.2)
    return {name: list(values) for name, values in part.values.items()}


# Predictors


def predicted(name: str, problem: str) -> dict[str, list[float]]:
    """Return mean and standard deviation that a predictor gives on a small history."""
    space = PROBLEMS[problem]()["space"]
    rows = space.indices(list_of(space, 48))
    known, asked = rows[:36], rows[36:]
    model = predictors.make(name, random_state=1, space=space)
    model.fit(predictors.features(space, known), numbers(known)["error"])
    mean, std = model.predict(predictors.features(space, asked), return_std=True)
    return {"mean": mean.tolist(), "std": std.tolist()}


def list_of(space: SearchSpace, n: int) -> list[Subnet]:
    """Return n distinct subnets by a rule that needs no random numbers."""
    sizes = np.array([len(choice.values) for choice in space.choices.values()])
    mixed_up = (np.arange(8 * n)[:, None] * 2_654_435_761 + np.arange(len(sizes)) * 97_001) % 2**32
    mixed_up = (mixed_up * (2 * np.arange(len(sizes)) + 40_503)) % 2**32 >> 11
    found = list(dict.fromkeys(space.from_indices(space.canonical(mixed_up % sizes))))[:n]
    assert len(found) == n
    return found


# Training: which subnets a step trains

SAMPLINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "sandwich": lambda: {"rule": "sandwich"},
    "sandwich, of 3": lambda: {"rule": "sandwich", "n_random": 3},
    "random": lambda: {"rule": "random"},
    "turns": lambda: {"rule": "turns"},
    "turns, of 1": lambda: {"rule": "turns", "n_random": 1},
    "stratified": lambda: {"rule": "sandwich", "stratify": "macs"},
    "stratified by a measure": lambda: {
        "rule": "turns",
        "stratify": Measure("width", lambda X: X.sum(axis=1), exact=True, takes="indices"),
    },
    "shrinking": lambda: {
        "schedule": ProgressiveShrinking(
            {"ks": 2, "d": (1, 1), "e": 1}, unit="steps", warmup=1, sort="e"
        ),
    },
}
RANKS = ((0, 2), (1, 2), (0, 4), (1, 4), (2, 4), (3, 4))
N_STEPS = 6


def trained(label: str) -> list[str]:
    """Return the subnets of the first steps of a training, by step."""
    sampling = _begun(SubnetSampling(**SAMPLINGS[label](), seed=0))
    return [coded(Net().search_space(), sampling.subnets(step)) for step in range(N_STEPS)]


def trained_by_rank(rank: int, n_ranks: int) -> list[str]:
    """Return what one process of several trains under the rule `ranks`."""
    sampling = _begun(SubnetSampling(rule="sandwich", seed=0))
    # It wants several processes before it begins; what they draw is told by these two.
    sampling.rule, sampling._ranks = "ranks", (rank, n_ranks)
    return [coded(Net().search_space(), sampling.subnets(step)) for step in range(N_STEPS)]


def _begun(sampling: SubnetSampling) -> SubnetSampling:
    quiet_trainer(callbacks=[sampling], max_steps=1).fit(Lit(), Images())
    return sampling


# Studies: a search that was interrupted, by name


def ask_settings() -> dict[str, Any]:
    """Return the settings of the study that was asked and told."""
    return PROBLEMS["conditional"]() | {
        "strategy": strategies.Hybrid(batch_size=4, first=8),
        "constraints": {"cost": ["<= 95%", ">= 1.1"], "speed": ">= 20"},
        "measures": [cost],
    }


STUDIES: dict[str, Callable[[], tuple[dict[str, Any], int, int]]] = {
    "ask": lambda: (ask_settings(), 24, 30),
    "run": lambda: (
        PROBLEMS["mixed"]()
        | {"strategy": strategies.LINAS(population=8, predictions=160), "seed": 3},
        20,
        34,
    ),
    "pool": lambda: (PROBLEMS["pool"]() | {"strategy": strategies.NSGA2(population=6)}, 15, 27),
    "seconds": lambda: (
        PROBLEMS["single"]() | {"strategy": "random"},
        7,
        12,
    ),
    "warm": lambda: (
        PROBLEMS["wide"]() | {"space": grid(6), "strategy": strategies.NSGA2(population=6),
                              "warm_start": ["pool", {f"x.{i}": 3 for i in range(6)}]},
        15,
        24,
    ),
}  # fmt: skip
"""Settings, the budget that it was stopped at, and the one that it goes on to."""
STUDIES |= {
    f"of {name}": lambda name=name: (
        PROBLEMS["mixed"]() | {"strategy": strategy_of(name)[0]},
        SMALL[name][2] - 7,
        SMALL[name][2],
    )
    for name in SMALL
}
SHARED = "values of the previous version"
"""The fingerprint under which the study `run` has stored its values, for others to reuse."""


def study(name: str, storage: str | None, *, more: bool = False, **changes: Any) -> SubnetSearch:
    """Return the search of a study, with the budget that it was stopped at, or more."""
    settings, stopped, further = STUDIES[name]()
    budget: Any = further if more else stopped
    if name == "seconds":
        budget = Budget(evaluations=budget, seconds=1e6)
    given = {"storage": storage, "name": name, "budget": budget, **settings, **changes}
    return SubnetSearch(**given)


def study_evaluator(name: str) -> FunctionEvaluator:
    """Return what measures the subnets of a study."""
    return evaluator_of(STUDIES[name]()[0], SHARED if name == "run" else None)


def answered(search: SubnetSearch, subnet: Subnet) -> Evaluation:
    """Tell what was measured of a subnet of the study `ask`, or that it failed."""
    try:
        return search.tell(subnet, values_of(subnet, ["error", "speed"]))
    except RuntimeError as error:
        return search.fail(subnet, str(error))


def goes_on(name: str, storage: str | None) -> list[list[Any]]:
    """Take a study to its end; return the new subnets and their generations, in order."""
    search = study(name, storage, more=True)
    space = search.space
    assert space is not None
    before = len(search.history)
    if name == "ask":
        while subnets := search.ask(3):
            for subnet in subnets:
                answered(search, subnet)
    else:
        search.run(study_evaluator(name), progress=False)
    return [[coded(space, [e.subnet]), e.generation] for e in search.history[before:]]


# What a result says


def as_json(value: Any) -> Any:
    """Return data as it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def told_by(result: SearchResult) -> dict[str, Any]:
    """Return what a result says of its front, its evaluations and its space, as JSON-able data."""
    frame = result.to_dataframe()
    best = result.objectives[0].name
    return as_json(
        {
            "name": result.name,
            "objectives": {o.name: o.direction for o in result.objectives},
            "front": [
                {"number": e.number, "subnet": e.subnet.to_json(), "key": e.subnet.key,
                 "values": dict(e.values), "errors": dict(e.errors)}
                for e in result.front
            ],
            "best": result.best(best).number,
            "knee": result.knee.number,
            "rows": len(frame),
            "columns": list(frame.columns),
            "on the front": int(frame["front"].sum()),
            "failed": [e.number for e in result.history if not e.ok],
            "reasons": [e.reason for e in result.history if not e.ok],
            "space": {"size": result.history.space.size,
                      "fingerprint": result.history.space.fingerprint},
        }
    )  # fmt: skip


# A network


class Net(ElasticMobileNetV3):
    """The smallest super-network of the package, for images of 8 x 8 pixels: 400 subnets."""

    def __init__(self) -> None:
        tiny = ElasticMobileNetV3.tiny(
            n_classes=3, widths=(8, 8), head=(16, 16), stem=8, depths=(1, 2), expansions=(1, 2)
        )
        super().__init__(tiny.config)


class Lit(L.LightningModule):
    """An ordinary LightningModule around the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images(n: int) -> torch.Tensor:
    """Return n images by a rule, in three kinds."""
    at = torch.arange(n * 64, dtype=torch.float32).reshape(n, 1, 8, 8)
    return torch.sin(at * 0.7) + torch.arange(n).remainder(3).reshape(n, 1, 1, 1) * torch.cos(at)


class Images(L.LightningDataModule):
    """The images with their kinds."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(images(48), torch.arange(48) % 3), batch_size=8)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(images(30), torch.arange(30) % 3), batch_size=30)


def quiet_trainer(**options: Any) -> L.Trainer:
    """Return a Trainer that writes and shows nothing."""
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "devices": 1}
    settings |= {"enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False}
    return L.Trainer(**{**settings, **options})
