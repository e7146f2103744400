# SPDX-License-Identifier: Apache-2.0
"""Study: what is measured and optimised, what was measured, and where it is kept."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
