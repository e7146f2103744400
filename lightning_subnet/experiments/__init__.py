# SPDX-License-Identifier: Apache-2.0
"""Experiments: many searches; strategies and seeds, hardware settings, a reduced space."""
