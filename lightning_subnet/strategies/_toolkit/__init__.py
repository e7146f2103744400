# SPDX-License-Identifier: Apache-2.0
"""Tools of strategies: sources of proposals, orders, surrogates, evolutions on predictions."""
