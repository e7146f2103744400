# SPDX-License-Identifier: Apache-2.0
"""Subnets measured by a Lightning Trainer: the evaluator, its data, what it leaves as it was."""
