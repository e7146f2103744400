# SPDX-License-Identifier: Apache-2.0
"""Super-networks: those of the field, one class each, and adapters for those of other packages.

Adding one is a file here and a line in `__init__.pyi`; its test inherits `SupernetContract` of
`lightning_subnet.testing`. Several networks share what is in `_blocks`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
