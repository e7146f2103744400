# SPDX-License-Identifier: Apache-2.0
"""Strategies propose the next subnets from a history: a name, or one of these objects.

A new strategy is a file here with one class and a line in the table of `registry.py`; then
`python -m tests.stubs` writes the list of public names. The class derives from `base.Strategy`,
which says what a strategy owes, and its test from `StrategyContract`. A strategy of another
package has the same class and test, and in place of the line an entry point of the group
`lightning_subnet.strategies`. `_toolkit` has what strategies share: sources of proposals, the order
of evaluated rows, surrogates of measures, and evolutions on these.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
