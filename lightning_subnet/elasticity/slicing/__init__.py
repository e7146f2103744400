# SPDX-License-Identifier: Apache-2.0
"""Slicing: a subnet of any network as a module of its own, with only the weights that it reads."""
