# SPDX-License-Identifier: Apache-2.0
"""Predictors by name, ours and those of other packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsRegressor

from lightning_subnet import predictors
from lightning_subnet.errors import PluginError, PluginWarning, PredictorError
from lightning_subnet.predictors.base import Predictor, Ridge
from lightning_subnet.predictors.registry import PREDICTORS, make, names
from lightning_subnet.predictors.wrapped import Wrapped
from tests.plugins import installed, write_package
from tests.predictors.test_base import sample
from tests.problems import assert_clear, grid

MODULE = """
from lightning_subnet.predictors import Predictor
from sklearn.neighbors import KNeighborsRegressor


class Nearest(Predictor):
    name = "demo-nearest"

    def __init__(self, k=1, *, random_state=0):
        super().__init__(random_state=random_state)
        self.k = k

    @classmethod
    def for_space(cls, space, *, random_state=0):
        return cls(k=space.size, random_state=random_state)


def neighbours(random_state=0):
    return KNeighborsRegressor(3)


def wrong(random_state=0):
    return 3
"""


def write(folder: Path, points: str, package: str = "demo", text: str = MODULE) -> Path:
    group = "[lightning_subnet.predictors]"
    write_package(folder / package, package, {package: text}, f"{group}\n{points}\n")
    return folder / package


def test_every_class_of_the_table_is_public_and_has_its_name() -> None:
    for name in PREDICTORS.table:
        predictor = make(name, random_state=3)
        assert isinstance(predictor, Predictor)
        assert predictor.name == name
        assert predictor.random_state == 3
        assert type(predictor).__name__ in predictors.__all__
    assert names()[: len(PREDICTORS.table)] == list(PREDICTORS.table)


# Predictors of other packages


def test_a_predictor_of_another_package_is_found_by_name(tmp_path: Path) -> None:
    points = "demo-nearest = demo:Nearest\ndemo-neighbours = demo:neighbours"
    F, y = sample(30)
    with installed(PREDICTORS, write(tmp_path, points)):
        assert names() == [*PREDICTORS.table, "demo-nearest", "demo-neighbours"]
        assert make("demo-nearest", random_state=7).get_params() == {"k": 1, "random_state": 7}
        assert make("demo-nearest", space=grid(2, 3)).get_params()["k"] == 9
        wrapped = make("demo-neighbours")
        assert isinstance(wrapped, Wrapped)
        expected = make(KNeighborsRegressor(3)).fit(F, y).predict(F)
        np.testing.assert_array_equal(wrapped.fit(F, y).predict(F), expected)
        with pytest.raises(PredictorError, match="Did you mean 'demo-nearest'"):
            make("demo-nerest")
    with pytest.raises(PredictorError):
        make("demo-nearest")


def test_an_instance_of_another_package_is_another_one_at_every_call(tmp_path: Path) -> None:
    text = "from lightning_subnet.predictors import Ridge\nRIDGE = Ridge(alpha=2.0)\n"
    F, y = sample(30)
    with installed(PREDICTORS, write(tmp_path, "demo-one = demo:RIDGE", text=text)):
        one, other = make("demo-one"), make("demo-one")
    assert one.get_params() == other.get_params() == {"alpha": 2.0, "random_state": 0}
    before = one.fit(F, y).predict(F)
    other.fit(F, -y)
    np.testing.assert_array_equal(one.predict(F), before)


def test_a_class_of_another_package_that_takes_no_seed_is_named(tmp_path: Path) -> None:
    points = "demo-line = sklearn.linear_model:LinearRegression"
    with (
        installed(PREDICTORS, write(tmp_path, points)),
        pytest.raises(PluginError, match=r"'demo-line' of demo .* does not take random_state="),
    ):
        make("demo-line")


def test_a_predictor_that_cannot_be_imported_breaks_no_other(tmp_path: Path) -> None:
    with installed(PREDICTORS, write(tmp_path, "broken = demo:Nearest", text="1 / 0\n")):
        assert make("ridge").name == "ridge"
        with pytest.raises(PluginError) as caught:
            make("broken")
    assert_clear(caught.value, "'broken' of demo (demo:Nearest)", "ZeroDivisionError")


@pytest.mark.parametrize("target", ["demo:wrong", "demo"])
def test_what_is_not_a_predictor_is_named_with_its_package(tmp_path: Path, target: str) -> None:
    with (
        installed(PREDICTORS, write(tmp_path, f"wrong = {target}")),
        pytest.raises(PluginError) as caught,
    ):
        make("wrong")
    assert_clear(caught.value, f"'wrong' of demo ({target})", "no fit and predict")


def test_a_name_of_ours_stays_ours(tmp_path: Path) -> None:
    with (
        installed(PREDICTORS, write(tmp_path, "ridge = demo:Nearest")),
        pytest.warns(PluginWarning, match="'ridge' is that of lightning-subnet") as caught,
    ):
        assert type(make("ridge")) is Ridge
    assert caught[0].filename == __file__


def test_two_packages_with_one_name_are_both_named(tmp_path: Path) -> None:
    one = write(tmp_path, "demo-nearest = demo:Nearest")
    two = write(tmp_path, "demo-nearest = other:Nearest\nfine = other:Nearest", package="other")
    with installed(PREDICTORS, one, two):
        assert make("fine").name == "demo-nearest"
        with pytest.raises(PluginError) as caught:
            make("demo-nearest")
    assert_clear(caught.value, "'demo-nearest'", "demo (demo:Nearest)", "other (other:Nearest)")


# Errors


def test_unknown_predictors() -> None:
    with pytest.raises(PredictorError) as caught:
        make("rigde")
    assert_clear(caught.value, "'rigde'", "Did you mean 'ridge'?", *names())
    with pytest.raises(PredictorError) as caught:
        make(KNeighborsRegressor)
    assert_clear(caught.value, "the class, not an object: add ()")
    with pytest.raises(PredictorError, match="fit"):
        make(3)
