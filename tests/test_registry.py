# SPDX-License-Identifier: Apache-2.0
"""Names of the package's own and of other packages, which are really on `sys.path`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from lightning_subnet._registry import Registry
from lightning_subnet.errors import PluginError, PluginWarning
from tests.plugins import installed, write_package
from tests.problems import assert_clear

GROUP = "lightning_subnet.numbers"


@pytest.fixture
def numbers() -> Registry:
    return Registry("number", GROUP, {"pi": "math:pi", "e": "math:e"})


def write(folder: Path, points: str, text: str = "four = 4\n", package: str = "demo") -> Path:
    """Write a package with a module of its name, and return its folder."""
    write_package(folder / package, package, {package: text}, f"[{GROUP}]\n{points}\n")
    return folder / package


def test_the_table_is_in_order_and_nothing_is_imported_before_it_is_asked_for() -> None:
    sys.modules.pop("this", None)
    registry = Registry("thing", "nobody.offers.this", {"zen": "this:s", "pi": "math:pi"})
    assert registry.names() == ["zen", "pi"]
    assert "zen" in registry
    assert "tau" not in registry
    assert None not in registry
    assert "this" not in sys.modules
    assert registry["pi"] == pytest.approx(3.14, abs=0.01)


def test_an_unknown_name_is_a_key_error(numbers: Registry) -> None:
    with pytest.raises(KeyError, match="tau"):
        numbers["tau"]


def test_names_of_other_packages_come_last_and_are_loaded_when_asked_for(
    numbers: Registry, tmp_path: Path
) -> None:
    folder = write(tmp_path, "two = demo:missing\nfour = demo:four\nname.space = demo:Four.value",
                   "four = 4\nclass Four:\n    value = 44\n")  # fmt: skip
    with installed(numbers, folder):
        assert numbers.names() == ["pi", "e", "four", "name.space", "two"]
        assert "four" in numbers
        assert "demo" not in sys.modules
        assert numbers["four"] == 4
        assert numbers["name.space"] == 44


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("import nothing_of_this_name", ("ModuleNotFoundError", "'nothing_of_this_name'")),
        ("1 / 0", ("ZeroDivisionError",)),
        ("five = 5", ("AttributeError", "four")),
    ],
)
def test_what_cannot_be_imported_is_named_with_its_package(
    numbers: Registry, tmp_path: Path, text: str, parts: tuple[str, ...]
) -> None:
    with installed(numbers, write(tmp_path, "four = demo:four", text)):
        assert numbers["pi"] > 3
        assert "four" in numbers
        with pytest.raises(PluginError) as caught:
            numbers["four"]
    assert_clear(caught.value, "The number 'four' of demo (demo:four)", "Repair", *parts)
    assert isinstance(caught.value, ImportError)
    assert caught.value.__cause__ is not None


def test_a_name_of_ours_stays_ours_and_says_so_once(numbers: Registry, tmp_path: Path) -> None:
    with installed(numbers, write(tmp_path, "pi = demo:four\nfour = demo:four")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # who does not use the name is not bothered
            assert numbers.names() == ["pi", "e", "four"]
            assert numbers["e"] < 3
            assert numbers["four"] == 4
        with pytest.warns(PluginWarning, match=r"'pi' is that of lightning-subnet.*demo \(demo:"):
            assert numbers["pi"] < 4
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert numbers["pi"] < 4


def test_two_packages_with_one_name_are_both_named_when_it_is_asked_for(
    numbers: Registry, tmp_path: Path
) -> None:
    one = write(tmp_path, "four = demo:four\nten = demo:four")
    two = write(tmp_path, "four = other:four\nfive = other:four", package="other")
    with installed(numbers, one, two):
        assert numbers.names() == ["pi", "e", "five", "four", "ten"]
        assert numbers["ten"] == numbers["five"] == 4, "their other names work"
        with pytest.raises(PluginError) as caught:
            numbers["four"]
    assert_clear(caught.value, "'four'", "demo (demo:four)", "other (other:four)", "Uninstall")


def test_two_packages_may_name_the_same_thing(numbers: Registry, tmp_path: Path) -> None:
    one = write(tmp_path, "four = demo:four")
    two = write(tmp_path, "four = demo:four", package="other")
    with installed(numbers, one, two):
        assert numbers["four"] == 4


def test_what_is_unusable_is_named_with_its_package(numbers: Registry, tmp_path: Path) -> None:
    with installed(numbers, write(tmp_path, "four = demo:four")):
        assert_clear(
            numbers.unusable("four", "is too small"),
            "The number 'four' of demo (demo:four) is too small.",
        )


def test_a_package_that_is_gone_leaves_nothing(numbers: Registry, tmp_path: Path) -> None:
    with installed(numbers, write(tmp_path, "four = demo:four")):
        assert numbers["four"] == 4
    assert numbers.names() == ["pi", "e"]
    assert "demo" not in sys.modules
