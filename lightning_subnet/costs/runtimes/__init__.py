# SPDX-License-Identifier: Apache-2.0
"""Runtimes: what runs a network while it is timed."""
