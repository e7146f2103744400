# SPDX-License-Identifier: Apache-2.0
"""Results: what a search found, as tables, pictures, files and modules."""
