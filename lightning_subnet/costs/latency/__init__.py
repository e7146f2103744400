# SPDX-License-Identifier: Apache-2.0
"""Latency: the time of a forward pass, measured."""
