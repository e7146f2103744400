# SPDX-License-Identifier: Apache-2.0
"""Testing: the contracts of what one can add, as test classes to inherit; they need pytest.

A test file of your own inherits one, says how to make the thing, and has all of its tests.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
