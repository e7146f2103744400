# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. The build needs no network: no intersphinx, no remote assets."""

from __future__ import annotations

from importlib.metadata import version as installed_version
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


def _elsewhere(
    app: Any, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out of a package's page what is a package itself, or stands on the page of the top."""
    page = app.env.docname.rpartition("/")[2]
    on_top = page == "api"
    public = what == "module" and name in lightning_subnet.__all__
    return True if isinstance(member, ModuleType) or (public and not on_top) else None


def _check_names(app: Any, env: Any) -> None:
    """Warn of public names without a description; with -W that fails the build."""
    described = env.get_domain("py").objects
    top = set(lightning_subnet.__all__)
    for name in sorted(top):
        value = getattr(lightning_subnet, name)
        inner = set(getattr(value, "__all__", ())) - top if isinstance(value, ModuleType) else {""}
        for public in inner:
            path = ".".join(filter(None, ("lightning_subnet", name, public)))
            if path not in described:
                logging.getLogger(__name__).warning("%s is public and not in the reference", path)


def setup(app: Any) -> None:
    """Connect what this file defines, as Sphinx asks for it."""
    app.connect("autodoc-skip-member", _elsewhere)
    app.connect("env-check-consistency", _check_names)
