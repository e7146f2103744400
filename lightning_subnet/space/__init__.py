# SPDX-License-Identifier: Apache-2.0
"""Space: what may vary; named choices, and the subnets that they span."""
