# SPDX-License-Identifier: Apache-2.0
"""Study: what is measured and optimised, what was measured, and where it is kept."""
