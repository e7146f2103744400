# SPDX-License-Identifier: Apache-2.0
"""Space: what may vary; named choices, and the subnets that they span."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
