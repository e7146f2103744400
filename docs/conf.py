# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. The build needs no network: no intersphinx, no remote assets."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.metadata import version as installed_version
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.util import logging

import lightning_subnet

project = "lightning-subnet"
author = "lightning-subnet contributors"
copyright = author
release = version = installed_version("lightning-subnet")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings have code between single backticks
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"lightning-subnet {release}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # otherwise a documented dataclass field is described twice, a warning

copybutton_exclude = ".linenos, .gp, .go"


def _public(package: ModuleType) -> list[str]:
    """Return the public names of a package; of the errors, which are one file, all classes."""
    if hasattr(package, "__all__"):
        return [*package.__all__]
    classes = inspect.getmembers(package, inspect.isclass)
    return [name for name, value in classes if value.__module__ == package.__name__]


def _packages() -> list[ModuleType]:
    """Return the packages with public names; `testing` is not one of the top's names."""
    values = [getattr(lightning_subnet, name) for name in lightning_subnet.__all__]
    packages = [value for value in values if isinstance(value, ModuleType)]
    return [*packages, import_module("lightning_subnet.testing")]


def _check_names(app: Any, env: Any) -> None:
    """Warn of public names that have no description, or no place in the table of the top's names.

    With -W that fails the build.
    """
    logger = logging.getLogger(__name__)
    packages = _packages()
    paths = [f"{package.__name__}.{name}" for package in packages for name in _public(package)]
    for path in paths:
        if path not in env.get_domain("py").objects:
            logger.warning("%s is public and not in the reference", path)
    table = Path(env.doc2path("api")).read_text()
    modules = {package.__name__.rpartition(".")[2] for package in packages}
    for name in _public(lightning_subnet):
        if name not in modules and f".{name}`" not in table:
            logger.warning("lightning_subnet.%s is public and not in the table of api.md", name)


def setup(app: Any) -> None:
    """Connect what this file defines, as Sphinx asks for it."""
    app.connect("env-check-consistency", _check_names)
