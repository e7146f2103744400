# SPDX-License-Identifier: Apache-2.0
"""Channels of any network: which belong together, slices of them in force, and cut out."""
