# SPDX-License-Identifier: Apache-2.0
"""Training: training and validating subnets with a Lightning Trainer."""
