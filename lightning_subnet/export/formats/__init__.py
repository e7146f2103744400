# SPDX-License-Identifier: Apache-2.0
"""Formats: one file each; `registry.py` has the table of them."""
