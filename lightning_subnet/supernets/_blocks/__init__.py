# SPDX-License-Identifier: Apache-2.0
"""Parts that super-networks share: blocks, configurations, checkpoints."""
