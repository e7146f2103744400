# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: each module is a script, run as `python -m benchmarks.<name>`."""
