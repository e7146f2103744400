# SPDX-License-Identifier: Apache-2.0
"""Search: one search, from its settings to its result."""
