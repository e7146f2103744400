# SPDX-License-Identifier: Apache-2.0
"""These tests run where timm and transformers are: in .venv/zoo, by `make test-zoo`."""

from __future__ import annotations

from importlib.util import find_spec

if not (find_spec("timm") and find_spec("transformers")):
    collect_ignore_glob = ["*.py"]
