# SPDX-License-Identifier: Apache-2.0
"""Elasticity: what a network must offer to be searched."""
