# SPDX-License-Identifier: Apache-2.0
"""Costs: measures of a network that need no data.

There are three ways to a cost. A name, `"macs"` or `"latency_ms"`, is enough for one that is built
in. A function under `network_measure` is for a number that you read off an extracted network. A
class with `name` and `bind(elastic, example_input) -> Measure`, such as `PeakMemory`, is for a cost
with settings to check, with work to do once for each super-network, or with a fingerprint. Either
of the last two gets a name by a line in the table of `resolve.py`, or by an entry point of the
group `lightning_subnet.measures` in a package of yours.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
