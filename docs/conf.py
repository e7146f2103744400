# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. The build needs no network: no intersphinx, no remote assets."""

from __future__ import annotations

from importlib.metadata import version as installed_version

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
