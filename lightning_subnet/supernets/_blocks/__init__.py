# SPDX-License-Identifier: Apache-2.0
"""What super-networks share: blocks, configurations, checkpoints."""
