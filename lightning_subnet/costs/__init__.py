# SPDX-License-Identifier: Apache-2.0
"""Costs: measures of a network that need no data."""
