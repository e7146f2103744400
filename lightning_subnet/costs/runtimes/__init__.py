# SPDX-License-Identifier: Apache-2.0
"""Runtimes: one file for each library that runs a network while it is timed."""
