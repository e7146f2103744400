# SPDX-License-Identifier: Apache-2.0
"""The pieces of messages, and warnings that point at the user's line."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_subnet
from lightning_subnet import SearchSpace, SubnetSearch
from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.errors import BudgetWarning, CalibrationWarning
from lightning_subnet.supernets import ElasticMobileNetV3

PACKAGE = Path(lightning_subnet.__file__).parent


class LitNorm(L.LightningModule):
    """A super-network with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ElasticMobileNetV3.tiny(n_classes=10, depths=(1, 2), widths=(8, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


def test_did_you_mean_names_the_nearest_or_nothing() -> None:
    assert did_you_mean("dept", ["width", "depth"]) == " Did you mean 'depth'?"
    assert did_you_mean("zzz", ["width", "depth"]) == ""
    assert did_you_mean(44, [4, 440]) == " Did you mean '440'?"
    assert did_you_mean("a", []) == ""


def test_did_you_mean_looks_past_capitals_and_keeps_those_of_the_option() -> None:
    assert did_you_mean("DEPTH", ["width", "depth"]) == " Did you mean 'depth'?"
    assert did_you_mean("adamw", ["SGD", "AdamW"]) == " Did you mean 'AdamW'?"


def test_listed_is_short() -> None:
    assert listed(["a", 2]) == "'a', 2"
    assert listed([]) == "nothing"
    assert listed(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7, ... (9 in all)"
    assert listed(iter("abc"), limit=2) == "'a', 'b', ... (3 in all)"


def test_a_warning_points_at_the_user_s_line_and_says_how_to_silence_it() -> None:
    space = SearchSpace(depth=list(range(9)), width=list(range(9)))
    with pytest.warns(BudgetWarning) as caught:
        SubnetSearch(space=space, objectives={"error": "min"}, strategy="linas", budget=4)
    (warning,) = caught
    assert warning.filename == __file__
    line = 'warnings.simplefilter("ignore", lightning_subnet.errors.BudgetWarning)'
    assert str(warning.message).endswith(f" Silence it: {line}.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(line, {"warnings": warnings, "lightning_subnet": lightning_subnet})
        SubnetSearch(space=space, objectives={"error": "min"}, strategy="linas", budget=4)


def test_a_warning_from_within_a_context_manager_or_a_trainer_points_at_the_user_s_line() -> None:
    labels = torch.arange(64) // 32
    images = torch.rand(64, 1, 8, 8)
    data = DataLoader(TensorDataset(images, labels), batch_size=32)
    other = DataLoader(TensorDataset(torch.rand(64, 1, 12, 12), labels), batch_size=32)
    for train, text in ((data, "sorted by class"), (other, "BatchNorm statistics of one size")):
        search = SubnetSearch(
            objectives={"val_loss": "min"}, strategy="random", budget=2, storage=None, checks=False,
            calibration_images=64,
        )  # fmt: skip
        with pytest.warns(CalibrationWarning, match=text) as caught:
            search.fit(LitNorm(), dataloaders=data, train_dataloaders=train, progress=False)
        files = {w.filename for w in caught if issubclass(w.category, CalibrationWarning)}
        assert files == {__file__}


def test_the_package_warns_in_one_way_only() -> None:
    callers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "warnings.warn"
    }
    assert callers == {"_messages.py"}
