# SPDX-License-Identifier: Apache-2.0
"""The contracts as others use them: in a folder of their own, where they pass what is right and
fail what is broken, each kind by the test that names it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

SUPERNET = """
import torch
from lightning_subnet import SearchSpace, SubnetMixin
from lightning_subnet.testing import SupernetContract

class Net(SubnetMixin, torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.width = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3), 8
    def search_space(self):
        return SearchSpace(width=[2, 4, 8])
    def activate(self, subnet):
        self.width = subnet["width"]
    def forward(self, x):
        w = self.width
        hidden = torch.nn.functional.linear(x, self.first.weight[:w], self.first.bias[:w]).relu()
        return torch.nn.functional.linear(hidden, self.last.weight[:, :w], self.last.bias)
    def extract(self, subnet):
        w = subnet["width"]
        first, last = torch.nn.Linear(6, w), torch.nn.Linear(w, 3)
        with torch.no_grad():
            first.weight.copy_(self.first.weight[:w])
            first.bias.copy_(self.first.bias[:w])
            last.weight.copy_(self.last.weight[:, :w])
            last.bias.copy_(self.last.bias)
        return torch.nn.Sequential(first, torch.nn.ReLU(), last)

class Largest(Net):
    def extract(self, subnet):
        return super().extract(self.search_space().largest)

class Shared(Net):
    def extract(self, subnet):
        net = super().extract(subnet)
        net[2].bias = self.last.bias
        return net

class Dead(Net):
    def search_space(self):
        return SearchSpace(width=[2, 4, 8], colour=["red", "green"])

class Leak(Net):
    before = 8
    def activate(self, subnet):
        self.before, self.width = self.width, subnet["width"]
    def forward(self, x):
        return super().forward(x) + self.before

class Writes(Net):
    def activate(self, subnet):
        super().activate(subnet)
        with torch.no_grad():
            self.first.bias.mul_(0.5)

class Contract(SupernetContract):
    def build(self):
        return self.cls()
    def inputs(self, n):
        return (torch.randn(n, 6),)
"""

MEASURE = """
from dataclasses import dataclass
import torch
from lightning_subnet import Measure
from lightning_subnet.supernets import ElasticMobileNetV3
from lightning_subnet.testing import MeasureContract

@dataclass(frozen=True)
class Weights:
    name: str = "weights"
    def values(self, elastic, subnets):
        return [float(subnet.indices.sum()) for subnet in subnets]
    def bind(self, elastic, example_input):
        return Measure(self.name, lambda subnets: self.values(elastic, subnets), exact=True)

class Random(Weights):
    def values(self, elastic, subnets):
        return torch.rand(len(subnets)).tolist()

class Nan(Weights):
    def values(self, elastic, subnets):
        return [float("nan")] * len(subnets)

class Activates(Weights):
    def values(self, elastic, subnets):
        for subnet in subnets:
            elastic.activate(subnet)
        return super().values(elastic, subnets)

class Evaluates(Weights):
    def values(self, elastic, subnets):
        elastic.eval()
        return super().values(elastic, subnets)

class Unnamed(Weights):
    def bind(self, elastic, example_input):
        return Measure("other", lambda subnets: self.values(elastic, subnets), exact=True)

class Contract(MeasureContract):
    def make(self):
        return self.cls()
    def network(self):
        torch.manual_seed(0)
        return ElasticMobileNetV3.tiny()
    def example_input(self):
        return torch.randn(1, 1, 8, 8)
"""

PREDICTOR = """
import numpy as np
from lightning_subnet.predictors import Ridge, make
from lightning_subnet.testing import PredictorContract

class Mine(Ridge):
    name = "mine"

class Sure(Mine):
    def predict(self, F, return_std=False):
        mean = super().predict(F)
        return (mean, np.zeros(len(mean))) if return_std else mean

class Remembers(Mine):
    shift = 0.0
    def fit(self, F, y):
        super().fit(F, y)
        self.shift += 1.0
        return self
    def predict(self, F, return_std=False):
        mean, std = super().predict(F, return_std=True)
        return (mean + self.shift, std) if return_std else mean + self.shift

class Draws(Mine):
    def fit(self, F, y):
        np.random.rand()
        return super().fit(F, y)

class Contract(PredictorContract):
    def make(self, **settings):
        return make(self.cls(), **settings)
"""

STORAGE = """
from lightning_subnet.study import Storage
from lightning_subnet.testing import StorageContract

class Mine(Storage):
    pass

class Forgets(Mine):
    def keep_value(self, fingerprint, subnet, value, error):
        pass
    def known_values(self, fingerprints, subnet):
        return {}

class Unsorted(Mine):
    def study_names(self):
        return sorted(super().study_names())

class Contract(StorageContract):
    def make(self, place):
        return self.cls(f"sqlite:///{place}/search.db")
"""

STRATEGY = """
import numpy as np
from lightning_subnet.strategies import RandomSearch
from lightning_subnet.testing import StrategyContract

class Mine(RandomSearch):
    name = "mine"

class Repeats(Mine):
    def propose(self, problem, history, n, rng, pending=()):
        proposals = super().propose(problem, history, n, rng, pending)
        return [proposals[0]] * len(proposals)

class Unseeded(Mine):
    def propose(self, problem, history, n, rng, pending=()):
        return super().propose(problem, history, n, np.random.default_rng(), pending)

class Remembers(Mine):
    def propose(self, problem, history, n, rng, pending=()):
        self.calls = getattr(self, "calls", 0) + 1
        return super().propose(problem, history, n, rng, pending)

class Greedy(Mine):
    def propose(self, problem, history, n, rng, pending=()):
        return super().propose(problem, history, n + 1, rng, pending)

class Contract(StrategyContract):
    registered = False
"""


PROGRAMS = {
    "supernet": SUPERNET,
    "measure": MEASURE,
    "predictor": PREDICTOR,
    "storage": STORAGE,
    "strategy": STRATEGY,
}
STATE = "test_the_network_and_all_random_states_stay_as_they_are"
REFIT = "test_the_same_rows_give_the_same_predictions_whatever_was_fitted_before"
MEMBERS = "test_proposals_are_new_distinct_canonical_members_and_at_most_n"
RIGHT = [
    ("supernet", "Net"),
    ("measure", "Weights"),
    ("predictor", "Mine"),
    ("storage", "Mine"),
    ("strategy", "Mine"),
]
BROKEN = [
    ("supernet", "Largest", "test_what_is_active_is_what_is_extracted"),
    ("supernet", "Shared", "test_an_extraction_shares_no_memory_and_leaves_what_is_active"),
    ("supernet", "Dead", "test_every_value_of_every_choice_is_another_network"),
    ("supernet", "Leak", "test_outputs_do_not_depend_on_what_was_active_before"),
    ("supernet", "Writes", "test_activating_moves_no_weights"),
    ("measure", "Random", "test_each_subnet_has_a_finite_number"),
    ("measure", "Random", STATE),
    ("measure", "Nan", "test_each_subnet_has_a_finite_number"),
    ("measure", "Activates", STATE),
    ("measure", "Evaluates", STATE),
    ("measure", "Unnamed", "test_it_has_a_name_and_binds_to_a_measure_of_that_name"),
    ("predictor", "Sure", "test_mean_and_uncertainty"),
    ("predictor", "Remembers", REFIT),
    ("predictor", "Draws", REFIT),
    ("storage", "Forgets", "test_values_are_found_by_fingerprint_and_subnet"),
    ("storage", "Unsorted", "test_studies_are_kept_by_name"),
    ("strategy", "Repeats", MEMBERS),
    ("strategy", "Unseeded", "test_the_same_arguments_give_the_same_proposals"),
    ("strategy", "Remembers", "test_history_problem_pending_and_the_strategy_stay_as_they_are"),
    ("strategy", "Greedy", MEMBERS),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, str]]:
    """The outcome of each test by its name, by program and class, of a run in another folder."""
    folder = tmp_path_factory.mktemp("contracts")
    for name, program in PROGRAMS.items():
        classes = {cls for kind, cls, *_ in [*RIGHT, *BROKEN] if kind == name}
        inherit = [f"class Test{cls}(Contract):\n    cls = {cls}\n" for cls in sorted(classes)]
        (folder / f"test_{name}.py").write_text("\n".join([program, *inherit]))
    tests = [f"test_{name}.py::Test{cls}" for name, cls in RIGHT]
    tests += [f"test_{name}.py::Test{cls}::{test}" for name, cls, test in BROKEN]
    pytest_ = f"{sys.executable} -m pytest -rA -q -p no:cacheprovider -c {os.devnull}"
    done = subprocess.run(
        [*pytest_.split(), *tests],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"(PASSED|FAILED|ERROR) test_(\w+)\.py::Test(\w+)::(\w+)", line):
            outcome, name, cls, test = match.groups()
            tests_of = found.setdefault((name, cls), {})
            if tests_of.get(test) in (None, "PASSED"):  # one bad case of several is enough
                tests_of[test] = outcome
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize(("program", "cls"), RIGHT)
def test_what_is_right_passes(outcomes: dict, program: str, cls: str) -> None:
    assert len(outcomes[program, cls]) > 3
    assert set(outcomes[program, cls].values()) == {"PASSED"}


@pytest.mark.parametrize(("program", "cls", "test"), BROKEN)
def test_what_is_broken_fails_by_the_test_that_names_it(
    outcomes: dict, program: str, cls: str, test: str
) -> None:
    assert outcomes[program, cls][test] == "FAILED"
